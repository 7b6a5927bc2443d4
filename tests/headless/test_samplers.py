"""Every sampler walks both stages, and a switch point means what it means in the WebUI."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from lib_xadapter import load_adapter
from lib_xadapter.errors import WrongArgument
from lib_xadapter.headless.job import Job, half
from lib_xadapter.headless.jobs import request_of
from lib_xadapter.headless.model_files import load_base, load_upgraded
from lib_xadapter.headless.models import Models, noise_schedule_of
from lib_xadapter.headless.noise_schedule import NoiseSchedule
from lib_xadapter.headless.pipeline import RELEASED_RULES, WEBUI_RULES, NoisePerImage, TwoStages
from lib_xadapter.headless.sampler_table import SAMPLERS, sampler_named
from lib_xadapter.headless.samplers import released_steps, webui_steps
from lib_xadapter.headless.schedulers import denoised_from
from lib_xadapter.settings import Settings


@pytest.fixture(scope="module")
def models(small):
    return Models(
        load_base(small.base, torch.float32, small.tokenizer),
        load_upgraded(small.upgraded, torch.float32, small.tokenizer),
        load_adapter(small.adapter),
    )


@pytest.mark.parametrize("rules", [WEBUI_RULES, RELEASED_RULES], ids=["webui", "released"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_finishes_both_stages(sampler, rules, models):
    job = Job(width=64, height=64, steps=4, sampler=sampler)
    stages, request = TwoStages(models, rules), request_of(models, job, job.settings)
    latents = stages.upgraded_latents(request, stages.base_latents(request))
    assert latents.shape == (1, 4, 8, 8)
    assert bool(torch.isfinite(latents).all())
    assert latents.std() < 20


def evaluations(rule, models, sampler: str, switch_point: float | None) -> list[float]:
    """The timesteps of the model evaluations, of 20 steps in all."""
    return rule(sampler, models.base.scheduler, 20, switch_point, "cpu").timesteps.tolist()


@pytest.mark.parametrize(
    ("switch_point", "on_levels", "on_timesteps", "released"),
    [(None, 20, 19, 20), (1.0, 20, 18, 20), (0.8, 17, 15, 16), (0.5, 11, 9, 10), (0.0, 1, 1, 1)],
)
def test_the_switch_point_is_the_hosts_denoising_strength(switch_point, on_levels, on_timesteps, released, models):
    assert len(evaluations(webui_steps, models, "DPM++ 2M", switch_point)) == on_levels
    assert len(evaluations(webui_steps, models, "DDIM", switch_point)) == on_timesteps
    assert len(evaluations(released_steps, models, "DDIM", switch_point)) == released


def test_plms_looks_twice_at_its_second_timestep_wherever_it_begins(models):
    assert evaluations(webui_steps, models, "PLMS", 0.25) == [201, 151, 151, 101, 51]
    assert evaluations(released_steps, models, "PLMS", 0.25) == [201, 151, 151, 101, 51, 1]


def test_noise_levels_are_not_rounded_to_whole_timesteps(models):
    """They would be other levels than the WebUI's."""
    steps = webui_steps("DPM++ 2M", models.base.scheduler, 8, None, "cpu")
    schedule = noise_schedule_of(models.base)
    levels = [schedule.sigma_at(timestep) for timestep in steps.timesteps.tolist()]
    assert levels == pytest.approx(steps.scheduler.sigmas[:-1].tolist(), rel=1e-5)


def test_the_adapter_ends_with_its_window(models, monkeypatch):
    """After it the base rests: no evaluation is spent on it."""
    calls = []
    monkeypatch.setattr(models.base.unet, "forward", counted(models.base.unet.forward, calls))
    job = Job(width=64, height=64, steps=4, settings=Settings(guidance_end=0.5, single_stage=True))
    stages = TwoStages(models)
    stages.upgraded_latents(request_of(models, job, job.settings), None)
    assert len(calls) == 3


def counted(forward, calls):
    def count(*arguments, **named):
        calls.append(arguments)
        return forward(*arguments, **named)

    return count


def test_a_base_without_guidance_leads_guided_sdxl(models):
    job = Job(width=64, height=64, steps=2, settings=Settings(base_cfg_scale=1.0))
    request = request_of(models, job, job.settings)
    assert request.base["negative_prompt_embeds"] is not None
    stages = TwoStages(models)
    assert bool(torch.isfinite(stages.upgraded_latents(request, stages.base_latents(request))).all())


def test_timesteps_and_noise_levels_lead_back_and_forth(models):
    schedule = noise_schedule_of(models.base)
    for timestep in (0, 1, 500, 701.5, 999):
        assert schedule.timestep_at(schedule.sigma_at(timestep)) == pytest.approx(timestep, abs=1e-6)
    assert schedule.sigma_at(999) == pytest.approx(14.6146, rel=1e-3)
    assert schedule.sigma_at(0) == pytest.approx(0.0292, rel=1e-2)


def test_a_zero_snr_schedule_ends_in_a_finite_level():
    assert math.isfinite(NoiseSchedule(torch.tensor([0.9, 0.5, 0.0])).sigma_at(2))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_clean_latent_follows_from_every_prediction(prediction_type):
    sigma, clean, noise = 2.5, torch.full((1, 4, 2, 2), 3.0), torch.randn(1, 4, 2, 2)
    alpha = 1 / math.sqrt(1 + sigma**2)
    velocity = alpha * noise - sigma * alpha * clean
    predicted = {"epsilon": noise, "v_prediction": velocity, "sample": clean}[prediction_type]
    torch.testing.assert_close(denoised_from(predicted, clean + sigma * noise, sigma, prediction_type), clean)


def test_half_a_size_is_a_multiple_of_8():
    assert [half(size) for size in (1024, 1048, 136, 64)] == [512, 520, 64, 64]


def test_an_unknown_sampler_is_told_with_all_there_are():
    with pytest.raises(WrongArgument, match=r"'sampler' is 'x', expected one of DPM\+\+ 2M, .*UniPC"):
        sampler_named("x")


def test_images_of_a_batch_start_from_their_own_base_pictures(models):
    """The released code starts all of them from the first one's."""
    job = Job(width=64, height=64, steps=2, batch=2)
    stages, request = TwoStages(models), request_of(models, job, job.settings)
    finished = stages.base_latents(request)
    together = stages.carried_over(finished, request)
    alone = stages.carried_over(
        finished[1:], dataclasses.replace(request, images=1, noise=NoisePerImage(request.noise.noises[1:]))
    )
    torch.testing.assert_close(together[1:], alone)
    assert not torch.allclose(together[0], together[1])
