"""Stage 1: the base's own picture, as the WebUI would make it with the SD1.5 checkpoint selected."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from modules import devices, processing, rng, sd_samplers, shared
from modules.processing import StableDiffusionProcessingTxt2Img
from torch import Tensor

from ...errors import WrongArgument
from ...families import FAMILY_NAMES
from ...settings import CONTROL_IMAGE, SAME_SEED, START_STRENGTH, Settings, half
from ...two_stage import StageOne
from ..sampling import switch
from ..sampling.sampling_plan import noise_levels
from ..sampling.seeded import blank_conditioning, each_from_its_seed
from . import plugins
from .base_model import BaseModel
from .base_units import BaseUnits
from .hooked_units import HookedUnits

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


def base_processing(
    p: StableDiffusionProcessingTxt2Img, settings: Settings, prompts: list[str], negative_prompts: list[str]
) -> StableDiffusionProcessingTxt2Img:
    """What the WebUI would process with the SD1.5 checkpoint selected, for the batch under way."""
    job = StableDiffusionProcessingTxt2Img(
        prompt=prompts,
        negative_prompt=negative_prompts,
        width=settings.base_width or half(p.width),
        height=settings.base_height or half(p.height),
        steps=settings.base_steps or p.steps,
        cfg_scale=settings.base_cfg_scale or p.cfg_scale,
        batch_size=len(prompts),
        do_not_save_samples=True,
        do_not_save_grid=True,
        **{name: getattr(p, name) for name in SHARED_FIELDS},
    )
    job.sampler_noise_scheduler_override = p.sampler_noise_scheduler_override
    job.seed = p.seed if settings.base_seed == SAME_SEED else settings.base_seed
    job.seeds = job.all_seeds = base_seeds(p, settings)
    job.subseeds = job.all_subseeds = list(p.subseeds)
    job.prompts = job.all_prompts = prompts
    job.negative_prompts = job.all_negative_prompts = negative_prompts
    job.fill_fields_from_opts()
    return job


def base_seeds(p: StableDiffusionProcessingTxt2Img, settings: Settings) -> list[int]:
    """The base's seed for each image of the batch under way; its own count on from image to image, as SDXL's do."""
    if settings.base_seed == SAME_SEED:
        return list(p.seeds)
    first = settings.base_seed + p.iteration * p.batch_size
    return list(range(first, first + len(p.seeds)))


def base_noise(job: StableDiffusionProcessingTxt2Img, seeds: Sequence[int]) -> rng.ImageRNG:
    """The WebUI's generators of noise in the base's size, one for each seed."""
    return rng.ImageRNG(
        (4, job.height // processing.opt_f, job.width // processing.opt_f),
        seeds,
        subseeds=job.subseeds,
        subseed_strength=job.subseed_strength,
        seed_resize_from_h=job.seed_resize_from_h,
        seed_resize_from_w=job.seed_resize_from_w,
    )


def check_start(settings: Settings, units: BaseUnits) -> None:
    """Whether there is what the base is asked to start from.

    Raises:
        WrongArgument: there is no control image.
    """
    if settings.base_start == CONTROL_IMAGE and units.first_with_picture() is None:
        raise WrongArgument(
            f"'base_start' is '{CONTROL_IMAGE}', but no enabled ControlNet unit of the base has an image to start from."
        )


def sample_base(
    base: BaseModel, job: StableDiffusionProcessingTxt2Img, units: BaseUnits, hooked: HookedUnits, start: str
) -> StageOne:
    """The base's own picture, by the WebUI's own sampler.

    Args:
        base: the base model.
        job: its processing object, prompts encoded.
        units: the base's ControlNet units.
        hooked: the same, at work.
        start: what it starts from, as `base_start` in `Settings`.

    Raises:
        WrongFile: a LoRA does not fit the base's layers.
    """
    asked: list[Tensor] = []
    with base.current() as model, hooked.stage_one():
        job.sampler = sd_samplers.create_sampler(job.sampler_name, model)
        denoiser = job.sampler.model_wrap_cfg

        def note(module: torch.nn.Module, args: tuple) -> None:
            asked[denoiser.step :] = [args[1][:1]]

        job.rng = base_noise(job, job.seeds)
        hooked.change_noise()
        noise = job.rng.next()
        hook = denoiser.register_forward_pre_hook(note)
        try:
            latents = _from_picture(job, noise, units) if start == CONTROL_IMAGE else _from_noise(job, noise)
        finally:
            hook.remove()
        plugins.check_applied(FAMILY_NAMES[base.family])
        levels = noise_levels(denoiser, asked)
        pictures = switch.decode(model, latents, hooked.finish)
    devices.torch_gc()
    return StageOne(latents, tuple(pictures), tuple(levels))


def _from_noise(job: StableDiffusionProcessingTxt2Img, noise: Tensor) -> Tensor:
    """As the txt2img tab does it."""
    return job.sampler.sample(job, noise, job.c, job.uc, image_conditioning=blank_conditioning(job))


def _from_picture(job: StableDiffusionProcessingTxt2Img, noise: Tensor, units: BaseUnits) -> Tensor:
    """From the image of the first unit that has one, as the img2img tab does it."""
    unit = units.first_with_picture()
    pictures = [unit.picture()] * len(job.seeds)
    start = switch.carry_over(pictures, job.seeds, job.width, job.height, unit.resize_mode)

    def condition(place: int) -> Tensor:
        image = slice(place, place + 1)
        return job.img2img_image_conditioning(start.pixels[image] * 2 - 1, start.latents[image])

    conditioning = each_from_its_seed(job.seeds, condition)
    noise = noise * shared.opts.initial_noise_multiplier
    with switch.denoising_strength(job, START_STRENGTH):
        return job.sampler.sample_img2img(job, start.latents, noise, job.c, job.uc, image_conditioning=conditioning)
