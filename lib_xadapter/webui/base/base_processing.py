"""What the WebUI would process with the SD1.5 checkpoint selected: the base's own processing objects.

One for each way in which SDXL is sampled: from noise in txt2img, over a picture in img2img, in the second pass of
Hires. fix.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy
from modules import processing
from modules.processing import (
    StableDiffusionProcessing,
    StableDiffusionProcessingImg2Img,
    StableDiffusionProcessingTxt2Img,
)
from PIL import Image
from torch import Tensor

from ...memory import Work
from ...settings import SAME_SEED, Settings, half
from ...wrapping import wrapped
from ..sampling.samplings import total_steps

SHARED_FIELDS = (
    "sampler_name",
    "scheduler",
    "subseed_strength",
    "seed_resize_from_h",
    "seed_resize_from_w",
    "tiling",
    "eta",
    "s_min_uncond",
    "s_churn",
    "s_tmin",
    "s_tmax",
    "s_noise",
    "disable_extra_networks",
    "do_not_reload_embeddings",
)
"""What the base's processing object takes from SDXL's as it is."""

IMG2IMG_FIELDS = (
    "init_images",
    "resize_mode",
    "denoising_strength",
    "mask_blur_x",
    "mask_blur_y",
    "mask_round",
    "inpainting_fill",
    "inpaint_full_res",
    "inpaint_full_res_padding",
    "inpainting_mask_invert",
    "initial_noise_multiplier",
)
"""What it takes beside these in the img2img tab."""
CONTROL_FIELDS = (
    "init_images",
    "image_mask",
    "resize_mode",
    "mask_blur_x",
    "mask_blur_y",
    "inpaint_full_res",
    "inpaint_full_res_padding",
    "inpainting_mask_invert",
)
"""What the ControlNet extension reads of them, for units without a picture of their own."""

FILL, ORIGINAL = 0, 1
"""Of the img2img tab's "masked content"."""
JUST_RESIZE = 0

Kind = TypeVar("Kind", bound=StableDiffusionProcessing)


@dataclass(frozen=True)
class Prompts:
    """The base's prompts of one batch, extra networks taken out: one for each image."""

    positive: list[str]
    negative: list[str]


@dataclass(frozen=True)
class GivenPicture:
    """What SDXL paints over in img2img, as the WebUI's resize mode, crop and fill have made it.

    Attributes:
        pictures: one for each image, or one for all.
        mask: white where is painted; None for everywhere.
    """

    pictures: tuple[Image.Image, ...]
    mask: Image.Image | None

    @classmethod
    def from_conditioning(cls, pixels: Tensor, mask: Image.Image | None) -> GivenPicture:
        """From what the WebUI makes its image conditioning of: (images, 3, height, width) in -1..1."""
        levels = ((pixels.float().cpu() + 1) * 127.5).round().clamp(0, 255).byte().numpy()
        return cls(tuple(Image.fromarray(numpy.moveaxis(picture, 0, 2)) for picture in levels), mask)


@dataclass(frozen=True)
class PromptCaches:
    """Encoded prompts, as the WebUI keeps them from batch to batch."""

    cond: list[Any] = field(default_factory=lambda: [None, None])
    uncond: list[Any] = field(default_factory=lambda: [None, None])


def use_caches(job: StableDiffusionProcessing, caches: PromptCaches) -> None:
    """Let a processing object of the base find the prompts that an earlier batch has encoded."""
    if getattr(job, "is_hr_pass", False):
        job.cached_hr_c, job.cached_hr_uc = caches.cond, caches.uncond
    else:
        job.cached_c, job.cached_uc = caches.cond, caches.uncond


@contextmanager
def given_picture(p: StableDiffusionProcessing) -> Iterator[Sequence[GivenPicture]]:
    """Around the WebUI's preparation of a picture to paint over: afterwards it is here; nothing for txt2img."""
    seen: list[GivenPicture] = []

    def conditioning(host: Callable[..., Tensor], pixels: Tensor, latents: Tensor, *mask: Any) -> Tensor:
        painted = p.latent_mask if p.latent_mask is not None else (mask[0] if mask else None)
        seen.append(GivenPicture.from_conditioning(pixels, painted))
        return host(pixels, latents, *mask)

    if not isinstance(p, StableDiffusionProcessingImg2Img):
        yield ()
        return
    with wrapped(p, "img2img_image_conditioning", conditioning):
        yield seen


def base_size(settings: Settings, width: int, height: int) -> tuple[int, int]:
    """Width and height of the base beside SDXL at a size."""
    return settings.base_width or half(width), settings.base_height or half(height)


def hires_size(p: StableDiffusionProcessingTxt2Img) -> tuple[int, int]:
    """Width and height of the second pass of Hires. fix, known once the processing object has been set up."""
    factor = processing.opt_f
    return (
        (p.hr_upscale_to_x // factor - p.truncate_x) * factor,
        (p.hr_upscale_to_y // factor - p.truncate_y) * factor,
    )


def base_hires_size(settings: Settings, p: StableDiffusionProcessingTxt2Img) -> tuple[int, int]:
    """Width and height of the base in the second pass: half of SDXL's, or its own size enlarged as SDXL's is."""
    width, height = hires_size(p)
    own_width = settings.base_width * width // p.width // 8 * 8
    own_height = settings.base_height * height // p.height // 8 * 8
    return own_width or half(width), own_height or half(height)


def largest_work(p: StableDiffusionProcessing, settings: Settings, controlnets: int) -> Work:
    """What the largest joint steps of a job compute, before the processing object has been set up.

    Args:
        p: SDXL's processing object.
        settings: of X-Adapter.
        controlnets: that are at work on the base.
    """
    size, of_base = (p.width, p.height), base_size(settings, p.width, p.height)
    if getattr(p, "enable_hr", False) and settings.hires:
        enlarged = copy.copy(p)
        # the WebUI writes into it what it computes
        enlarged.extra_generation_params = {}
        enlarged.calculate_target_resolution()
        size, of_base = hires_size(enlarged), base_hires_size(settings, enlarged)
    return Work(2 * p.batch_size, math.prod(size), math.prod(of_base), controlnets)


def size_of(job: StableDiffusionProcessing) -> tuple[int, int]:
    """Width and height that a processing object of the base is sampled at."""
    if getattr(job, "is_hr_pass", False):
        return job.hr_upscale_to_x, job.hr_upscale_to_y
    return job.width, job.height


def of_txt2img(
    p: StableDiffusionProcessingTxt2Img, settings: Settings, prompts: Prompts
) -> StableDiffusionProcessingTxt2Img:
    """The base's part in a picture from noise."""
    size = base_size(settings, p.width, p.height)
    return _shared(StableDiffusionProcessingTxt2Img, p, settings, prompts, size, settings.base_steps or p.steps)


def of_img2img(
    p: StableDiffusionProcessingImg2Img, settings: Settings, prompts: Prompts
) -> StableDiffusionProcessingImg2Img:
    """The base's own picture over the given one, as the img2img tab would make it at the base's size."""
    size = base_size(settings, p.width, p.height)
    own = {name: getattr(p, name) for name in IMG2IMG_FIELDS} | {"mask": p.image_mask}
    if p.latent_mask is not None:
        # scripts give it at the size that is sampled
        own["latent_mask"] = p.latent_mask.resize(size)
    return _shared(StableDiffusionProcessingImg2Img, p, settings, prompts, size, settings.base_steps or p.steps, **own)


def beside_img2img(
    p: StableDiffusionProcessingImg2Img, settings: Settings, prompts: Prompts, given: GivenPicture
) -> StableDiffusionProcessingImg2Img:
    """The base's part where both models paint over the given picture: what SDXL sees of it, at the base's size."""
    size = base_size(settings, p.width, p.height)
    own = {
        "init_images": list(given.pictures[:1] if len(p.init_images) == 1 else given.pictures),
        "mask": given.mask,
        "resize_mode": JUST_RESIZE,
        "denoising_strength": p.denoising_strength,
        "mask_blur_x": 0,
        "mask_blur_y": 0,
        "mask_round": p.mask_round,
        # what is filled by the picture's own colours is filled already
        "inpainting_fill": ORIGINAL if p.inpainting_fill == FILL else p.inpainting_fill,
        "inpaint_full_res": False,
    }
    job = _shared(StableDiffusionProcessingImg2Img, p, settings, prompts, size, p.steps, **own)
    # or the WebUI would make colour corrections that nobody applies
    job.color_corrections = []
    return job


def beside_hires(
    p: StableDiffusionProcessingTxt2Img, settings: Settings, prompts: Prompts
) -> StableDiffusionProcessingTxt2Img:
    """The base's part in the second pass of Hires. fix."""
    width, height = base_hires_size(settings, p)
    steps = p.hr_second_pass_steps or p.steps
    job = _shared(
        StableDiffusionProcessingTxt2Img,
        p,
        settings,
        prompts,
        base_size(settings, p.width, p.height),
        p.steps,
        enable_hr=True,
        denoising_strength=p.denoising_strength,
        hr_second_pass_steps=steps,
        hr_sampler_name=p.hr_sampler_name,
    )
    job.hr_upscale_to_x, job.hr_upscale_to_y, job.is_hr_pass = width, height, True
    job.firstpass_steps = total_steps(p.sampler_name, p.steps)
    return job


def _shared(
    kind: type[Kind],
    p: StableDiffusionProcessing,
    settings: Settings,
    prompts: Prompts,
    size: tuple[int, int],
    steps: int,
    **own: Any,
) -> Kind:
    """A processing object of the base for the batch under way."""
    width, height = size
    job = kind(
        prompt=prompts.positive,
        negative_prompt=prompts.negative,
        width=width,
        height=height,
        steps=steps,
        cfg_scale=settings.base_cfg_scale or p.cfg_scale,
        batch_size=len(prompts.positive),
        do_not_save_samples=True,
        do_not_save_grid=True,
        **{name: getattr(p, name) for name in SHARED_FIELDS},
        **own,
    )
    job.sampler_noise_scheduler_override = p.sampler_noise_scheduler_override
    job.seed = p.seed if settings.base_seed == SAME_SEED else settings.base_seed
    job.seeds = job.all_seeds = settings.base_seeds(p.seeds, p.all_seeds[0])
    job.subseeds = job.all_subseeds = list(p.subseeds)
    set_prompts(job, prompts)
    job.fill_fields_from_opts()
    return job


def set_prompts(job: StableDiffusionProcessing, prompts: Prompts) -> None:
    """Give a processing object its prompts, in every form in which the WebUI keeps them."""
    job.prompts = job.all_prompts = prompts.positive
    job.negative_prompts = job.all_negative_prompts = prompts.negative
    if getattr(job, "is_hr_pass", False) or getattr(job, "enable_hr", False):
        job.hr_prompts, job.hr_negative_prompts = prompts.positive, prompts.negative


def seen_by_controlnet(
    job: StableDiffusionProcessing, p: StableDiffusionProcessing, settings: Settings
) -> StableDiffusionProcessing:
    """A processing object of the base as the ControlNet extension is to see it.

    In img2img it finds the user's own picture and mask; with Hires. fix the size of the second pass, so that it knows
    which units act in which pass.
    """
    seen = copy.copy(job)
    if isinstance(job, StableDiffusionProcessingImg2Img):
        for name in CONTROL_FIELDS:
            setattr(seen, name, getattr(p, name))
    elif p.enable_hr:
        seen.enable_hr = True
        seen.hr_resize_x, seen.hr_resize_y = base_hires_size(settings, p)
    return seen
