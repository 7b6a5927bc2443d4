"""Checkpoints of SD2 and for inpainting, single files and folders, take the part of the base or of SDXL."""

from __future__ import annotations

from dataclasses import replace

import numpy
import pytest
import safetensors.torch
import torch
from diffusers import StableDiffusionInpaintPipeline
from PIL import Image

from lib_xadapter import load_adapter
from lib_xadapter.errors import DoesNotFit, WrongFile
from lib_xadapter.headless import load_lora
from lib_xadapter.headless.inpainting import inpainting_channels
from lib_xadapter.headless.job import Job
from lib_xadapter.headless.jobs import request_of
from lib_xadapter.headless.model_files import load_base, load_controlnet, load_upgraded
from lib_xadapter.headless.models import Models, with_controls
from lib_xadapter.headless.pictures import Painted, to_tensor
from lib_xadapter.headless.pipeline import DIFFUSERS_RULES, TwoStages
from lib_xadapter.settings import Settings
from tests import small_models
from tests.headless.small_sd2 import saved, sd2_text_encoder, sd2_unet, sd2_weights
from tests.pictures import control_map

FIRST_CONVOLUTION = "model.diffusion_model.input_blocks.0.0.weight"
LAST_BIAS = "model.diffusion_model.out.2.bias"


@pytest.fixture(scope="module")
def of_sd2(small):
    return sd2_weights(small.base)


def with_channels(weights, channels: int):
    """The UNet takes so many; what the further ones do is random."""
    more = torch.randn(32, channels - 4, 3, 3, generator=torch.Generator().manual_seed(1)) / 6
    return weights | {FIRST_CONVOLUTION: torch.cat([weights[FIRST_CONVOLUTION], more], dim=1)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("kinds")


@pytest.fixture(scope="module")
def sd2(small, of_sd2, folder):
    return load_base(saved(of_sd2, folder / "sd2.safetensors"), torch.float32, small.tokenizer)


@pytest.fixture(scope="module")
def inpainting(small, folder):
    weights = with_channels(safetensors.torch.load_file(small.base), 9)
    return load_base(saved(weights, folder / "inpainting.safetensors"), torch.float32, small.tokenizer)


@pytest.fixture(scope="module")
def upgraded(small):
    return load_upgraded(small.upgraded, torch.float32, small.tokenizer)


@pytest.fixture(scope="module")
def upgraded_inpainting(small, folder):
    weights = with_channels(safetensors.torch.load_file(small.upgraded), 9)
    return load_upgraded(saved(weights, folder / "xl-inpainting.safetensors"), torch.float32, small.tokenizer)


# --- SD2 --------------------------------------------------------------------------------------------------------------


def test_sd2_is_read_whole_but_for_the_last_layer_of_its_text_encoder(sd2):
    expected = small_models.seeded(sd2_unet(), "sd2.unet").state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in sd2.unet.state_dict().items())
    assert sd2.unet.config.use_linear_projection
    assert list(sd2.unet.config.attention_head_dim) == [1, 1, 2, 2]
    tokens = torch.tensor([sd2.tokenizer("a cat", padding="max_length")["input_ids"]])
    assert tokens[0, -1] == 0
    full = sd2_text_encoder()
    hidden = full(tokens, output_hidden_states=True).hidden_states[-2]
    norm = getattr(full, "text_model", full).final_layer_norm
    torch.testing.assert_close(sd2.text_encoder(tokens).last_hidden_state, norm(hidden))


def test_sd2_tells_by_its_answer_what_it_predicts(small, sd2, of_sd2, folder):
    assert sd2.scheduler.config.prediction_type == "epsilon"
    by_velocity = of_sd2 | {LAST_BIAS: of_sd2[LAST_BIAS] - 3}
    path = saved(by_velocity, folder / "velocity.safetensors")
    for dtype in (torch.float32, torch.bfloat16):
        assert load_base(path, dtype, small.tokenizer).scheduler.config.prediction_type == "v_prediction"
    path.with_suffix(".yaml").write_text("model:\n  params:\n    unet_config:\n      params: {}\n")
    # what a yaml says goes before that
    assert load_base(path, torch.float32, small.tokenizer).scheduler.config.prediction_type == "epsilon"


def test_an_sd15_lora_on_sd2_is_refused(small, sd2):
    with pytest.raises(DoesNotFit, match=r"small-style.safetensors is a LoRA for SD1.5, the pipeline is SD2"):
        load_lora(sd2, small.lora)


def test_checkpoints_that_edit_are_refused(small, folder):
    weights = with_channels(safetensors.torch.load_file(small.base), 8)
    with pytest.raises(WrongFile, match=r"edits.safetensors takes 8 channels, expected 4, or 9 for inpainting"):
        load_base(saved(weights, folder / "edits.safetensors"), torch.float32, small.tokenizer)


# --- inpainting -------------------------------------------------------------------------------------------------------


def picture(size: int) -> Image.Image:
    ramp = numpy.linspace(0, 255, size).astype(numpy.uint8)
    return Image.fromarray(numpy.stack([numpy.tile(ramp, (size, 1))] * 3, axis=-1))


def left_half(size: int) -> Image.Image:
    mask = numpy.zeros((size, size), dtype=numpy.uint8)
    mask[:, : size // 2] = 255
    return Image.fromarray(mask)


@torch.no_grad()
def latent_of(vae, pixels: torch.Tensor) -> torch.Tensor:
    return vae.config.scaling_factor * vae.encode(pixels).latent_dist.mode()


def test_an_ordinary_model_is_told_nothing_more(upgraded):
    assert inpainting_channels(upgraded, None, 2, (64, 64), "cpu") is None


@pytest.mark.parametrize("painted", [None, Painted(picture(64), 0.5)], ids=["no picture", "no mask"])
def test_without_a_mask_all_is_to_be_painted(painted, inpainting):
    told = inpainting_channels(inpainting, painted, 2, (64, 48), "cpu")
    assert told.shape == (2, 5, 6, 8)
    assert torch.equal(told[:, 0], torch.ones(2, 6, 8))
    grey = latent_of(inpainting.vae, torch.zeros(1, 3, 48, 64))
    torch.testing.assert_close(told[:, 1:], grey.expand(2, -1, -1, -1))


def test_with_a_mask_the_picture_outside_of_it_is_told(inpainting):
    told = inpainting_channels(inpainting, Painted(picture(64), 0.5, left_half(64)), 1, (64, 64), "cpu")
    assert told[0, 0].unique(dim=0).tolist() == [[1.0] * 4 + [0.0] * 4]
    # in one memory format: a random VAE makes much of how its sums are rounded
    kept = (2 * to_tensor(picture(64)) - 1).contiguous()
    kept[..., :32] = 0
    torch.testing.assert_close(told[:, 1:], latent_of(inpainting.vae, kept))


def test_a_folder_of_sd2_is_the_same_model(sd2, tmp_path):
    sd2.save_pretrained(tmp_path / "folder")
    again = load_base(tmp_path / "folder", torch.float32)
    for part in ("unet", "text_encoder"):
        expected = getattr(sd2, part).state_dict()
        assert all(torch.equal(value, expected[key]) for key, value in getattr(again, part).state_dict().items())
    assert again.tokenizer("a cat", padding="max_length")["input_ids"][-1] == 0


@pytest.mark.parametrize("which", ["inpainting", "upgraded_inpainting"])
def test_a_folder_of_an_inpainting_pipeline_is_the_same_model(which, tmp_path, request):
    pipeline = request.getfixturevalue(which)
    pipeline.save_pretrained(tmp_path / "folder")
    index = tmp_path / "folder/model_index.json"
    name = type(pipeline).__name__
    index.write_text(index.read_text().replace(name, name.replace("Pipeline", "InpaintPipeline")))
    again = (load_base if which == "inpainting" else load_upgraded)(tmp_path / "folder", torch.float32)
    expected = pipeline.unet.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in again.unet.state_dict().items())
    assert again.unet.config.in_channels == 9


# --- pictures ---------------------------------------------------------------------------------------------------------

JOB = Job(prompt="a cat", width=128, height=128, steps=3, sampler="Euler")


def latents(base, upgraded, small, job: Job = JOB) -> torch.Tensor:
    models = Models(base, upgraded, load_adapter(small.adapter))
    request = request_of(models, job, job.settings, (1.0,) * len(job.control_images))
    stages = TwoStages(models)
    return stages.upgraded_latents(request, stages.base_latents(request))


def test_sd2_leads_sdxl(sd2, upgraded, small):
    followed = latents(sd2, upgraded, small)
    assert bool(torch.isfinite(followed).all())
    alone = latents(sd2, upgraded, small, replace(JOB, settings=Settings(weight=0.0)))
    assert not torch.allclose(followed, alone, atol=1e-3)


@pytest.mark.parametrize("memory", ["lockstep", "recorded"])
def test_inpainting_models_paint_a_picture_from_words(memory, inpainting, upgraded_inpainting, small):
    made = latents(inpainting, upgraded_inpainting, small, replace(JOB, settings=Settings(memory=memory)))
    assert bool(torch.isfinite(made).all())


def test_inpainting_models_are_told_the_mask(inpainting, upgraded_inpainting, small):
    job = replace(JOB, init_image=picture(128), mask=left_half(128), strength=0.7)
    as_told = latents(inpainting, upgraded_inpainting, small, job)
    # the same latents to begin with, and nothing of the picture in the further channels
    everything = Image.new("L", (128, 128), 255)
    all_painted = latents(inpainting, upgraded_inpainting, small, replace(job, mask=everything))
    assert not torch.allclose(as_told[..., :8], all_painted[..., :8], atol=1e-3)


def test_a_controlnet_stands_beside_an_inpainting_model(inpainting, upgraded, small):
    net = load_controlnet(small.controlnet, inpainting.unet, torch.float32)
    job = replace(JOB, control_images=(control_map(64),), control_scales=((1.0,),))
    led = latents(with_controls(inpainting, [net]), upgraded, small, job)
    assert bool(torch.isfinite(led).all())
    assert not torch.allclose(led, latents(inpainting, upgraded, small), atol=1e-3)


def test_a_base_paints_what_diffusers_own_inpainting_pipeline_paints(inpainting, upgraded, small):
    """From words alone, which is a mask of all and a grey picture there."""
    models = Models(inpainting, upgraded)
    request = request_of(models, replace(JOB, steps=4), JOB.settings)
    ours = TwoStages(models, DIFFUSERS_RULES).base_latents(request)
    theirs = StableDiffusionInpaintPipeline(**inpainting.components, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    given = {name: value for name, value in request.base.items() if name not in ("width", "height")}
    made = theirs(
        **given,
        image=torch.zeros(1, 3, 64, 64),
        mask_image=torch.ones(1, 1, 64, 64),
        latents=request.noise.base(),
        strength=1.0,
        num_inference_steps=4,
        output_type="latent",
        width=64,
        height=64,
    ).images
    assert float((ours - made).norm() / made.norm()) < 1e-4
