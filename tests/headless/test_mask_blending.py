"""What inpainting keeps: each rule, held against what it says of the part outside the mask."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler

from lib_xadapter.headless.mask_blending import BlendBeforeUNet, BlendNoised, BlendPrediction, MaskBlending
from lib_xadapter.headless.noise_schedule import NoiseSchedule
from lib_xadapter.headless.sampler_table import SAMPLERS
from lib_xadapter.headless.samplers import diffusers_steps, webui_steps
from lib_xadapter.headless.schedulers import GivenSteps

CONFIG = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULE = NoiseSchedule(DDIMScheduler(**CONFIG).alphas_cumprod)
CLEAN = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1))
NOISE = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(2))
MASK = torch.zeros(1, 1, 4, 4)
MASK[..., 2:] = 1
OUTSIDE, INSIDE = (..., slice(0, 2)), (..., slice(2, 4))


def sampled(sampler: str, kept: MaskBlending | None, predicts: str = "epsilon") -> list[tuple[float, torch.Tensor]]:
    """(σ, what the UNet was given) of each step, with a model that knows nothing; last (0, the finished latent)."""
    steps = webui_steps(sampler, SAMPLERS["Euler"].make({**CONFIG, "prediction_type": predicts}), 6, 0.7, "cpu")
    scheduler = GivenSteps(steps, torch.float32, True, kept)
    latent, found = steps.noised(CLEAN, NOISE), []
    for timestep in scheduler.timesteps:
        given = scheduler.scale_model_input(torch.cat([latent, latent]), timestep)
        found.append((SCHEDULE.sigma_at(float(timestep)), given[:2]))
        assert torch.equal(given[:2], given[2:])
        (latent,) = scheduler.step(given[:2].tanh(), timestep, latent, return_dict=False)
    return [*found, (0.0, latent)]


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("sampler", ["Euler", "DPM++ 2M", "Heun"])
def test_what_is_predicted_outside_the_mask_stays_the_picture_at_its_noise_level(sampler, predicts):
    kept = sampled(sampler, BlendPrediction(CLEAN, MASK, SCHEDULE, predicts), predicts)
    free = sampled(sampler, None, predicts)
    for (sigma, latent), (_, other) in zip(kept, free, strict=True):
        noised = (CLEAN + sigma * NOISE) / math.sqrt(1 + sigma**2)
        assert torch.allclose(latent[OUTSIDE], noised[OUTSIDE], atol=5e-3)
        assert torch.allclose(latent[INSIDE], other[INSIDE], atol=1e-6)
    assert torch.equal(kept[-1][1][OUTSIDE], CLEAN[OUTSIDE])


def test_on_timesteps_the_model_sees_the_picture_itself():
    kept, free = sampled("DDIM", BlendBeforeUNet(CLEAN, MASK)), sampled("DDIM", None)
    for (_, latent), (_, other) in zip(kept, free, strict=True):
        assert torch.equal(latent[OUTSIDE], CLEAN[OUTSIDE])
        assert torch.allclose(latent[INSIDE], other[INSIDE], atol=1e-6)


def test_by_noise_each_step_ends_with_the_picture_at_the_next_level():
    steps = diffusers_steps(None, EulerDiscreteScheduler(**CONFIG), 4, None, "cpu")
    kept = BlendNoised(CLEAN, MASK, NOISE)
    for place in range(4):
        latent = kept.stepped(torch.zeros(2, 4, 4, 4), steps, place)
        level = float(steps.scheduler.sigmas[place + 1])
        assert torch.allclose(latent[OUTSIDE], (CLEAN + level * NOISE)[OUTSIDE], atol=1e-5)
        assert not latent[INSIDE].any()
