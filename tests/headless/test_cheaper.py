"""Recorded, refreshed now and then, for the prompt alone: what each way saves, and what of the picture it keeps."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lib_xadapter import load_adapter
from lib_xadapter.headless.job import Job
from lib_xadapter.headless.jobs import Picture, make_pictures
from lib_xadapter.headless.model_files import load_base, load_upgraded
from lib_xadapter.headless.models import Models, Placement
from lib_xadapter.headless.sampler_table import SAMPLERS
from lib_xadapter.settings import Settings
from tests.pictures import grey_levels_apart, mean_difference

STEPS = 5
JOINT_STEPS = 5  # with a switch point of 0.8


@pytest.fixture(scope="module")
def models(small):
    return Models(
        load_base(small.base, torch.float32, small.tokenizer),
        load_upgraded(small.upgraded, torch.float32, small.tokenizer),
        load_adapter(small.adapter),
    )


def job(sampler: str = "Euler", **settings) -> Job:
    weights = settings.pop("weights", (1.0,))
    return Job(
        "a cat", width=128, height=96, steps=STEPS, sampler=sampler, weights=weights, settings=Settings(**settings)
    )


def pictures(models: Models, job: Job) -> list[Picture]:
    return list(make_pictures(models, job))


class CallCounter:
    """Counts the calls of a module while it is open."""

    def __init__(self, module: nn.Module) -> None:
        self._module, self.calls = module, 0

    def __enter__(self) -> CallCounter:
        self._hook = self._module.register_forward_pre_hook(self._count)
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()

    def _count(self, *_: object) -> None:
        self.calls += 1


def calls_of_base(models: Models, job: Job) -> int:
    with CallCounter(models.base.unet) as counter:
        pictures(models, job)
    return counter.calls


class TestRecorded:
    @pytest.mark.parametrize("sampler", SAMPLERS)
    def test_the_picture_is_that_of_lockstep(self, models, sampler):
        beside, recorded = (pictures(models, job(sampler, memory=memory)) for memory in ("lockstep", "recorded"))
        assert grey_levels_apart(beside[0].image, recorded[0].image) == 0

    @pytest.mark.parametrize(
        "given",
        [
            {"single_stage": True},
            {"refresh_every": 2},
            {"cond_only": True},
            {"uncond_weight": 0},
            {"guidance_end": 0.5},
        ],
        ids=str,
    )
    def test_also_together_with_other_settings(self, models, given):
        beside, recorded = (pictures(models, job(memory=memory, **given)) for memory in ("lockstep", "recorded"))
        assert grey_levels_apart(beside[0].image, recorded[0].image) <= 1

    def test_the_base_runs_once_for_all_weights(self, models):
        weights = (0.0, 0.5, 1.0)
        assert calls_of_base(models, job(weights=weights, memory="recorded")) == STEPS + JOINT_STEPS
        assert calls_of_base(models, job(weights=weights, memory="lockstep")) == STEPS + 2 * JOINT_STEPS

    def test_each_weight_makes_its_own_picture(self, models):
        weights = (0.5, 1.0)
        for weight, made in zip(weights, pictures(models, job(weights=weights, memory="recorded")), strict=True):
            alone = pictures(models, job(weights=(weight,), memory="lockstep"))
            assert grey_levels_apart(made.image, alone[0].image) <= 1

    def test_base_and_upgraded_model_are_never_on_the_device_together(self, models, monkeypatch):
        there: set[nn.Module] = set()
        unets = {models.base.unet, models.upgraded.unet}

        def move(module: nn.Module, to: str) -> nn.Module:
            if module in unets:
                (there.discard if to == "cpu" else there.add)(module)
                assert len(there) < 2
                moved.append(to)
            return module

        moved: list[str] = []
        for unet in unets:
            monkeypatch.setattr(unet, "to", lambda to, unet=unet: move(unet, to))
        elsewhere = Placement(device=torch.device("cpu", 0))
        list(make_pictures(Models(models.base, models.upgraded, models.adapter, elsewhere), job(memory="recorded")))
        assert len(moved) >= 6
        assert not there


class TestCheaper:
    @pytest.mark.parametrize(("every", "runs"), [(1, 5), (2, 3), (3, 2), (9, 1)])
    def test_the_base_runs_at_every_nth_joint_step(self, models, every, runs):
        assert calls_of_base(models, job(refresh_every=every)) == STEPS + runs

    @pytest.mark.parametrize("given", [{"refresh_every": 2}, {"cond_only": True}], ids=str)
    def test_the_picture_is_another_and_nearer_to_the_full_result_than_to_none(self, models, given):
        full, cheaper, without = (
            pictures(models, job(**settings, weights=(weight,)))[0].image
            for settings, weight in (({}, 1.0), (given, 1.0), ({}, 0.0))
        )
        assert 0 < mean_difference(cheaper, full) < mean_difference(cheaper, without)
