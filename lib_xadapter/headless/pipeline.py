"""The two stages on diffusers: the base's picture, the switch, the joint stage, each by a pipeline's own loop.

Nothing of a pipeline is replaced but its scheduler, for the time of a call; so whatever else it carries takes part.
Source: paper, "Inference strategy"; released code, `pipeline/pipeline_sd_xl_adapter_controlnet.py`.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from ..errors import XAdapterError
from ..evaluations import Evaluation, GuidanceWindow, distinct_levels
from ..feature_sources import BaseDenoiser, BaseStep
from ..joint_stage import Coupling, JointStage
from ..mapping_choice import choose_mapping_path
from ..mapping_paths import MappingPath
from ..memory import Work, decoding_memory
from ..overlap import SideStream
from ..recording import LeastRecentlyUsed
from ..settings import AUTO, BASE, BASE_NOISE_SEED, RECORDED, START_STRENGTH, Settings
from ..taps import Taps, read_features
from ..two_stage import BaseCache, CachedStageOne, Pass, StageOne, run
from ..wrapping import wrapped
from .base_steps import BaseSteps
from .conditioning import Conditioning, conditioned
from .inpainting import LATENT_CHANNELS, inpainting_channels
from .job import LATENT_PIXEL
from .mask_blending import BlendBeforeUNet, BlendNoised, BlendPrediction, MaskBlending
from .models import Models, noise_schedule_of, parts_at_work
from .paused_call import PausedCall, paused_call
from .pictures import (
    Generators,
    Given,
    Painted,
    as_pictures,
    encoded,
    given_to_inpaint,
    to_latents,
    to_pictures,
)
from .sampler_table import sampler_named
from .samplers import StepRule, Steps, diffusers_steps, released_steps, webui_steps
from .schedulers import FollowedLevels, GivenSteps, Question, guidance_rows, scheduled

logger = logging.getLogger(__name__)

SOLVER_ORDER = 2

NOT_FINITE = (
    "The latents of the {} model are no longer finite: a type with more range (bfloat16 or float32), or other plugins "
    "may help."
)


@dataclass(frozen=True)
class Rules:
    """Where the paper leaves a choice.

    Attributes:
        steps: which steps are taken.
        resample: how the base's picture is brought to the upgraded size.
        to_whole: how a picture's values become whole grey levels.
        base_follows_sampler: whether the base steps in the joint stage by the sampler's own order.
        precise: keep latents in float32 between the steps, whatever the UNets take.
    """

    steps: StepRule = webui_steps
    resample: Image.Resampling = Image.Resampling.LANCZOS
    to_whole: Callable[[Tensor], Tensor] = torch.floor
    base_follows_sampler: bool = False
    precise: bool = True


WEBUI_RULES = Rules()
RELEASED_RULES = Rules(released_steps, Image.Resampling.BICUBIC, torch.round, base_follows_sampler=True)
DIFFUSERS_RULES = Rules(diffusers_steps, to_whole=torch.round, precise=False)
"""With the pipelines' own schedulers, and the steps and pictures of diffusers' own image-to-image pipelines."""


@dataclass(frozen=True)
class Noise:
    """All the randomness of one image, each kind from a generator of its own, so that batches do not matter.

    Attributes:
        base, upgraded: what the models start from, (4, h, w).
        base_again: what the base starts from in the joint stage, over its finished latent or alone, (4, h, w).
        base_steps, upgraded_steps: generators for samplers that add noise.
        encoding, base_encoding: generators for the upgraded VAE and the base's.
    """

    base: Tensor
    upgraded: Tensor
    base_again: Tensor
    base_steps: torch.Generator
    upgraded_steps: torch.Generator
    encoding: torch.Generator
    base_encoding: torch.Generator

    @classmethod
    def seeded(cls, seed: int, base_seed: int, base_size: tuple[int, int], upgraded_size: tuple[int, int]) -> Noise:
        """All noise of an image whose models have these seeds; sizes are (height, width) in latent pixels."""
        # as in the WebUI, samplers that add noise go on where the first noise came from
        base_steps, upgraded_steps = _generator(base_seed), _generator(seed)
        return cls(
            _standard_normal(base_steps, base_size),
            _standard_normal(upgraded_steps, upgraded_size),
            _standard_normal(_generator(base_seed + BASE_NOISE_SEED), base_size),
            base_steps,
            upgraded_steps,
            _generator(seed),
            _generator(base_seed),
        )


def _generator(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def _standard_normal(generator: torch.Generator, size: tuple[int, int]) -> Tensor:
    return torch.randn(4, *size, generator=generator)


class NoiseSource(Protocol):
    """Where a batch's random numbers come from."""

    base_steps: Generators
    upgraded_steps: Generators
    encoding: Generators
    base_encoding: Generators

    def base(self) -> Tensor:
        """What the base starts from, (images, 4, h, w)."""

    def upgraded(self) -> Tensor:
        """What the upgraded model starts from, drawn after its pictures are encoded."""

    def base_again(self) -> Tensor:
        """What the base starts from in the joint stage."""


class NoisePerImage:
    """A `NoiseSource` of each image's own `Noise`."""

    def __init__(self, noises: Sequence[Noise]) -> None:
        self.noises = tuple(noises)
        self.base_steps = [noise.base_steps for noise in noises]
        self.upgraded_steps = [noise.upgraded_steps for noise in noises]
        self.encoding = [noise.encoding for noise in noises]
        self.base_encoding = [noise.base_encoding for noise in noises]

    def base(self) -> Tensor:
        return torch.stack([noise.base for noise in self.noises])

    def upgraded(self) -> Tensor:
        return torch.stack([noise.upgraded for noise in self.noises])

    def base_again(self) -> Tensor:
        return torch.stack([noise.base_again for noise in self.noises])


@dataclass(frozen=True)
class Request:
    """One batch of pictures; sizes in pixels, 0 in `settings` already replaced.

    Attributes:
        base, upgraded: arguments of each pipeline's own call: prompts, guidance, images of its plugins, …
        settings: as in the WebUI.
        steps: of the upgraded model; the base's own are in `settings`.
        noise: where the random numbers come from.
        images: at once.
        size, base_size: (width, height) of the pictures.
        sampler: the WebUI's name of one; None for the pipelines' own.
        start: what the base paints over, at its size; None for noise.
        painted: a picture to be painted over; None where the base paints from noise or `start`.
        base_conditioning, upgraded_conditioning: prompts that change on the way or are combined, in the place of
            those of the calls.
    """

    base: Mapping[str, Any]
    upgraded: Mapping[str, Any]
    settings: Settings
    steps: int
    noise: NoiseSource
    images: int
    size: tuple[int, int]
    base_size: tuple[int, int]
    sampler: str | None = None
    start: Image.Image | None = None
    painted: Painted | None = None
    base_conditioning: Conditioning | None = None
    upgraded_conditioning: Conditioning | None = None

    @property
    def base_steps(self) -> int:
        return self.settings.base_steps or self.steps

    @property
    def base_paints_over(self) -> bool:
        """Whether the base paints over the given picture first; else that takes the place of the base's own."""
        return self.painted is not None and self.settings.img2img_start == BASE

    @property
    def has_stage_one(self) -> bool:
        """Whether the base samples alone first."""
        return not self.settings.single_stage and (self.painted is None or self.base_paints_over)

    @property
    def base_strength(self) -> float | None:
        """How much of a picture the base paints anew in stage 1; None for all of it, from noise."""
        if self.base_paints_over:
            return self.painted.strength
        return None if self.start is None else START_STRENGTH

    @property
    def strength(self) -> float | None:
        """How much of the picture the upgraded model paints anew; None for all of it, from noise."""
        if self.settings.single_stage:
            return None
        return self.settings.switch_point if self.has_stage_one else self.painted.strength


Recordings = BaseCache

Progress = Callable[[str, int, int], None]
"""(what is under way, steps done, steps in all) → None; called before each step and after the last."""


def no_progress(stage: str, done: int, total: int) -> None:
    """For those who do not look."""


@dataclass(frozen=True)
class Start:
    """Where the upgraded model begins.

    Attributes:
        latents: at the noise level of the first step, (images, 4, h, w).
        blending: what inpainting keeps of the picture.
        channels: more channels of the UNet's input, for inpainting models.
    """

    latents: Tensor
    blending: MaskBlending | None = None
    channels: Tensor | None = None


@dataclass(frozen=True)
class Side:
    """One of the two models, as a picture is handed to it.

    Attributes:
        pipeline: the model's.
        size: (width, height) of its pictures.
        encoding: generators for its VAE.
        draw: noise, (images, 4, h, w).
    """

    pipeline: Any
    size: tuple[int, int]
    encoding: Generators
    draw: Callable[[], Tensor]


@dataclass
class Interruption:
    """Whether somebody wants no more of a picture."""

    asked: bool = False


class TwoStages:
    """Makes pictures with a set of models.

    Args:
        models: loaded, on the CPU or where they run.
        rules: where the paper leaves a choice.
        progress: called at every step.
        interruption: asked between steps.
    """

    def __init__(
        self,
        models: Models,
        rules: Rules = WEBUI_RULES,
        progress: Progress = no_progress,
        interruption: Interruption | None = None,
    ) -> None:
        models.check()
        self.models = models
        self.placement = models.placement
        self.rules = rules
        self.progress = progress
        self.interruption = interruption or Interruption()

    @property
    def _device(self) -> str | torch.device:
        return self.placement.device

    @torch.no_grad()
    def base_latents(self, request: Request) -> Tensor:
        """Stage 1: the base's finished latents, (images, 4, h, w)."""
        if not request.has_stage_one:
            side = self._base_side(request)
            return self._encoded(request, side, request.painted.image)
        steps = self._steps(request, self.models.base, request.base_steps, request.base_strength)
        start, conditioning = self._base_start(request, steps), request.base_conditioning
        return self.call(
            self.models.base, request.base, steps, start, request.noise.base_steps, "base", conditioning
        ).images

    def base_steps_of(self, request: Request) -> BaseSteps:
        """What prompts that change and windows of ControlNets are counted in."""
        if not request.has_stage_one and request.painted is not None:
            return BaseSteps(len(self.joint_steps_of(request).timesteps))
        base = self.models.base
        timesteps = self._steps(request, base, request.base_steps, request.base_strength).timesteps.tolist()
        if not request.has_stage_one:
            return BaseSteps(len(timesteps))
        schedule = noise_schedule_of(base)
        return BaseSteps(len(timesteps), tuple(schedule.sigma_at(timestep) for timestep in timesteps))

    def _base_start(self, request: Request, steps: Steps) -> Start:
        """Noise, or the picture to start from with noise over it."""
        side = self._base_side(request)
        if request.base_paints_over:
            return self._over_picture(request, side, steps)
        noise, channels = self._here(side.draw()), self._channels(request, side)
        if request.start is None:
            return Start(steps.from_noise(noise), channels=channels)
        return Start(steps.noised(self._encoded(request, side, request.start), noise), channels=channels)

    def _base_side(self, request: Request) -> Side:
        return Side(self.models.base, request.base_size, request.noise.base_encoding, request.noise.base)

    def _upgraded_side(self, request: Request) -> Side:
        return Side(self.models.upgraded, request.size, request.noise.encoding, request.noise.upgraded)

    # --- pictures given -----------------------------------------------------------------------------------------------

    def _over_picture(
        self, request: Request, side: Side, steps: Steps, instead: Callable[[], Tensor] | None = None
    ) -> Start:
        """From a given picture; `instead` makes clean latents that take its place where a mask is white."""
        given = self._given(request, side)
        clean = given.clean if instead is None else MaskBlending(given.clean, given.mask).over(instead())
        latents = steps.noised(clean, given.noise)
        if given.mask is not None and not self.rules.precise and instead is None and request.painted.strength == 1:
            # diffusers' inpainting pipelines, and they alone, leave nothing of the picture then
            latents = steps.from_noise(given.noise)
        return Start(latents, self._blending(request, side, given), given.channels if takes_channels(side) else None)

    def _given(self, request: Request, side: Side) -> Given:
        painted, images = request.painted, request.images
        if not self.rules.precise and painted.mask is not None:
            with self.placement.holding(side.pipeline.vae):
                return given_to_inpaint(side.pipeline, painted, side.encoding, side.draw, images, side.size)
        clean = self._encoded(request, side, painted.image)
        mask = None if painted.mask is None else self._here(painted.latent_mask(side.size, images))
        return Given(clean, self._here(side.draw()).to(clean), mask, self._channels(request, side))

    def _blending(self, request: Request, side: Side, given: Given) -> MaskBlending | None:
        if given.mask is None:
            return None
        if not self.rules.precise:
            # diffusers tells inpainting models by their channels alone
            return None if takes_channels(side) else BlendNoised(given.clean, given.mask, given.noise)
        if request.sampler is not None and sampler_named(request.sampler).on_timesteps:
            return BlendBeforeUNet(given.clean, given.mask)
        schedule, predicts = noise_schedule_of(side.pipeline), prediction_type(side.pipeline)
        return BlendPrediction(given.clean, given.mask, schedule, predicts)

    def base_blending(self, request: Request, finished: Tensor | None) -> MaskBlending | None:
        """What the base keeps of a given picture in the joint stage: its latents there are those of the picture."""
        if request.painted is None or request.painted.mask is None or finished is None:
            return None
        mask = request.painted.latent_mask(request.base_size, request.images)
        return MaskBlending(self._here(finished).float(), self._here(mask))

    def base_channels(self, request: Request) -> Tensor | None:
        """The channels that an inpainting model as base gets beside its latent; None for other models."""
        return self._channels(request, self._base_side(request))

    def _channels(self, request: Request, side: Side) -> Tensor | None:
        """The channels that an inpainting model gets beside its latent; None for other models."""
        with self.placement.holding(side.pipeline.vae):
            return inpainting_channels(side.pipeline, request.painted, request.images, side.size, self._device)

    def _encoded(self, request: Request, side: Side, pictures: Any) -> Tensor:
        """Clean latents of pictures, one an image, at a model's size."""
        vae = side.pipeline.vae
        with self.placement.holding(vae):
            if not self.rules.precise and side.pipeline is self.models.upgraded:
                return encoded(side.pipeline, pictures, side.encoding, request.images, side.size)
            found = as_pictures(pictures, request.images)
            sized = [picture.resize(side.size, self.rules.resample) for picture in found]
            return to_latents(vae, sized, side.encoding, self._device)

    def base_pictures(self, latents: Tensor) -> list[Image.Image]:
        """The base's pictures, in 8 bits."""
        return self._decoded(self.models.base, latents)

    def upgraded_latents(
        self,
        request: Request,
        finished: Tensor | None,
        recordings: Recordings | None = None,
    ) -> Tensor:
        """The switch and stage 2: the upgraded model's finished latents.

        Args:
            request: as for stage 1.
            finished: the base's finished latents, None for a single stage from noise.
            recordings: those of the same base side, by switch point.
        """
        steps = self.joint_steps_of(request)
        return self.joint_stage(request, finished, self.start(request, finished, steps), steps, recordings=recordings)

    def upgraded_pictures(self, latents: Tensor) -> list[Image.Image]:
        """The upgraded model's pictures, in 8 bits."""
        return self._decoded(self.models.upgraded, latents)

    def joint_steps_of(self, request: Request) -> Steps:
        """The steps of the joint stage."""
        return self._steps(request, self.models.upgraded, request.steps, request.strength)

    @torch.no_grad()
    def start(self, request: Request, finished: Tensor | None, steps: Steps) -> Start:
        """The switch: what the joint stage starts from."""
        side = self._upgraded_side(request)
        if finished is None and request.painted is None:
            return Start(steps.from_noise(self._here(side.draw())), channels=self._channels(request, side))
        if request.painted is not None and not request.base_paints_over:
            return self._over_picture(request, side, steps)
        if request.painted is not None and request.painted.mask is not None:
            return self._over_picture(request, side, steps, lambda: self.carried_over(finished, request))
        clean = self.carried_over(finished, request)
        noise = self._here(side.draw()).to(clean)
        return Start(steps.noised(clean, noise), channels=self._channels(request, side))

    def carried_over(self, finished: Tensor, request: Request) -> Tensor:
        """The base's pictures, resized, as clean latents of the upgraded model."""
        return self._encoded(request, self._upgraded_side(request), self.base_pictures(finished))

    @torch.no_grad()
    def joint_stage(
        self,
        request: Request,
        finished: Tensor | None,
        start: Start | Tensor,
        steps: Steps,
        each_step: Callable[[Tensor], None] | None = None,
        recordings: Recordings | None = None,
        output_type: str = "latent",
    ) -> Any:
        """Stage 2 from noised latents of the upgraded model.

        Args:
            request: prompts, guidance and settings.
            finished: the base's finished latents, None for a single stage from noise.
            start: what it begins with, or its latents alone.
            steps: the joint ones.
            each_step: is given the upgraded latents after every step.
            recordings: those of the same base side, by switch point.
            output_type: as diffusers' pipelines take it.

        Returns:
            What the upgraded pipeline gives as images: latents, unless `output_type` says otherwise.
        """
        start = start if isinstance(start, Start) else Start(start)
        host = DiffusersHost(self, request, finished, start, steps, each_step, output_type)
        return run(
            host, self.plan(request, steps), recordings if recordings is not None else LeastRecentlyUsed(lambda: 0)
        )

    def plan(self, request: Request, steps: Steps) -> Pass:
        settings = request.settings
        coupling = None
        if self.models.adapter is not None and any(settings.weights):
            coupling = Coupling.from_settings(self._mapping, settings)
        follows = self.rules.base_follows_sampler and request.sampler is not None
        return Pass(
            coupling,
            tuple(self.evaluations(steps)),
            recorded=coupling is not None and settings.memory == RECORDED,
            may_record=settings.memory == AUTO,
            key=request.strength if request.strength is not None else "single stage",
            solver_order=sampler_named(request.sampler).order if follows else SOLVER_ORDER,
        )

    @functools.cached_property
    def _mapping(self) -> MappingPath:
        """How the mapping layers run, which depends on where they are then."""
        with self.placement.holding(self.models.adapter):
            return choose_mapping_path(self.models.adapter, self.placement.mapping)

    @functools.cached_property
    def side_stream(self) -> SideStream | None:
        """Where the base runs beside the upgraded model, on a GPU."""
        device = torch.device(self._device)
        return SideStream(device) if device.type == "cuda" else None

    def evaluations(self, steps: Steps) -> list[Evaluation]:
        """The model evaluations of the joint stage."""
        schedule, count = noise_schedule_of(self.models.upgraded), len(steps.timesteps)
        return [
            Evaluation(schedule.sigma_at(timestep), place // steps.scheduler.order, place / count)
            for place, timestep in enumerate(steps.timesteps.tolist())
        ]

    def call(
        self,
        pipeline: Any,
        arguments: Mapping[str, Any],
        steps: Steps,
        start: Start,
        generator: list[torch.Generator] | torch.Generator | None,
        stage: str,
        conditioning: Conditioning | None = None,
        each_step: Callable[[Tensor], None] | None = None,
        output_type: str = "latent",
    ) -> Any:
        """A pipeline's own call, from given latents through given steps."""
        total = len(steps.timesteps)
        self.progress(stage, 0, total)

        def stepped(place: int, latents: Tensor) -> None:
            self.progress(stage, place + 1, total)
            if self.interruption.asked:
                pipeline._interrupt = True
            if each_step is not None:
                each_step(latents)
            if place + 1 == total and not bool(torch.isfinite(latents).all()):
                raise XAdapterError(NOT_FINITE.format(stage))

        dtype = pipeline.unet.dtype
        scheduler = GivenSteps(steps, dtype, self.rules.precise, start.blending, start.channels, stepped)
        latents = start.latents if self.rules.precise else start.latents.to(dtype)
        with (
            self.placement.holding(*parts_at_work(pipeline)),
            scheduled(pipeline, scheduler),
            conditioned(pipeline, conditioning, lambda: scheduler.place, len(latents)),
            freed_on_failure(pipeline),
        ):
            return pipeline(
                **arguments,
                latents=latents,
                num_inference_steps=total,
                generator=generator,
                output_type=output_type,
            )

    def _steps(self, request: Request, pipeline: Any, steps: int, strength: float | None = None) -> Steps:
        return self.rules.steps(request.sampler, pipeline.scheduler, steps, strength, self._device)

    def _here(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device)

    def work(self, request: Request, rows: int = 2) -> Work:
        """What a joint step computes."""
        (width, height), (base_width, base_height) = request.size, request.base_size
        controls = len(parts_at_work(self.models.base)) - 1
        return Work(rows * request.images, width * height, base_width * base_height, controls)

    def _decoded(self, pipeline: Any, latents: Tensor) -> list[Image.Image]:
        self.models.make_room(decoding_memory(LATENT_PIXEL**2 * latents[0, 0].numel()))
        with self.placement.holding(pipeline.vae):
            pictures = to_pictures(pipeline.vae, latents, self.rules.to_whole)
        pipeline.maybe_free_model_hooks()
        return pictures


def takes_channels(side: Side) -> bool:
    """Whether a model is an inpainting one, whose UNet takes more than a latent."""
    return side.pipeline.unet.config.in_channels != LATENT_CHANNELS


@contextmanager
def freed_on_failure(pipeline: Any) -> Iterator[None]:
    """Offloaded parts go back where they were also where the pipeline's call fails."""
    try:
        yield
    except BaseException:
        pipeline.maybe_free_model_hooks()
        raise


def prediction_type(pipeline: Any) -> str:
    """What a pipeline's UNet predicts: "epsilon", "v_prediction" or "sample"."""
    return pipeline.scheduler.config.get("prediction_type", "epsilon")


class DiffusersHost:
    """The joint stage's view of a set of pipelines, for one pass; see `two_stage.Host`.

    Args:
        stages: the models and rules.
        request: prompts, guidance and settings.
        finished: the base's finished latents, None in a single stage.
        start: the upgraded model's.
        steps: the joint ones.
        each_step: is given the upgraded latents after every step.
        output_type: of the upgraded pipeline.
    """

    def __init__(
        self,
        stages: TwoStages,
        request: Request,
        finished: Tensor | None,
        start: Start,
        steps: Steps,
        each_step: Callable[[Tensor], None] | None,
        output_type: str,
    ) -> None:
        self._stages = stages
        self._request = request
        self._finished = finished
        self._start = start
        self._steps = steps
        self._each_step = each_step
        self._output_type = output_type

    @property
    def interrupted(self) -> bool:
        return self._stages.interruption.asked

    @property
    def device(self) -> str | torch.device:
        return self._stages.placement.device

    @property
    def overlap(self) -> SideStream | None:
        needed = self._stages.work(self._request).memory(overlapped=True)
        fits = self._stages.models.fit_together(needed)
        return self._stages.side_stream if fits else None

    def base_plugins(self) -> AbstractContextManager[None]:
        """They are the base pipeline's own."""
        return nullcontext()

    def sample_base(self) -> StageOne:
        """It has sampled already: its picture is shared by all switch points and weights of a job."""
        return StageOne(self._finished)

    def base_noise(self) -> Tensor:
        return self._request.noise.base_again().to(self.device)

    @contextmanager
    def base_denoiser(self, stage_one: StageOne, taps: Taps) -> Iterator[BaseDenoiser]:
        stages, base, request = self._stages, self._stages.models.base, self._request
        evaluations = GuidanceWindow.from_settings(request.settings).base_evaluations(stages.evaluations(self._steps))
        calls = distinct_levels(evaluations)
        levels = [evaluation.sigma for evaluation in calls]
        schedule, predicts, config = noise_schedule_of(base), prediction_type(base), base.scheduler.config
        channels, blending = stages.base_channels(request), stages.base_blending(request, self._finished)
        own_steps = stages.base_steps_of(request)
        arguments = own_steps.windowed(request.base, calls)
        with (
            stages.placement.holding(*parts_at_work(base)),
            read_features(base.unet, taps) as reader,
            without_bar(base),
            freed_on_failure(base),
        ):

            def call(paused: PausedCall[Question, BaseStep]) -> None:
                first = paused.first()
                scheduler = FollowedLevels(
                    paused,
                    first,
                    levels,
                    schedule,
                    predicts,
                    reader,
                    config,
                    self.device,
                    base.unet.dtype,
                    channels,
                    blending,
                )

                def place() -> int:
                    return own_steps.place(scheduler.evaluation)

                with (
                    scheduled(base, scheduler),
                    conditioned(base, request.base_conditioning, place, request.images),
                ):
                    base(**arguments, latents=first[0], num_inference_steps=len(levels), output_type="latent")

            with paused_call(call) as paused:
                yield lambda latent, evaluation: paused.ask((latent, evaluation))

    def sample_upgraded(
        self, stage_one: StageOne, joint: JointStage | None, planned: Sequence[Evaluation] | None
    ) -> Any:
        stages, request, upgraded = self._stages, self._request, self._stages.models.upgraded
        with ExitStack() as scope:
            if joint is not None:
                scope.enter_context(stages.placement.holding(stages.models.adapter))
                evaluations = stages.evaluations(self._steps)
                scope.enter_context(joined(upgraded.unet, joint, evaluations, request.images))
            return stages.call(
                upgraded,
                request.upgraded,
                self._steps,
                self._start,
                request.noise.upgraded_steps,
                "SDXL",
                request.upgraded_conditioning,
                self._each_step,
                self._output_type,
            ).images

    def samples_of_base(self, stage_one: StageOne) -> Any:
        """Never asked for: pipelines that are interrupted give what they have."""
        raise NotImplementedError

    def base_to_device(self) -> None:
        """It goes there where it is called."""

    def upgraded_to_device(self) -> None:
        """It goes there where it is called."""

    def both_to_device(self) -> None:
        """They go there where they are called."""

    @contextmanager
    def recording(self, evaluations: int) -> Iterator[Callable[[], None]]:
        done = itertools.count()
        yield lambda: self._stages.progress("recording", next(done), evaluations)
        self._stages.progress("recording", evaluations, evaluations)

    def host_data(self) -> None:
        """Nothing."""

    def on_stage_one_reused(self, kept: CachedStageOne) -> None:
        """Its picture is shown once for all passes."""

    def on_base_skipped(self, kept: CachedStageOne) -> None:
        """Nothing is shown of it."""

    def notify(self, sentence: str) -> None:
        logger.warning("%s", sentence)


@contextmanager
def joined(unet: nn.Module, joint: JointStage, evaluations: Sequence[Evaluation], images: int) -> Iterator[None]:
    """While open, each call of the upgraded UNet is the next of these evaluations, and gets its residuals."""
    coming = iter(evaluations)

    def evaluate(forward: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        evaluation = next(coming, None)
        if evaluation is None:
            raise XAdapterError("The upgraded pipeline made more model evaluations than its scheduler has timesteps.")
        sample = arguments[0] if arguments else named["sample"]
        rows = guidance_rows(len(sample), images)
        with joint.evaluate(evaluation, rows).fused_into(unet, slice(0, len(rows))):
            return forward(*arguments, **named)

    with wrapped(unet, "forward", evaluate):
        yield


@contextmanager
def without_bar(pipeline: Any) -> Iterator[None]:
    """While open, the pipeline shows no progress bar."""
    own = vars(pipeline).get("_progress_bar_config")
    pipeline._progress_bar_config = {**(own or {}), "disable": True}
    try:
        yield
    finally:
        if own is None:
            del pipeline._progress_bar_config
        else:
            pipeline._progress_bar_config = own
