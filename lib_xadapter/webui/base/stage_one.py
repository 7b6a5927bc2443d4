"""Stage 1: the base's own picture, as the WebUI would make it with the SD1.5 checkpoint selected."""

from __future__ import annotations

from collections.abc import Sequence
from unittest.mock import patch

import torch
from modules import devices, processing, rng, sd_samplers, shared
from modules.processing import (
    StableDiffusionProcessing,
    StableDiffusionProcessingImg2Img,
    StableDiffusionProcessingTxt2Img,
)
from PIL import Image
from torch import Tensor

from ...errors import WrongArgument
from ...families import FAMILY_NAMES
from ...settings import CONTROL_IMAGE, START_STRENGTH, Settings
from ...two_stage import StageOne
from ..sampling import switch
from ..sampling.mask_blending import MaskBlending
from ..sampling.sampling_plan import noise_levels
from ..sampling.seeded import blank_conditioning, each_from_its_seed, seeded
from . import plugins
from .attribute_overlay import with_attributes
from .base_model import BaseModel
from .base_processing import JUST_RESIZE, size_of
from .base_units import BaseUnits
from .hooked_units import HookedUnits
from .host_state import count_steps_anew


def base_noise(job: StableDiffusionProcessing, seeds: Sequence[int]) -> rng.ImageRNG:
    """The WebUI's generators of noise in the base's size, one for each seed."""
    width, height = size_of(job)
    return rng.ImageRNG(
        (4, height // processing.opt_f, width // processing.opt_f),
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
    base: BaseModel,
    job: StableDiffusionProcessing,
    units: BaseUnits,
    hooked: HookedUnits,
    start: str,
    blending: MaskBlending,
) -> StageOne:
    """The base's own picture, by the WebUI's own sampler.

    Args:
        base: the base model.
        job: its processing object, prompts encoded.
        units: the base's ControlNet units.
        hooked: the same, at work.
        start: what it starts from in txt2img, as `base_start` in `Settings`.
        blending: what scripts do where a mask is blended in.

    Raises:
        WrongFile: a LoRA does not fit the base's layers.
    """
    asked: list[Tensor] = []
    with base.current() as model, hooked.stage_one() as before_evaluation:
        count_steps_anew()
        job.sampler = sd_samplers.create_sampler(job.sampler_name, model)
        denoiser = job.sampler.model_wrap_cfg

        def note(module: torch.nn.Module, args: tuple) -> None:
            sigma = args[1][:1]
            asked[denoiser.step :] = [sigma]
            before_evaluation(denoiser, sigma)

        job.rng = base_noise(job, job.seeds)
        hooked.change_noise(job)
        noise = job.rng.next()
        hook = denoiser.register_forward_pre_hook(note)
        try:
            if isinstance(job, StableDiffusionProcessingImg2Img):
                latents = _over_given_picture(job, noise, blending)
            elif start == CONTROL_IMAGE:
                latents = _over_control_image(job, noise, units)
            else:
                latents = _from_noise(job, noise)
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


def _over_given_picture(job: StableDiffusionProcessingImg2Img, noise: Tensor, blending: MaskBlending) -> Tensor:
    """As the img2img tab does it, once the processing object has been set up."""
    noise = noise * job.initial_noise_multiplier
    with blending.of(job):
        latents = job.sampler.sample_img2img(
            job, job.init_latent, noise, job.c, job.uc, image_conditioning=job.image_conditioning
        )
    return latents if job.mask is None else blending.finally_blended(job, latents)


def _over_control_image(job: StableDiffusionProcessingTxt2Img, noise: Tensor, units: BaseUnits) -> Tensor:
    """From the image of the first unit that has one, as the img2img tab does it."""
    unit = units.first_with_picture()
    start_from(job, [unit.picture()] * len(job.seeds), unit.resize_mode)
    noise = noise * shared.opts.initial_noise_multiplier
    with switch.denoising_strength(job, START_STRENGTH):
        return job.sampler.sample_img2img(
            job, job.init_latent, noise, job.c, job.uc, image_conditioning=job.image_conditioning
        )


def start_from(job: StableDiffusionProcessing, pictures: Sequence[Image.Image], resize_mode: int = JUST_RESIZE) -> None:
    """Let a processing object of the base, the WebUI's current model, start from pictures: one for each image."""
    width, height = size_of(job)
    start = switch.carry_over(pictures, job.seeds, width, height, resize_mode)

    def condition(place: int) -> Tensor:
        image = slice(place, place + 1)
        return job.img2img_image_conditioning(start.pixels[image] * 2 - 1, start.latents[image])

    job.init_latent, job.image_conditioning = start.latents, each_from_its_seed(job.seeds, condition)


def set_up_img2img(job: StableDiffusionProcessingImg2Img) -> None:
    """The WebUI's own preparation of a picture to paint over, with the base as its current model.

    It encodes by torch's own generator, and would save the given picture a second time.
    """
    not_saved = with_attributes(shared.opts, save_init_img=False)
    with patch.object(processing, "opts", not_saved), seeded(job.seeds[0]):
        job.init(job.all_prompts, job.all_seeds, job.all_subseeds)


def finished(job: StableDiffusionProcessing, pictures: Sequence[Image.Image]) -> list[Image.Image]:
    """The base's pictures as the img2img tab would show them: corrected in colour, in the picture around the mask."""
    if not isinstance(job, StableDiffusionProcessingImg2Img):
        return list(pictures)
    return [_finished(job, place, picture) for place, picture in enumerate(pictures)]


def _finished(job: StableDiffusionProcessingImg2Img, place: int, picture: Image.Image) -> Image.Image:
    if job.color_corrections is not None and place < len(job.color_corrections):
        picture = processing.apply_color_correction(job.color_corrections[place], picture)
    if not shared.opts.overlay_inpaint or job.overlay_images is None or place >= len(job.overlay_images):
        return picture
    return processing.apply_overlay(picture, job.paste_to, job.overlay_images[place])[0]
