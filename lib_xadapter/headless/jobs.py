"""The pictures of a job."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor

from ..errors import WrongArgument
from ..settings import Settings
from .composed import SMALLEST_GUIDANCE, BaseSide, XAdapterPipeline
from .infotexts import ControlUnit, PictureText
from .job import LATENT_PIXEL, Job
from .joining import can_join, joined
from .models import Models
from .pictures import Painted, to_tensor
from .pipeline import WEBUI_RULES, Noise, NoisePerImage, Progress, Request, Rules, no_progress
from .prompts import PromptPair, arguments_of, encode_for_base, encode_for_upgraded
from .sampler_table import evaluations_a_step


@dataclass(frozen=True)
class Picture:
    """A finished picture.

    Attributes:
        image: the picture.
        base_image: the base's picture that it was made from, None for a single stage.
        settings, control_scales, seed: what it was made with.
        text: settings in the WebUI's infotext form.
        prompt: of SDXL.
        job: which of the jobs that are made together it belongs to, from 0.
        base_latents: what the base finished for it, (1, 4, h, w); None for a single stage.
    """

    image: Image.Image
    base_image: Image.Image | None
    settings: Settings
    control_scales: tuple[float, ...]
    seed: int
    text: str
    prompt: str = ""
    job: int = 0
    base_latents: Tensor | None = None


def make_pictures(
    models: Models,
    job: Job,
    rules: Rules = WEBUI_RULES,
    progress: Progress = no_progress,
    there: Collection[str] = (),
    base_side: BaseSide | None = None,
) -> Iterator[Picture]:
    """The pictures of a job, each as soon as it is finished; the base's are made once for all that share them.

    Args:
        there: texts of pictures that need not be made.
        base_side: of an earlier job, where nothing changes on the base's side; its pictures are not made again.
    """
    return make_together(models, (job,), rules, progress, there, base_side)


def make_together(
    models: Models,
    jobs: Sequence[Job],
    rules: Rules = WEBUI_RULES,
    progress: Progress = no_progress,
    there: Collection[str] = (),
    base_side: BaseSide | None = None,
) -> Iterator[Picture]:
    """The pictures of jobs that differ in prompts, seeds and control maps alone, in batches that hold all of them.

    Where their prompts cannot stand in one batch, one job comes after the other.

    Args:
        base_side: of an earlier run of the same jobs, where nothing changes on the base's side.
    """
    first = jobs[0]
    for scales in itertools.product(*first.control_scales):
        requests = [request_of(models, job, job.settings, scales) for job in jobs]
        if len(jobs) > 1 and not can_join(requests):
            for number, (job, side) in enumerate(zip(jobs, _sides(jobs, base_side), strict=True)):
                for picture in make_together(models, (job,), rules, progress, there, side):
                    yield dataclasses.replace(picture, job=number)
            return
        yield from _made(_pipeline(models, rules, progress), joined(requests), jobs, scales, there, base_side)


def _sides(jobs: Sequence[Job], whole: BaseSide | None) -> list[BaseSide | None]:
    """Each job's rows of what the base finished for all."""
    if whole is None or whole.latents is None:
        return [None] * len(jobs)
    return [BaseSide(rows) for rows in whole.latents.split([job.batch for job in jobs])]


def _pipeline(models: Models, rules: Rules, progress: Progress) -> XAdapterPipeline:
    return XAdapterPipeline(
        models.base, models.upgraded, models.adapter, rules=rules, placement=models.placement, progress=progress
    )


def _made(
    pipeline: XAdapterPipeline,
    request: Request,
    jobs: Sequence[Job],
    scales: tuple[float, ...],
    there: Collection[str],
    side: BaseSide | None,
) -> Iterator[Picture]:
    """At every switch point and weight."""
    rows = [(number, job, seed) for number, job in enumerate(jobs) for seed in job.seeds]
    base_images: list[Any] = [None] * len(rows)
    for switch_point, weight in itertools.product(jobs[0].switch_points, jobs[0].weights):
        chosen = {"switch_point": switch_point, "weight": weight}
        settings = [dataclasses.replace(job.settings.of_image(seed, job.seed), **chosen) for _, job, seed in rows]
        texts = [_text(job, own, scales, seed) for (_, job, seed), own in zip(rows, settings, strict=True)]
        if set(texts) <= set(there):
            continue
        made = pipeline.run(
            dataclasses.replace(
                request,
                settings=dataclasses.replace(request.settings, **chosen),
                # noise generators move on, so that every picture gets a request of its own
                noise=NoisePerImage([noise for job in jobs for noise in _noises(job)]),
            ),
            side,
            return_base_images=side is None,
        )
        side, base_images = made.base_side, made.base_images or base_images
        for row, (number, job, seed) in enumerate(rows):
            latents = None if side.latents is None else side.latents[row : row + 1]
            image = _in_its_picture(made.images[row], job)
            yield Picture(image, base_images[row], settings[row], scales, seed, texts[row], job.prompt, number, latents)


def request_of(models: Models, job: Job, settings: Settings, scales: Sequence[float] = ()) -> Request:
    """A job as a request to the pipeline: prompts encoded, maps sized, noise drawn."""
    base_cfg_scale = settings.base_cfg_scale or job.cfg_scale
    guided = job.cfg_scale != 1
    # SDXL's unconds need unconds of the base to follow
    base_guided = guided or base_cfg_scale != 1
    # the WebUI counts evaluations, where a step makes two of them
    each = evaluations_a_step(job.sampler)
    base = encode_for_base(
        models,
        PromptPair(
            settings.base_prompt or job.prompt,
            settings.base_negative_prompt or job.negative_prompt,
            (settings.base_steps or job.steps) * each,
        ),
        job.clip_skip,
    )
    upgraded = encode_for_upgraded(models, PromptPair(job.prompt, job.negative_prompt, job.steps * each))
    if not (guided and base_guided) and not (base.is_plain and upgraded.is_plain):
        raise WrongArgument("The prompt changes on the way or is combined by AND, which needs a --cfg above 1.")
    return Request(
        base={
            **arguments_of(base, job.batch, base_guided),
            **_control_arguments(models.base, job.control_maps or job.control_images, job.base_size, scales, job.batch),
            "guidance_scale": max(base_cfg_scale, SMALLEST_GUIDANCE) if base_guided else 1.0,
            **_sized(job.base_size),
        },
        upgraded={
            **arguments_of(upgraded, job.batch, guided),
            **_control_arguments(models.upgraded, job.upgraded_maps, job.size, job.upgraded_map_scales, job.batch),
            "guidance_scale": job.cfg_scale,
            **_sized(job.size),
        },
        settings=settings,
        steps=job.steps,
        noise=NoisePerImage(_noises(job)),
        images=job.batch,
        size=job.size,
        base_size=job.base_size,
        sampler=job.sampler,
        start=job.base_start,
        painted=_painted(job),
        base_conditioning=None if base.is_plain else base,
        upgraded_conditioning=None if upgraded.is_plain else upgraded,
    )


def _in_its_picture(image: Image.Image, job: Job) -> Image.Image:
    """Outside of a mask the given picture itself, whatever its way through the VAE has made of it."""
    if job.mask is None:
        return image
    picture = job.init_image.convert("RGB").resize(job.size, Image.Resampling.LANCZOS)
    return Image.composite(image, picture, job.mask.convert("L").resize(job.size, Image.Resampling.LANCZOS))


def _painted(job: Job) -> Painted | None:
    if job.init_image is None:
        return None
    return Painted(job.init_image.resize(job.size, Image.Resampling.LANCZOS), job.strength, job.mask)


def _control_arguments(
    pipeline: Any, given: Sequence[Image.Image], size: tuple[int, int], scales: Sequence[float], images: int
) -> dict[str, Any]:
    maps = [to_tensor(image.convert("RGB").resize(size)) for image in given]
    if not maps:
        return {}
    scale = "controlnet_conditioning_scale"
    if hasattr(pipeline, "adapter"):
        scale = "adapter_conditioning_scale"
        # its pipeline makes as many features as maps, not as images
        maps = [one.expand(images, -1, -1, -1) for one in maps]
    if len(maps) == 1:
        return {"image": maps[0], scale: scales[0]}
    return {"image": maps, scale: list(scales)}


def _sized(size: tuple[int, int]) -> dict[str, int]:
    return {"width": size[0], "height": size[1]}


def _noises(job: Job) -> list[Noise]:
    base, upgraded = ((height // LATENT_PIXEL, width // LATENT_PIXEL) for width, height in (job.base_size, job.size))
    return [Noise.seeded(*seeds, base, upgraded) for seeds in zip(job.seeds, job.base_seeds, strict=True)]


def _text(job: Job, settings: Settings, scales: Sequence[float], seed: int) -> str:
    modules = [annotator.module if annotator else "none" for annotator in job.annotators or [None] * len(scales)]
    units = tuple(map(ControlUnit, job.control_names, scales, modules))
    return PictureText(
        job.prompt,
        job.negative_prompt,
        job.steps,
        job.sampler,
        job.cfg_scale,
        seed,
        job.size,
        job.model,
        settings,
        job.loras,
        units,
        job.strength if job.init_image is not None else None,
        job.clip_skip,
    ).written()
