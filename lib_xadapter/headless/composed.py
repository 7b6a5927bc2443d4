"""A pipeline made of two pipelines of diffusers, one of SD1.5 with its plugins and one of SDXL.

Both stay their owner's objects, set up with diffusers' own calls. X-Adapter taps the base's decoder and adds to the
upgraded one's while a call lasts, and leaves nothing behind.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from ..errors import DoesNotFit, WrongArgument
from ..mapping import MappingLayers, load_adapter, save_adapter
from ..recording import LeastRecentlyUsed
from ..settings import AUTO, BASE_NOISE_SEED, LOCKSTEP, PICTURE, RECORDED, Settings, half, read_settings
from .job import LATENT_PIXEL
from .model_files import load_base, load_upgraded
from .models import Models, Placement, device_of, moves_by_itself, parts_at_work
from .pictures import Generators, Painted
from .pipeline import (
    DIFFUSERS_RULES,
    Interruption,
    Progress,
    Recordings,
    Request,
    Rules,
    TwoStages,
    no_progress,
)
from .samplers import check_scheduler

ADAPTER_FILE = "x_adapter.safetensors"
SMALLEST_GUIDANCE = 1 + 2**-52
"""With which diffusers evaluates unconds, and adds nothing of the difference."""
MOST_RECORDED = 8 * 2**30
"""Bytes of recordings that one base side keeps."""

USUAL_LATENT = 128
"""Of SDXL, across and down."""

StepCallback = Callable[["XAdapterPipeline", int, Tensor, dict[str, Any]], dict[str, Any]]


@dataclass
class BaseSide:
    """What the base made: to be given to later calls that change nothing of it, so that they run SDXL alone.

    Attributes:
        latents: its finished latents, (images, 4, h, w); None in a single stage.
        recordings: its features in the joint stage, by switch point, where `memory` was "recorded".
    """

    latents: Tensor | None
    recordings: Recordings = field(default_factory=lambda: LeastRecentlyUsed(lambda: MOST_RECORDED))


@dataclass
class XAdapterPipelineOutput(BaseOutput):
    """What a call gives.

    Attributes:
        images: as `output_type` says.
        base_side: what the base made.
        base_images: the base's own pictures, where they were asked for and it painted any.
    """

    images: Any
    base_side: BaseSide
    base_images: list[Image.Image] | None = None


class DrawnNoise:
    """Random numbers drawn from the caller's generators, in the order in which diffusers' pipelines draw them.

    Args:
        shape, base_shape: of the latents, (images, 4, h, w).
        generator: of the upgraded model; None for torch's own.
        base_generator: of the base; None for one in the upgraded model's state.
        device: of the pipelines.
        dtype, base_dtype: of the UNets.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        base_shape: tuple[int, ...],
        generator: Generators,
        base_generator: Generators,
        device: torch.device,
        dtype: torch.dtype,
        base_dtype: torch.dtype,
    ) -> None:
        self._shape, self._base_shape = shape, base_shape
        self._device, self._dtype, self._base_dtype = device, dtype, base_dtype
        self._base_seeds = _copied(base_generator if base_generator is not None else generator)
        self.base_steps = base_generator if base_generator is not None else _copied(generator)
        self.base_encoding = self.base_steps
        self.encoding = self.upgraded_steps = generator

    def base(self) -> Tensor:
        return randn_tensor(self._base_shape, self.base_steps, self._device, self._base_dtype)

    def upgraded(self) -> Tensor:
        return randn_tensor(self._shape, self.encoding, self._device, self._dtype)

    def base_again(self) -> Tensor:
        return randn_tensor(self._base_shape, _moved_on(self._base_seeds), self._device)


def _copied(generator: Generators) -> Generators:
    if isinstance(generator, list):
        return [_copy_of(one) for one in generator]
    return None if generator is None else _copy_of(generator)


def _copy_of(generator: torch.Generator) -> torch.Generator:
    copy = torch.Generator(generator.device)
    copy.set_state(generator.get_state())
    return copy


def _moved_on(generator: Generators) -> Generators:
    """The same for each call with generators in the same state, and other numbers than theirs."""
    if isinstance(generator, list):
        return [_moved(one) for one in generator]
    return None if generator is None else _moved(generator)


def _moved(generator: torch.Generator) -> torch.Generator:
    drawn = torch.randint(2**62, (1,), generator=_copy_of(generator), device=generator.device)
    return torch.Generator(generator.device).manual_seed((int(drawn) + BASE_NOISE_SEED) % 2**63)


class XAdapterPipeline:
    """Two-stage inference (Ran et al., arXiv 2312.02238) with two pipelines of diffusers.

    Args:
        base: any text-to-image pipeline of SD1.5 or SD2, with its plugins: LoRAs, ControlNets, IP-Adapter, …
        upgraded: any text-to-image pipeline of SDXL.
        adapter: mapping layers or their file; None for the SDEdit + SDXL baseline.
        rules: where the paper leaves a choice; diffusers' own habits unless said otherwise.
        placement: where the models run; None for where the upgraded pipeline is.
        progress: base_prompts of every step, beside the pipelines' own bars.

    Raises:
        DoesNotFit: the mapping layers were made for other models, or a pipeline is of another kind.
        WrongFile: the file holds no mapping layers.
    """

    def __init__(
        self,
        base: Any,
        upgraded: Any,
        adapter: MappingLayers | str | Path | None,
        *,
        rules: Rules = DIFFUSERS_RULES,
        placement: Placement | None = None,
        progress: Progress = no_progress,
    ) -> None:
        check_pipeline(base, "base")
        check_pipeline(upgraded, "upgraded")
        if isinstance(adapter, (str, Path)):
            adapter = load_adapter(adapter, dtype=upgraded.unet.dtype)
        self.base = base
        self.upgraded = upgraded
        self.adapter = adapter
        self._rules = rules
        self._placement = placement
        self._progress = progress
        self._interruption = Interruption()
        Models(base, upgraded, adapter).check()

    # --- files --------------------------------------------------------------------------------------------------------

    @classmethod
    def from_single_file(
        cls,
        *,
        base: str | Path,
        upgraded: str | Path,
        adapter: str | Path | None,
        torch_dtype: torch.dtype = torch.float32,
        tokenizer: str | Path | None = None,
    ) -> XAdapterPipeline:
        """From checkpoints as the WebUI keeps them; nothing is fetched, and the VAEs stay in float32.

        Args:
            base, upgraded, adapter: the files, or folders of diffusers.
            torch_dtype: of UNets and text encoders.
            tokenizer: a folder with CLIP's vocabulary; None looks into the installed packages.
        """
        vocabulary = Path(tokenizer) if tokenizer is not None else None
        return cls(
            load_base(Path(base), torch_dtype, vocabulary),
            load_upgraded(Path(upgraded), torch_dtype, vocabulary),
            adapter,
        )

    @classmethod
    def from_pretrained(
        cls, *, base: str | Path, upgraded: str | Path, adapter: str | Path | None, **options: Any
    ) -> XAdapterPipeline:
        """From folders or names on the Hub, by diffusers' `from_pretrained`, which gets the options.

        Args:
            adapter: a file, or a folder that `save_pretrained` wrote.
        """
        if adapter is not None and Path(adapter).is_dir():
            adapter = Path(adapter) / ADAPTER_FILE
        return cls(
            StableDiffusionPipeline.from_pretrained(base, **options),
            StableDiffusionXLPipeline.from_pretrained(upgraded, **options),
            adapter,
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the mapping layers into a folder; the two pipelines have a `save_pretrained` of their own."""
        if self.adapter is None:
            raise WrongArgument("There is no adapter to be saved.")
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_adapter(self.adapter, Path(folder) / ADAPTER_FILE)

    # --- habits of diffusers ------------------------------------------------------------------------------------------

    def to(self, *arguments: Any, **named: Any) -> XAdapterPipeline:
        """Both pipelines and the mapping layers, as `DiffusionPipeline.to`."""
        for part in (self.base, self.upgraded, self.adapter):
            if part is not None:
                part.to(*arguments, **named)
        return self

    @property
    def device(self) -> torch.device:
        """Where the upgraded pipeline runs."""
        return self.upgraded._execution_device

    def set_progress_bar_config(self, **options: Any) -> None:
        """Of both pipelines."""
        for pipeline in (self.base, self.upgraded):
            pipeline.set_progress_bar_config(**options)

    @property
    def interrupt(self) -> bool:
        """Whether the picture under way is to end after the current step; to be set from a callback or a thread."""
        return self._interruption.asked

    @interrupt.setter
    def interrupt(self, asked: bool) -> None:
        self._interruption.asked = asked

    _interrupt = interrupt
    """Under the name by which diffusers' callbacks ask for it."""

    # --- a call -------------------------------------------------------------------------------------------------------

    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        *,
        base_prompt: str | list[str] | None = None,
        base_negative_prompt: str | list[str] | None = None,
        image: Any = None,
        mask_image: Any = None,
        strength: float = 0.8,
        img2img_start: str = PICTURE,
        control_image: Any = None,
        ip_adapter_image: Any = None,
        height: int | None = None,
        width: int | None = None,
        base_height: int = 0,
        base_width: int = 0,
        num_inference_steps: int = 50,
        base_num_inference_steps: int = 0,
        guidance_scale: float = 5.0,
        base_guidance_scale: float | None = None,
        switch_point: float = 0.8,
        weight: float | Sequence[float] = 1.0,
        guidance_start: float = 0.0,
        guidance_end: float = 1.0,
        refresh_every: int = 1,
        cond_only: bool = False,
        uncond_weight: float = 1.0,
        single_stage: bool = False,
        memory: str = AUTO,
        num_images_per_prompt: int = 1,
        generator: Generators = None,
        base_generator: Generators = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        base_prompt_embeds: Tensor | None = None,
        base_negative_prompt_embeds: Tensor | None = None,
        base_arguments: Mapping[str, Any] | None = None,
        upgraded_arguments: Mapping[str, Any] | None = None,
        base_side: BaseSide | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        output_type: str = "pil",
        return_dict: bool = True,
        return_base_images: bool = False,
    ) -> XAdapterPipelineOutput | tuple[Any]:
        """Pictures of SDXL that follow the base and its plugins.

        What stands here under a name of diffusers means what it means there, for the upgraded pipeline; `base_…` is for
        the base, and is the upgraded one's where it is not given.

        Args:
            image: in image-to-image and inpainting, the picture that is painted over.
            mask_image: in inpainting, white where something new is painted; elsewhere both models keep the picture.
            strength: how much is painted anew over the given picture.
            img2img_start: "picture": both models paint over the given picture, from `strength` on; "base": the base
                alone does, with that strength, and SDXL paints over what it made, from the switch point on.
            control_image: for the base's ControlNets or T2I-Adapters.
            ip_adapter_image: for the base's IP-Adapter.
            height, width, base_height, base_width: in pixels, multiples of 8; the base's are half of the others'.
            switch_point: how much SDXL paints anew over the base's picture, 0 to 1.
            weight: how strongly SDXL follows the base; one number, or three from coarse to fine.
            guidance_start, guidance_end: the part of the joint stage in which the adapter acts.
            refresh_every: the base runs at every n-th joint step.
            cond_only: map the prompt's half alone.
            uncond_weight: share of the weight that the negative prompt's half gets, 0 to 1.
            single_stage: no picture of the base first: both models start from noise.
            memory: "lockstep", "recorded", or "auto": whichever fits.
            generator, base_generator: one, or a list with one an image; the base's is in the same state as the other
                where it is not given.
            base_arguments, upgraded_arguments: whatever else each pipeline's own call takes.
            base_side: of an earlier call's output, where nothing changes on the base's side.
            callback_on_step_end: called after each joint step, with this pipeline first; it may set `_interrupt`.
            output_type: "pil", "np", "pt" or "latent".
            return_base_images: also give the base's own pictures.

        Raises:
            WrongArgument: naming the argument that is out of range or does not go with another.
            DoesNotFit: a scheduler that the base cannot follow.
        """
        settings = read_settings(
            {
                "switch_point": switch_point,
                "weight": weight if isinstance(weight, (int, float)) else list(weight),
                "base_width": base_width,
                "base_height": base_height,
                "base_steps": base_num_inference_steps,
                "base_cfg_scale": base_guidance_scale or 0.0,
                "guidance_start": guidance_start,
                "guidance_end": guidance_end,
                "refresh_every": refresh_every,
                "cond_only": cond_only,
                "uncond_weight": uncond_weight,
                "single_stage": single_stage,
                "memory": memory,
                "img2img_start": img2img_start,
            }
        )
        painted = _painted(image, mask_image, strength, settings)
        size = self._size(width, height, painted)
        base_size = (base_width or half(size[0]), base_height or half(size[1]))
        images = num_images_per_prompt * _batch(prompt, prompt_embeds)
        base_guidance = guidance_scale if base_guidance_scale is None else base_guidance_scale
        if guidance_scale > 1:
            # SDXL's unconds need unconds of the base to follow
            base_guidance = max(base_guidance, SMALLEST_GUIDANCE)
        upgraded = {
            "prompt": prompt,
            "negative_prompt": negative_prompt,
            "prompt_embeds": prompt_embeds,
            "negative_prompt_embeds": negative_prompt_embeds,
            "pooled_prompt_embeds": pooled_prompt_embeds,
            "negative_pooled_prompt_embeds": negative_pooled_prompt_embeds,
            "guidance_scale": guidance_scale,
            "num_images_per_prompt": num_images_per_prompt,
            **_sized(size),
            **self._callback(callback_on_step_end, callback_on_step_end_tensor_inputs),
            **(upgraded_arguments or {}),
        }
        base = {
            **_base_prompts(
                base_prompt if base_prompt is not None else prompt,
                base_negative_prompt if base_negative_prompt is not None else negative_prompt,
                base_prompt_embeds,
                base_negative_prompt_embeds,
                images // num_images_per_prompt,
            ),
            "image": control_image,
            "ip_adapter_image": ip_adapter_image,
            "guidance_scale": base_guidance,
            "num_images_per_prompt": num_images_per_prompt,
            **_sized(base_size),
            **(base_arguments or {}),
        }
        shape, base_shape = (
            (images, 4, tall // LATENT_PIXEL, wide // LATENT_PIXEL) for wide, tall in (size, base_size)
        )
        request = Request(
            base={name: value for name, value in base.items() if value is not None},
            upgraded={name: value for name, value in upgraded.items() if value is not None},
            settings=settings,
            steps=num_inference_steps,
            noise=DrawnNoise(
                shape,
                base_shape,
                generator,
                base_generator,
                self.device,
                self.upgraded.unet.dtype,
                self.base.unet.dtype,
            ),
            images=images,
            size=size,
            base_size=base_size,
            painted=painted,
        )
        made = self.run(request, base_side, output_type, return_base_images)
        return made if return_dict else (made.images,)

    def run(
        self,
        request: Request,
        base_side: BaseSide | None = None,
        output_type: str = "pil",
        return_base_images: bool = False,
    ) -> XAdapterPipelineOutput:
        """What is asked for as data; arguments and errors as in a call.

        Args:
            request: of one batch.
            base_side: of an earlier one with the same base, prompts and noise.
        """
        for name in PIPELINES:
            pipeline = getattr(self, name)
            check_unet(pipeline.unet, name)
            if not self._rules.precise:
                check_scheduler(pipeline.scheduler)
        self._interruption.asked = False
        models, request = self._placed(request)
        with where_they_were(models), attention_as_it_was(models):
            stages = TwoStages(models, self._rules, self._progress, self._interruption)
            if base_side is None:
                base_side = BaseSide(None if request.settings.single_stage else stages.base_latents(request))
            return self._finished(stages, request, base_side, output_type, return_base_images)

    def _finished(
        self, stages: TwoStages, request: Request, side: BaseSide, output_type: str, return_base_images: bool
    ) -> XAdapterPipelineOutput:
        steps = stages.joint_steps_of(request)
        start = stages.start(request, side.latents, steps)
        decodes = self._rules.precise and output_type == "pil"
        images = stages.joint_stage(
            request,
            side.latents,
            start,
            steps,
            recordings=side.recordings,
            output_type="latent" if decodes else output_type,
        )
        if decodes:
            images = stages.upgraded_pictures(images)
        pictures = None
        if return_base_images and request.has_stage_one and side.latents is not None:
            pictures = stages.base_pictures(side.latents)
        return XAdapterPipelineOutput(images=images, base_side=side, base_images=pictures)

    def _placed(self, request: Request) -> tuple[Models, Request]:
        """The models where they run, and how the base runs beside them."""
        placement = self._placement or Placement(str(self.device), self.upgraded.unet.dtype)
        memory = request.settings.memory
        if memory == AUTO and (self._offloads or placement.low_memory):
            memory = RECORDED
        elif memory == AUTO and torch.device(placement.device).type != "cuda":
            memory = LOCKSTEP
        models = Models(self.base, self.upgraded, self.adapter, placement)
        work = TwoStages(models, self._rules).work(request)
        models = models.share_the_device(memory, work)
        if memory == AUTO and models.placement.low_memory:
            memory = RECORDED
        return models, replace(request, settings=replace(request.settings, memory=memory))

    @property
    def _offloads(self) -> bool:
        return all(moves_by_itself(pipeline.unet) for pipeline in (self.base, self.upgraded))

    def _callback(self, callback: StepCallback | None, tensors: Sequence[str]) -> dict[str, Any]:
        if callback is None:
            return {}

        def with_this_pipeline(pipeline: Any, step: int, timestep: Tensor, given: dict[str, Any]) -> dict[str, Any]:
            returned = callback(self, step, timestep, given)
            if self._interruption.asked:
                pipeline._interrupt = True
            return returned if returned is not None else {}

        return {
            "callback_on_step_end": with_this_pipeline,
            "callback_on_step_end_tensor_inputs": list(tensors),
        }

    def _size(self, width: int | None, height: int | None, painted: Painted | None) -> tuple[int, int]:
        if painted is not None and (width is None or height is None):
            wide, tall = painted.size
            width, height = width or wide // LATENT_PIXEL * LATENT_PIXEL, height or tall // LATENT_PIXEL * LATENT_PIXEL
        # not every pipeline of SDXL tells its usual size, and its UNet need not either
        usual = (self.upgraded.unet.config.sample_size or USUAL_LATENT) * self.upgraded.vae_scale_factor
        size = width or usual, height or usual
        for name, value in zip(("width", "height"), size, strict=True):
            if value % LATENT_PIXEL:
                raise WrongArgument(f"'{name}' is {value}, expected a multiple of {LATENT_PIXEL}.")
        return size


def _painted(image: Any, mask: Any, strength: float, settings: Settings) -> Painted | None:
    if image is None:
        if mask is not None:
            raise WrongArgument("'mask_image' is given, but there is no 'image' that it belongs to.")
        if settings.img2img_start != PICTURE:
            raise WrongArgument(f"'img2img_start' is '{settings.img2img_start}', but there is no 'image'.")
        return None
    if settings.single_stage:
        raise WrongArgument("'image' is given, but a single stage starts from noise.")
    if not 0 < strength <= 1:
        raise WrongArgument(f"'strength' is {strength:g}, expected a number above 0, up to 1.")
    return Painted(image, strength, mask)


def _batch(prompt: str | list[str] | None, embeds: Tensor | None) -> int:
    if prompt is None and embeds is None:
        raise WrongArgument("'prompt' is missing, and so is 'prompt_embeds'.")
    if embeds is not None:
        return len(embeds)
    return 1 if isinstance(prompt, str) else len(prompt or ())


def _base_prompts(
    prompt: str | list[str] | None,
    negative_prompt: str | list[str] | None,
    embeds: Tensor | None,
    negative_embeds: Tensor | None,
    prompts: int,
) -> dict[str, Any]:
    if embeds is None and prompt is None:
        raise WrongArgument("'base_prompt' is missing, and so is 'base_prompt_embeds'.")
    found = {
        "prompt": prompt if embeds is None else None,
        "negative_prompt": negative_prompt if negative_embeds is None else None,
        "prompt_embeds": embeds,
        "negative_prompt_embeds": negative_embeds,
    }
    several = {name: [text] * prompts if isinstance(text, str) else text for name, text in found.items()}
    pictures_of_base = len(embeds) if embeds is not None else len(several["prompt"] or ())
    if pictures_of_base != prompts:
        raise WrongArgument(f"'base_prompt' is for {pictures_of_base} pictures, 'prompt' for {prompts}.")
    return several


def _sized(size: tuple[int, int]) -> dict[str, int]:
    return {"width": size[0], "height": size[1]}


def check_pipeline(pipeline: Any, name: str) -> None:
    """Whether a pipeline can take this part.

    Raises:
        DoesNotFit: naming it and what was expected.
    """
    kind, known = type(pipeline).__name__, inspect.signature(pipeline.__call__).parameters
    if not hasattr(pipeline, "unet") or "latents" not in known or "strength" in known:
        raise DoesNotFit(
            f"'{name}' is a {kind}, expected a text-to-image pipeline of "
            f"{'SD1.5 or SD2' if name == 'base' else 'SDXL'}, such as {PIPELINES[name]}."
        )
    channels = pipeline.unet.config.in_channels
    if channels not in TAKEN_CHANNELS:
        raise DoesNotFit(f"The UNet of '{name}' takes {channels} channels, expected 4, or 9 of an inpainting model.")
    is_sdxl = hasattr(pipeline, "text_encoder_2")
    if is_sdxl != (name == "upgraded"):
        raise DoesNotFit(f"'{name}' is a {kind}, expected a pipeline such as {PIPELINES[name]}.")


def check_unet(unet: Any, name: str) -> None:
    """Whether hooks of ours would be called: torch.compile leaves out those that come after it.

    Raises:
        DoesNotFit: naming the pipeline.
    """
    if isinstance(unet, torch.nn.Module) and (hasattr(unet, "_orig_mod") or unet._compiled_call_impl is not None):
        raise DoesNotFit(
            f"The UNet of '{name}' is compiled as a whole, which leaves no way in for X-Adapter; "
            "'unet.compile_repeated_blocks()' does."
        )


TAKEN_CHANNELS = (4, 9)
PIPELINES = {"base": "StableDiffusionPipeline", "upgraded": "StableDiffusionXLPipeline"}


@contextmanager
def attention_as_it_was(models: Models) -> Iterator[None]:
    """After it, both UNets have the attention processors that they had before: a pipeline that changes them while its
    loop lasts, as perturbed attention does, leaves them where the loop is ended early."""
    unets = [pipeline.unet for pipeline in (models.base, models.upgraded) if hasattr(pipeline.unet, "attn_processors")]
    before = [dict(unet.attn_processors) for unet in unets]
    try:
        yield
    finally:
        for unet, processors in zip(unets, before, strict=True):
            now = unet.attn_processors
            if any(now.get(name) is not processor for name, processor in processors.items()):
                unet.set_attn_processor(dict(processors))


@contextmanager
def where_they_were(models: Models) -> Iterator[None]:
    """After it, the parts at work are on the devices that they were on before, as far as we move them."""
    parts = [*parts_at_work(models.base), *parts_at_work(models.upgraded)]
    parts += [pipeline.vae for pipeline in (models.base, models.upgraded) if pipeline.vae is not None]
    before = [(part, device_of(part)) for part in parts if not moves_by_itself(part)]
    try:
        yield
    finally:
        for part, device in before:
            if device_of(part) != device:
                part.to(device)
