"""Over a given picture: image-to-image and inpainting, with both models or the base first, by diffusers' rules."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import (
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLImg2ImgPipeline,
    UNet2DConditionModel,
)
from PIL import Image

from lib_xadapter.errors import DoesNotFit, WrongArgument
from lib_xadapter.headless import XAdapterPipeline
from lib_xadapter.headless.models import noise_schedule_of
from tests.headless.test_composed import SIZE, differs, latents, seeded
from tests.pictures import grey_levels_apart
from tests.small_models import seeded as with_seeded_weights

pytestmark = pytest.mark.usefixtures("one_thread")

BASE_SIZE = {"width": 64, "height": 64}


@pytest.fixture
def seen_by_base(pipe):
    """(timestep, input) of each call of the base's UNet."""
    calls = []
    hook = pipe.base.unet.register_forward_pre_hook(lambda module, given: calls.append((float(given[1]), given[0])))
    yield calls
    hook.remove()


@pytest.mark.parametrize("memory", ["lockstep", "recorded"])
def test_outside_the_mask_the_base_keeps_the_picture_at_every_noise_level(pipe, picture, mask, seen_by_base, memory):
    given = {"image": picture, "mask_image": mask, "strength": 0.8, "num_inference_steps": 5, "memory": memory}
    made = pipe("a cat", generator=seeded(), output_type="latent", **given)
    clean, schedule = made.base_side.latents, noise_schedule_of(pipe.base)
    levels = [schedule.sigma_at(timestep) for timestep, _ in seen_by_base]
    noised = [rows[:1] * math.sqrt(1 + sigma**2) for sigma, (_, rows) in zip(levels, seen_by_base, strict=True)]
    noise = (noised[0] - clean) / levels[0]
    assert len(levels) == 4
    for sigma, latent in zip(levels[1:], noised[1:], strict=True):
        kept = clean + sigma * noise
        assert torch.allclose(latent[..., :4], kept[..., :4], atol=2e-3)
        assert differs(latent[..., 4:], kept[..., 4:])


def test_the_base_paints_the_picture_over_that_its_own_pipeline_paints(pipe, picture):
    made = pipe("a cat", image=picture, strength=0.6, img2img_start="base", num_inference_steps=4, generator=seeded(),
                switch_point=0.5, weight=0.0, return_base_images=True)  # fmt: skip
    plain = StableDiffusionImg2ImgPipeline(**pipe.base.components, requires_safety_checker=False)
    start = picture.resize((64, 64), Image.Resampling.LANCZOS)
    theirs = plain("a cat", image=start, strength=0.6, num_inference_steps=4, guidance_scale=5.0, generator=seeded())
    assert grey_levels_apart(made.base_images[0], theirs.images[0]) <= 1
    larger = made.base_images[0].resize((128, 128), Image.Resampling.LANCZOS)
    plain_xl = StableDiffusionXLImg2ImgPipeline(**pipe.upgraded.components, add_watermarker=False)
    over = plain_xl("a cat", image=larger, strength=0.5, num_inference_steps=4, guidance_scale=5.0, generator=seeded())
    assert grey_levels_apart(made.images[0], over.images[0]) <= 1


def test_with_a_mask_it_is_that_of_its_inpainting_pipeline(pipe, picture, mask):
    made = pipe("a cat", image=picture, mask_image=mask, strength=0.6, img2img_start="base", num_inference_steps=4,
                generator=seeded(), weight=0.0, return_base_images=True)  # fmt: skip
    plain = StableDiffusionInpaintPipeline(**pipe.base.components, requires_safety_checker=False)
    given = {"image": picture, "mask_image": mask, "strength": 0.6, "num_inference_steps": 4, **BASE_SIZE}
    theirs = plain("a cat", guidance_scale=5.0, generator=seeded(), **given).images[0]
    assert grey_levels_apart(made.base_images[0], theirs) <= 1


@pytest.mark.parametrize("switch_point", [0.5, 1.0])
def test_sdxl_goes_on_from_the_bases_part_and_keeps_the_rest_of_the_given_picture(pipe, picture, mask, switch_point):
    given = {"image": picture, "mask_image": mask, "num_inference_steps": 4, "switch_point": switch_point}
    led, alone = (latents(pipe, weight=weight, img2img_start="base", **given) for weight in (1.0, 0.0))
    over_picture = latents(pipe, weight=0.0, strength=switch_point, **given)
    assert torch.equal(led[..., :8], over_picture[..., :8])
    assert differs(led[..., 8:], alone[..., 8:])
    assert differs(alone[..., 8:], over_picture[..., 8:])


def test_what_the_base_made_of_a_picture_is_used_again(pipe, picture, mask):
    for given in ({}, {"mask_image": mask}, {"mask_image": mask, "img2img_start": "base"}):
        asked = {"image": picture, "num_inference_steps": 3, **given}
        first = pipe("a cat", generator=seeded(), **asked, **SIZE)
        again = latents(pipe, weight=0.5, base_side=first.base_side, **asked)
        assert torch.equal(again, latents(pipe, weight=0.5, **asked))


def test_a_picture_of_another_size_is_brought_to_the_one_asked_for(pipe, picture):
    assert latents(pipe, image=picture.resize((96, 200)), num_inference_steps=2).shape == (1, 4, 16, 16)


def test_a_picture_and_a_mask_for_each_image(pipe, picture, mask):
    upside_down = mask.rotate(180)
    given = {"prompt": ["a cat", "a dog"], "image": [picture, picture], "mask_image": [mask, upside_down]}
    given |= {"width": None, "height": None}
    made = latents(pipe, num_inference_steps=2, generator=[seeded(3), seeded(4)], **given)
    alone = latents(pipe, prompt="a dog", image=picture, mask_image=upside_down, num_inference_steps=2,
                    generator=[seeded(4)])  # fmt: skip
    assert torch.allclose(made[1:], alone, atol=1e-3)


@pytest.fixture
def inpainting_base(pipe) -> XAdapterPipeline:
    """With a UNet of nine channels."""
    unet = with_seeded_weights(UNet2DConditionModel.from_config({**pipe.base.unet.config, "in_channels": 9}), "inpaint")
    base = type(pipe.base)(**{**pipe.base.components, "unet": unet}, requires_safety_checker=False)
    base.set_progress_bar_config(disable=True)
    return XAdapterPipeline(base, pipe.upgraded, pipe.adapter)


@pytest.mark.parametrize("start", ["picture", "base"])
def test_an_inpainting_model_as_base_is_told_of_picture_and_mask(inpainting_base, picture, mask, start):
    told = []
    inpainting_base.base.unet.register_forward_pre_hook(lambda module, given: told.append(given[0][:1, 4:]))
    given = {"image": picture, "mask_image": mask, "img2img_start": start, "num_inference_steps": 2, "strength": 1.0}
    latents(inpainting_base, **given)
    assert len(told) == (2 if start == "picture" else 3)
    for channels in told:
        assert torch.allclose(channels, told[0], atol=1e-4)
        assert channels[0, 0, :, :4].max() == 0
        assert channels[0, 0, :, 4:].min() == 1
    with_base = inpainting_base.base.vae.encode(torch.zeros(1, 3, 64, 64)).latent_dist.mode()
    assert differs(told[0][0, 1:, :, :3], (with_base * inpainting_base.base.vae.config.scaling_factor)[0, :, :, :3])


def test_an_inpainting_model_as_base_without_a_picture_paints_everything(inpainting_base):
    told = []
    inpainting_base.base.unet.register_forward_pre_hook(lambda module, given: told.append(given[0][:1, 4]))
    latents(inpainting_base, num_inference_steps=2)
    assert all(channel.min() == 1 for channel in told)


def test_models_that_are_told_something_else_are_refused(pipe):
    unet = UNet2DConditionModel.from_config({**pipe.base.unet.config, "in_channels": 8})
    base = type(pipe.base)(**{**pipe.base.components, "unet": unet}, requires_safety_checker=False)
    with pytest.raises(DoesNotFit, match="The UNet of 'base' takes 8 channels"):
        XAdapterPipeline(base, pipe.upgraded, pipe.adapter)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"img2img_start": "base"}, "'img2img_start' is 'base', but there is no 'image'"),
        ({"img2img_start": "noise", "image": Image.new("RGB", (64, 64))}, "'img2img_start' is 'noise', expected one"),
    ],
    ids=str,
)
def test_one_sentence_names_the_argument(pipe, given, sentence):
    with pytest.raises(WrongArgument, match=sentence):
        latents(pipe, **given)
