"""The `--reference` preset computes what the released pipeline computes, step by step."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
import torch

from lib_xadapter.headless.models import Models
from lib_xadapter.headless.pipeline import RELEASED_RULES, TwoStages
from tests.headless.golden_run import RUNS, GoldenRun, base_pipeline, upgraded_pipeline

GOLDEN = Path(__file__).parents[1] / "golden" / "pipeline.npz"


@pytest.fixture(scope="module")
def golden():
    return numpy.load(GOLDEN)


@pytest.fixture(scope="module")
def pipelines():
    return base_pipeline(), upgraded_pipeline()


@pytest.fixture
def stages(pipelines, adapter):
    return TwoStages(Models(*pipelines, adapter), RELEASED_RULES)


@pytest.fixture(params=RUNS, ids=lambda run: run.name)
def run(request) -> GoldenRun:
    return request.param


def relative_error(ours: torch.Tensor, golden: numpy.ndarray) -> float:
    theirs = torch.from_numpy(golden)
    assert ours.shape == theirs.shape
    return float((ours - theirs).norm() / theirs.norm())


def test_the_base_finishes_with_the_released_latents(stages, run, golden):
    finished = stages.base_latents(run.request())
    assert relative_error(finished, golden[f"{run.name}.prior"]) < 1e-4


def test_every_joint_step_gives_the_released_latents(stages, run, golden):
    request = run.request()
    finished = torch.from_numpy(golden[f"{run.name}.prior"])
    start = torch.from_numpy(golden[f"{run.name}.upgraded.start"])
    steps = stages.joint_steps_of(request)
    assert steps.timesteps.tolist() == golden[f"{run.name}.timesteps"].tolist()
    latents: list[torch.Tensor] = []
    final = stages.joint_stage(request, finished, start, steps, latents.append)
    assert len(latents) == len(steps.timesteps)
    for step, latent in enumerate(latents):
        assert relative_error(latent, golden[f"{run.name}.upgraded.step{step}"]) < 1e-3, f"step {step}"
    assert relative_error(final, golden[f"{run.name}.final"]) < 1e-3


def test_the_switch_carries_the_picture_over_as_released(stages, run, golden):
    """Eight bits and a resize lie between: the latents agree to a grey level here and there."""
    request = run.request()
    finished = torch.from_numpy(golden[f"{run.name}.prior"])
    clean = stages.carried_over(finished, request)
    start = stages.joint_steps_of(request).noised(clean, request.noise.upgraded())
    assert relative_error(start, golden[f"{run.name}.upgraded.start"]) < 1e-3


def test_the_joint_stage_leaves_no_hook_behind(stages, pipelines):
    request = RUNS[3].request()
    stages.upgraded_latents(request, stages.base_latents(request))
    for pipeline in pipelines:
        assert not any(module._forward_hooks for module in pipeline.unet.modules())
