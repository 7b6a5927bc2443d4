"""`--base-start "control image"`: the base paints over the first control image, as in the paper's tile pipeline."""

from __future__ import annotations

import dataclasses

import numpy
import pytest
import torch
from diffusers import StableDiffusionControlNetImg2ImgPipeline
from PIL import Image

from lib_xadapter.headless.job import Job
from lib_xadapter.headless.jobs import request_of
from lib_xadapter.headless.model_files import load_base, load_controlnet, load_upgraded
from lib_xadapter.headless.models import Models, with_controls
from lib_xadapter.headless.pipeline import RELEASED_RULES, WEBUI_RULES, NoisePerImage, TwoStages
from lib_xadapter.headless.sampler_table import RELEASED_SPACING, sampler_named
from lib_xadapter.settings import CONTROL_IMAGE, Settings
from tests.pictures import control_map

SEED = 5
MAP = control_map(96)
JOB = Job(
    prompt="a cat",
    settings=Settings(base_start=CONTROL_IMAGE),
    width=128,
    height=128,
    steps=4,
    control_images=(MAP,),
    control_scales=((0.5,),),
)


@pytest.fixture(scope="module")
def models(small) -> Models:
    base = load_base(small.base, torch.float32, small.tokenizer)
    upgraded = load_upgraded(small.upgraded, torch.float32, small.tokenizer)
    net = load_controlnet(small.controlnet, base.unet, torch.float32)
    return Models(with_controls(base, [net]), upgraded, None)


def base_latents(models: Models, job: Job, rules=WEBUI_RULES) -> torch.Tensor:
    """As `make_pictures` makes them, with the random numbers of the diffusers pipeline below."""
    request = request_of(models, job, job.settings, (0.5,))
    generator = torch.Generator().manual_seed(SEED)
    torch.randn((1, 4, 8, 8), generator=generator)
    noise = torch.randn((1, 4, 8, 8), generator=generator)
    noises = [
        dataclasses.replace(given, base=noise[0], base_encoding=torch.Generator().manual_seed(SEED))
        for given in request.noise.noises
    ]
    return TwoStages(models, rules).base_latents(dataclasses.replace(request, noise=NoisePerImage(noises)))


def diffusers_latents(models: Models, job: Job, scheduler_options: dict) -> torch.Tensor:
    """Of diffusers' own img2img pipeline at strength 1, which draws for its VAE first and then the noise."""
    base, told = models.base, request_of(models, job, job.settings, (0.5,)).base
    pipeline = StableDiffusionControlNetImg2ImgPipeline(
        vae=base.vae,
        text_encoder=base.text_encoder,
        tokenizer=base.tokenizer,
        unet=base.unet,
        controlnet=base.controlnet,
        scheduler=sampler_named(job.sampler).make(base.scheduler.config, **scheduler_options),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        prompt_embeds=told["prompt_embeds"],
        negative_prompt_embeds=told["negative_prompt_embeds"],
        image=MAP.convert("RGB").resize(job.base_size, Image.Resampling.LANCZOS),
        control_image=MAP.convert("RGB").resize(job.base_size),
        controlnet_conditioning_scale=0.5,
        strength=1.0,
        num_inference_steps=job.steps,
        guidance_scale=job.cfg_scale,
        generator=torch.Generator().manual_seed(SEED),
        output_type="latent",
    ).images


@pytest.mark.parametrize(
    ("sampler", "rules", "spacing"),
    [
        ("Euler", WEBUI_RULES, {}),
        ("Heun", WEBUI_RULES, {}),
        ("Euler", RELEASED_RULES, RELEASED_SPACING),
        ("DPM++ 2M", RELEASED_RULES, RELEASED_SPACING),
    ],
    ids=["Euler", "Heun", "Euler, released", "DPM++ 2M, released"],
)
def test_the_bases_latents_are_those_of_diffusers_img2img(models, sampler, rules, spacing):
    job = dataclasses.replace(JOB, sampler=sampler)
    ours, theirs = base_latents(models, job, rules), diffusers_latents(models, job, spacing)
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-4
    from_noise = base_latents(models, dataclasses.replace(job, settings=Settings()), rules)
    assert float((ours - from_noise).norm() / theirs.norm()) > 1e-3


def test_a_picture_in_a_batch_is_the_one_made_alone(models):
    def latents(**changes) -> torch.Tensor:
        job = dataclasses.replace(JOB, **changes)
        return TwoStages(models).base_latents(request_of(models, job, job.settings, (0.5,)))

    batch = latents(seed=3, batch=2)
    for image, seed in zip(batch, (3, 4), strict=True):
        alone = latents(seed=seed)[0]
        assert float((image - alone).norm() / alone.norm()) < 1e-4


def test_the_command_takes_the_first_control_image(generate, control_image):
    control = ["--controlnet", "small-edges", "--control-image", str(control_image)]
    assert generate(*control) == 0
    assert generate(*control, "--base-start", CONTROL_IMAGE) == 0
    from_noise, over_it = map(Image.open, generate.pictures())
    text, without = over_it.text["parameters"], from_noise.text["parameters"]
    assert numpy.abs(numpy.asarray(from_noise, dtype=int) - numpy.asarray(over_it, dtype=int)).max() > 1
    assert "X-Adapter base start: control image" in text
    assert "base start" not in without
