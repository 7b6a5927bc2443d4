"""The two-stage algorithm, with a host whose models are a few tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from lib_xadapter.errors import UnplannedLevel
from lib_xadapter.evaluations import Evaluation
from lib_xadapter.feature_sources import BaseDenoiser, BaseStep
from lib_xadapter.joint_stage import Coupling, JointStage
from lib_xadapter.recording import LeastRecentlyUsed
from lib_xadapter.rows import batch_rows
from lib_xadapter.taps import TAPS, BaseFeatures, Taps
from lib_xadapter.two_stage import BaseCache, CachedStageOne, Pass, StageOne, check_plan, run

ROWS = batch_rows([1])
EVALUATIONS = tuple(Evaluation(sigma, step, step / 4) for step, sigma in enumerate((8.0, 4.0, 2.0, 1.0)))


class Passing:
    """Mapping layers that give their feature back."""

    adapter = SimpleNamespace(fusion="addition", taps=TAPS, time_channels=None)

    def hidden(self, level: int, feature: Tensor, time_embedding: Tensor) -> Tensor:
        return feature

    def residual(self, level: int, hidden: Tensor) -> Tensor:
        return hidden

    def add(self, level: int, feature: Tensor, hidden: Tensor, weight: float) -> Tensor:
        return feature + weight * hidden

    def release(self) -> None:
        pass


@dataclass
class HostData:
    """What a host keeps beside its stage 1."""

    size: int = 7

    def __str__(self) -> str:
        return "its data"


@dataclass
class SmallHost:
    """A base that gives its latent as feature, and an upgraded model that adds up its residuals.

    Attributes:
        calls: what was done, in order.
        interrupted_by: the call at which the user wants no more.
        failures: calls that run out of video memory, each once.
        evaluations: of the upgraded model's sampler.
        base_is_on_device: whether the base can run.
    """

    calls: list[str] = field(default_factory=list)
    interrupted_by: str = ""
    failures: list[str] = field(default_factory=list)
    told: list[str] = field(default_factory=list)
    evaluations: tuple[Evaluation, ...] = EVALUATIONS
    device: str = "cpu"
    overlap: None = None
    base_is_on_device: bool = False

    @property
    def interrupted(self) -> bool:
        return self.interrupted_by in self.calls

    def _did(self, call: str) -> None:
        self.calls.append(call)
        if call in self.failures:
            self.failures.remove(call)
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    def base_plugins(self) -> Any:
        return nullcontext()

    def sample_base(self) -> StageOne:
        assert self.base_is_on_device
        self._did("stage 1")
        return StageOne(torch.full((1, 4, 2, 2), 0.5), (Image.new("RGB", (4, 2)),))

    def base_noise(self) -> Tensor:
        return torch.ones(1, 4, 2, 2)

    @contextmanager
    def base_denoiser(self, stage_one: StageOne, taps: Taps) -> Iterator[BaseDenoiser]:
        def denoise(latent: Tensor, evaluation: Evaluation) -> BaseStep:
            assert self.base_is_on_device
            self._did(f"base at {evaluation.sigma:g}")
            feature = latent.repeat(2, 1, 1, 1)
            return BaseStep(BaseFeatures((feature,) * 3, torch.zeros(2, 1)), ROWS, latent / 2)

        yield denoise

    def sample_upgraded(
        self, stage_one: StageOne, joint: JointStage | None, planned: Sequence[Evaluation] | None
    ) -> Tensor:
        x = torch.zeros(2, 4, 2, 2)
        for evaluation in self.evaluations:
            at_this_level = joint.evaluate(evaluation, ROWS) if joint is not None else None
            self._did(f"upgraded at {evaluation.sigma:g}")
            if at_this_level is not None:
                x = at_this_level.fuse(0, x, slice(0, 2))
        return x

    def samples_of_base(self, stage_one: StageOne) -> str:
        return "the base's picture"

    def base_to_device(self) -> None:
        self._did("base to device")
        self.base_is_on_device = True

    def upgraded_to_device(self) -> None:
        self._did("upgraded to device")
        self.base_is_on_device = False

    def both_to_device(self) -> None:
        self.base_is_on_device = True

    @contextmanager
    def recording(self, evaluations: int) -> Iterator[Callable[[], None]]:
        self._did(f"recording {evaluations}")
        yield lambda: None

    def host_data(self) -> HostData:
        return HostData()

    def on_stage_one_reused(self, kept: CachedStageOne) -> None:
        self._did(f"found {len(kept.stage_one.pictures)} picture")

    def on_base_skipped(self, kept: CachedStageOne) -> None:
        self._did(f"the base rests, with {kept.host_data}")

    def notify(self, sentence: str) -> None:
        self.told.append(sentence)


def base_calls(host: SmallHost) -> list[str]:
    return [call for call in host.calls if call == "stage 1" or call.startswith("base at")]


@pytest.fixture
def recordings() -> BaseCache:
    return LeastRecentlyUsed(lambda: 2**20)


@pytest.fixture
def coupling() -> Coupling:
    return Coupling(Passing(), (1.0, 0.0, 0.0))


def test_in_lockstep_the_base_runs_before_each_evaluation_of_the_upgraded_model(recordings, coupling):
    host = SmallHost()
    run(host, Pass(coupling, EVALUATIONS), recordings)
    beside = [f"{model} at {sigma}" for sigma in (8, 4, 2, 1) for model in ("base", "upgraded")]
    assert host.calls == ["stage 1", *beside]


def test_recorded_the_base_is_through_before_the_upgraded_model_begins_and_the_samples_are_the_same(
    recordings, coupling
):
    host = SmallHost()
    recorded = run(host, Pass(coupling, EVALUATIONS, recorded=True, key="a"), recordings)
    base = [f"base at {sigma}" for sigma in (8, 4, 2, 1)]
    upgraded = [f"upgraded at {sigma}" for sigma in (8, 4, 2, 1)]
    assert host.calls == ["base to device", "stage 1", "recording 4", *base, "upgraded to device", *upgraded]
    assert torch.equal(recorded, run(SmallHost(), Pass(coupling, EVALUATIONS), recordings))
    assert recorded.abs().sum() > 0


def test_a_base_side_that_was_recorded_before_does_not_run_again(recordings, coupling):
    plan = Pass(coupling, EVALUATIONS, recorded=True, key="a")
    first, host = run(SmallHost(), plan, recordings), SmallHost()
    again = run(host, plan, recordings)
    assert host.calls[:3] == ["upgraded to device", "found 1 picture", "the base rests, with its data"]
    assert not any(call.startswith("base at") for call in host.calls)
    assert torch.equal(again, first)


class TestASeries:
    """Passes that keep what the base makes for those to come, as the cells of a plot do, in either memory mode."""

    @pytest.fixture(params=[False, True], ids=["lockstep", "recorded"])
    def plan(self, coupling, request) -> Pass:
        return Pass(coupling, EVALUATIONS, recorded=request.param, key="a", use_cache=True)

    def test_the_base_runs_once(self, recordings, plan):
        first, host = run(SmallHost(), plan, recordings), SmallHost()
        assert torch.equal(run(host, plan, recordings), first)
        assert not base_calls(host)

    def test_another_weight_finds_the_features_and_nothing_else_changes(self, recordings, plan, coupling):
        run(SmallHost(), plan, recordings)
        host, other = SmallHost(), replace(plan, coupling=replace(coupling, weights=(0.5, 0.0, 0.0)))
        found = run(host, other, recordings)
        assert not base_calls(host)
        assert torch.equal(found, run(SmallHost(), replace(other, key=None), recordings))

    def test_other_noise_levels_find_stage_1_alone(self, recordings, plan):
        run(SmallHost(), plan, recordings)
        host, fewer = SmallHost(evaluations=EVALUATIONS[2:]), replace(plan, evaluations=EVALUATIONS[2:])
        found = run(host, fewer, recordings)
        assert base_calls(host) == ["base at 2", "base at 1"]
        assert torch.equal(found, run(SmallHost(evaluations=EVALUATIONS[2:]), replace(fewer, key=None), recordings))

    def test_without_coupling_stage_1_is_found_and_found_again(self, recordings, plan):
        run(SmallHost(), replace(plan, coupling=None), recordings)
        host = SmallHost()
        run(host, plan, recordings)
        assert base_calls(host) == [f"base at {sigma}" for sigma in (8, 4, 2, 1)]
        host = SmallHost()
        run(host, replace(plan, coupling=None), recordings)
        assert not base_calls(host)

    def test_a_base_that_cannot_resume_goes_through_both_or_neither(self, recordings, plan, coupling):
        whole = replace(plan, can_resume=False)
        run(SmallHost(), replace(whole, coupling=None), recordings)
        host = SmallHost()
        run(host, whole, recordings)
        assert base_calls(host)[0] == "stage 1"
        for rests in (whole, replace(whole, coupling=None)):
            host = SmallHost()
            run(host, rests, recordings)
            assert not base_calls(host)

    def test_interrupted_nothing_is_kept(self, recordings, plan):
        run(SmallHost(interrupted_by="upgraded at 2" if not plan.recorded else "base at 4"), plan, recordings)
        host = SmallHost()
        run(host, plan, recordings)
        assert base_calls(host)[0] == "stage 1"

    def test_what_does_not_fit_is_not_copied_and_stage_1_is_kept_all_the_same(self, plan):
        small = LeastRecentlyUsed(lambda: 4 * 4 * 2 * 2 + 4 * 2 * 3 + HostData.size)
        first = run(SmallHost(), plan, small)
        host = SmallHost()
        assert torch.equal(run(host, plan, small), first)
        assert base_calls(host) == [f"base at {sigma}" for sigma in (8, 4, 2, 1)]

    def test_levels_that_are_not_known_before_are_not_kept(self, recordings, coupling):
        plan = Pass(coupling, None, key="a", use_cache=True)
        for calls in (5, 4):
            host = SmallHost()
            run(host, plan, recordings)
            assert len(base_calls(host)) == calls


def test_in_lockstep_outside_a_series_nothing_is_kept_or_found(recordings, coupling):
    run(SmallHost(), Pass(coupling, EVALUATIONS, recorded=True, key="a"), recordings)
    before, host = recordings.size, SmallHost()
    run(host, Pass(coupling, EVALUATIONS, key="a"), recordings)
    run(SmallHost(), Pass(coupling, EVALUATIONS, key="b"), recordings)
    assert base_calls(host)[0] == "stage 1"
    assert recordings.size == before


def test_what_has_no_key_is_never_found(recordings, coupling):
    plan = Pass(coupling, EVALUATIONS, recorded=True)
    for _ in range(2):
        host = SmallHost()
        run(host, plan, recordings)
        assert "stage 1" in host.calls


@pytest.mark.parametrize("where", ["stage 1", "base at 2", "upgraded at 4"])
def test_without_video_memory_for_both_the_picture_is_made_one_model_after_the_other(recordings, coupling, where):
    expected = run(SmallHost(), Pass(coupling, EVALUATIONS), recordings)
    host = SmallHost(failures=[where])
    samples = run(host, Pass(coupling, EVALUATIONS, may_record=True, key="a"), recordings)
    assert torch.equal(samples, expected)
    assert len(host.told) == 1


@pytest.mark.parametrize(
    "plan",
    [{}, {"may_record": True, "evaluations": None}, {"recorded": True, "may_record": True}],
    ids=["lockstep was asked for", "levels are not known", "recorded already"],
)
def test_otherwise_a_lack_of_video_memory_is_the_callers(recordings, coupling, plan):
    decided = Pass(**{"coupling": coupling, "evaluations": EVALUATIONS, **plan})
    with pytest.raises(torch.cuda.OutOfMemoryError):
        run(SmallHost(failures=["stage 1"]), decided, recordings)


@pytest.mark.parametrize("recorded", [False, True])
def test_without_coupling_the_upgraded_model_only_goes_on_from_the_picture(recordings, recorded):
    host = SmallHost()
    run(host, Pass(None, None, recorded=recorded, key="a"), recordings)
    assert "stage 1" in host.calls
    assert not any(call.startswith("base at") for call in host.calls)


@pytest.mark.parametrize("recorded", [False, True])
def test_interrupted_in_stage_1_the_bases_picture_is_what_there_is(recordings, coupling, recorded):
    host = SmallHost(interrupted_by="stage 1")
    assert run(host, Pass(coupling, EVALUATIONS, recorded, key="a"), recordings) == "the base's picture"
    assert not any(call.startswith("upgraded at") for call in host.calls)


def test_interrupted_while_recording_nothing_is_kept(recordings, coupling):
    plan = Pass(coupling, EVALUATIONS, recorded=True, key="a")
    host = SmallHost(interrupted_by="base at 4")
    assert run(host, plan, recordings) == "the base's picture"
    assert "base at 2" not in host.calls
    assert recordings.find("a") is None


@pytest.mark.parametrize("key", ["a", None])
def test_recorded_at_other_noise_levels_than_planned_the_picture_is_made_in_lockstep(recordings, coupling, key):
    changed = tuple(replace(one, sigma=0.9 * one.sigma) for one in EVALUATIONS)
    expected = run(SmallHost(evaluations=changed), Pass(coupling, None), recordings)
    host = SmallHost(evaluations=changed)
    assert torch.equal(run(host, Pass(coupling, EVALUATIONS, recorded=True, key=key), recordings), expected)
    assert host.told == [
        "the sampler asks for the noise level 7.2, where 8 was recorded, so memory is 'lockstep' for this picture"
    ]


def test_stage_1_of_a_recording_that_could_not_be_used_is_not_made_again(recordings, coupling):
    changed = tuple(replace(one, sigma=0.9 * one.sigma) for one in EVALUATIONS)
    host = SmallHost(evaluations=changed)
    run(host, Pass(coupling, EVALUATIONS, recorded=True, key="a"), recordings)
    assert host.calls.count("stage 1") == 1
    assert "found 1 picture" in host.calls


def test_a_sampler_that_keeps_to_the_plan_passes():
    check_plan(EVALUATIONS, [8.0, 4.0, 2.0])


def test_the_first_noise_level_that_was_not_planned_is_told():
    with pytest.raises(UnplannedLevel, match="evaluation 1 was to be at 4 and was at 5"):
        check_plan(EVALUATIONS, [8.0, 5.0, 2.0])
