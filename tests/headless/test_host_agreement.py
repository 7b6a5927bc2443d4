"""Two hosts on one core: diffusers' classes and ldm's give the same latents from the same files, noise and schedule."""

from __future__ import annotations

import pytest
import safetensors.torch
import torch

from lib_xadapter import load_adapter
from lib_xadapter.headless.job import Job
from lib_xadapter.headless.jobs import request_of
from lib_xadapter.headless.model_files import load_base, load_upgraded
from lib_xadapter.headless.models import Models
from lib_xadapter.headless.pipeline import RELEASED_RULES, TwoStages
from lib_xadapter.settings import Settings
from tests import small_models

pytest.importorskip("ldm", reason="needs the ldm classes (stable-diffusion-sdkit, einops, omegaconf)")

JOB = Job(
    prompt="a (cat:1.3) on a mat",
    negative_prompt="blurred",
    settings=Settings(switch_point=0.8, weight=(1.0, 0.7, 1.2)),
    width=256,
    height=128,
    steps=5,
    sampler="DDIM",
    seed=3,
)


@pytest.fixture(scope="module")
def files(tmp_path_factory, small):
    """The small checkpoints, SDXL with the depth that ldm's class can have."""
    folder = tmp_path_factory.mktemp("agreement")
    unet = small_models.seeded(small_models.upgraded_unet((1, 1, 1)), "shallow")
    weights = safetensors.torch.load_file(small.upgraded)
    kept = {key: value for key, value in weights.items() if not key.startswith(small_models.UNET_PREFIX)}
    path = folder / "shallow-sdxl.safetensors"
    safetensors.torch.save_file(kept | small_models.unet_tensors(unet), path)
    return small.base, path


@pytest.fixture(scope="module")
def diffusers_models(files, small):
    base, upgraded = files
    return Models(
        load_base(base, torch.float32, small.tokenizer),
        load_upgraded(upgraded, torch.float32, small.tokenizer),
        load_adapter(small.adapter),
    )


@pytest.fixture(scope="module")
def compvis(files, diffusers_models):
    from tests.headless.compvis_host import CompVisHost, CompVisVae, compvis_base, compvis_upgraded

    base, upgraded = map(safetensors.torch.load_file, files)
    return CompVisHost(
        compvis_base(base),
        compvis_upgraded(upgraded),
        CompVisVae(base, 0.18215),
        CompVisVae(upgraded, 0.13025),
        diffusers_models.adapter,
    )


@pytest.fixture
def request_made(diffusers_models):
    return request_of(diffusers_models, JOB, JOB.settings)


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours - theirs).norm() / theirs.norm())


def test_both_hosts_finish_the_base_with_the_same_latents(diffusers_models, compvis, request_made):
    ours = TwoStages(diffusers_models, RELEASED_RULES).base_latents(request_made)
    assert relative_error(ours, compvis.base_latents(request_made)) < 1e-3


def test_both_hosts_finish_the_picture_with_the_same_latents(diffusers_models, compvis, request_made):
    stages = TwoStages(diffusers_models, RELEASED_RULES)
    finished = stages.base_latents(request_made)
    joint_steps = len(stages.joint_steps_of(request_made).timesteps)
    theirs = compvis.upgraded_latents(request_made, finished, JOB.size, joint_steps)
    ours = stages.upgraded_latents(request_made, finished)
    assert relative_error(ours, theirs) < 1e-3


def test_the_adapter_acts_in_both(diffusers_models, compvis, request_made):
    """Lest two hosts agree on doing nothing."""
    stages = TwoStages(diffusers_models, RELEASED_RULES)
    finished = stages.base_latents(request_made)
    plain = request_of(diffusers_models, JOB, Settings(switch_point=0.8, weight=0.0))
    guided, alone = (stages.upgraded_latents(asked, finished) for asked in (request_made, plain))
    assert relative_error(guided, alone) > 1e-2
