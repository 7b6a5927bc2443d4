"""The base runs once for each model evaluation, and each row gets the residual of its own prompt and image."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lib_xadapter.evaluations import Evaluation, GuidanceWindow
from lib_xadapter.feature_sources import BaseStep, Lockstep, OncePerLevel
from lib_xadapter.joint_stage import Coupling, JointEvaluation, JointStage
from lib_xadapter.mapping import BlockLayout, MappingLayers
from lib_xadapter.mapping_paths import EagerMapping
from lib_xadapter.rows import Row, batch_rows, match_rows
from lib_xadapter.taps import TAPS, BaseFeatures
from lib_xadapter.trajectory import Trajectory


class Doubling:
    """Mapping layers that double their feature, so that a residual tells which row it came from."""

    def __init__(self, fusion: str = "addition") -> None:
        self.mapped_rows: list[int] = []
        self.adapter = SimpleNamespace(fusion=fusion, taps=TAPS)

    def hidden(self, level: int, feature: torch.Tensor, time_embedding: torch.Tensor) -> torch.Tensor:
        self.mapped_rows.append(len(feature))
        return feature

    def residual(self, level: int, hidden: torch.Tensor) -> torch.Tensor:
        return 2 * hidden

    def add(self, level: int, feature: torch.Tensor, hidden: torch.Tensor, weight: float) -> torch.Tensor:
        return feature + weight * self.residual(level, hidden)


class Decoder(nn.Module):
    """A UNet in diffusers layout that gives back its input."""

    def __init__(self) -> None:
        super().__init__()
        self.mid_block, self.up_blocks = nn.Identity(), nn.ModuleList([nn.Identity() for _ in range(3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in (self.mid_block, *self.up_blocks):
            x = block(x)
        return x


@dataclass
class CountingBase:
    """A base whose n-th row has features of the value n + 1."""

    rows: tuple[Row, ...]
    levels: list[float] = field(default_factory=list)

    def __call__(self, latent: torch.Tensor, evaluation: Evaluation) -> BaseStep:
        self.levels.append(evaluation.sigma)
        feature = torch.arange(1.0, len(self.rows) + 1)[:, None, None, None].expand(-1, 1, 2, 2)
        return BaseStep(BaseFeatures((feature,) * 3, torch.zeros(len(self.rows), 1)), self.rows, latent)


def stage_for(base: CountingBase, weights=(1.0, 1.0, 1.0), overlap=None, **coupling) -> JointStage:
    source = OncePerLevel(Lockstep(base, Trajectory(torch.zeros(2, 4, 2, 2))))
    return JointStage(source, Coupling(coupling.pop("mapping", Doubling()), weights, **coupling), overlap)


def added(evaluation: JointEvaluation, rows: slice, count: int) -> list[float]:
    """What a UNet call adds to rows of zeros."""
    unet = Decoder()
    with evaluation.fused_into(unet, rows):
        return unet(torch.zeros(count, 1, 2, 2))[:, 0, 0, 0].tolist()


TWO_IMAGES = batch_rows([1, 1])


@pytest.fixture
def base():
    return CountingBase(TWO_IMAGES)


def at(stage: JointStage, rows=TWO_IMAGES, sigma: float = 5.0, step: int = 0, progress: float = 0.0) -> JointEvaluation:
    return stage.evaluate(Evaluation(sigma, step, progress), rows)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [(slice(0, 4), [6, 12, 18, 24]), (slice(0, 2), [6, 12]), (slice(2, 4), [18, 24]), (slice(1, 2), [12])],
)
def test_a_call_gets_the_residuals_of_its_rows(base, rows, expected):
    assert added(at(stage_for(base)), rows, len(expected)) == expected


def test_a_call_that_is_not_part_of_the_evaluation_gets_none(base):
    at(stage_for(base))
    assert Decoder()(torch.zeros(4, 1, 2, 2)).unique().tolist() == [0]


def test_each_level_has_its_weight(base):
    assert added(at(stage_for(base, (1.0, 0.0, 0.25))), slice(0, 1), 1) == [2.5]


class Refusing(Doubling):
    """Mapping layers whose output convolutions must not run."""

    def residual(self, level, hidden):
        raise AssertionError("a residual that nobody sees")


def test_at_weight_0_the_output_convolution_does_not_run(base):
    joint = stage_for(base, mapping=Refusing(), weights=(0.0, 0.0, 0.0))
    assert added(at(joint), slice(0, 4), 4) == [0, 0, 0, 0]


def test_the_base_runs_once_an_evaluation_at_its_noise_level(base):
    stage = stage_for(base)
    for sigma in (9.0, 4.0, 6.0):
        at(stage, sigma=sigma)
    assert base.levels == [9.0, 4.0, 6.0]


@pytest.mark.parametrize(
    ("progress", "adds", "runs"), [(0.1, False, True), (0.2, True, True), (0.6, True, True), (0.7, False, False)]
)
def test_outside_its_window_the_adapter_adds_nothing_and_after_it_the_base_rests(base, progress, adds, runs):
    stage = at(stage_for(base, window=GuidanceWindow(0.2, 0.6)), progress=progress)
    assert (added(stage, slice(0, 1), 1) != [0]) == adds
    assert bool(base.levels) == runs


def test_conds_of_one_image_get_each_its_own():
    rows = batch_rows([2, 1])
    stage = at(stage_for(CountingBase(rows)), rows)
    assert added(stage, slice(0, 5), 5) == [6, 12, 18, 24, 30]


def test_a_base_with_fewer_conds_serves_them_all():
    stage = at(stage_for(CountingBase(TWO_IMAGES)), batch_rows([3, 1]))
    assert added(stage, slice(0, 6), 6) == [6, 6, 6, 12, 18, 24]


def test_a_base_with_more_conds_gives_their_mean():
    stage = at(stage_for(CountingBase(batch_rows([2, 2]))), TWO_IMAGES)
    assert added(stage, slice(0, 4), 4) == [9, 21, 30, 36]


def test_skipped_unconds_are_simply_not_there():
    assert match_rows(batch_rows([1, 1], with_uncond=False), TWO_IMAGES) == ((0,), (1,))


def test_an_evaluation_gives_the_same_whatever_comes_after_it(base):
    stage = stage_for(base)
    first = at(stage, sigma=9.0)
    at(stage, sigma=4.0, progress=0.5)
    assert added(first, slice(0, 1), 1) == added(first, slice(0, 1), 1) == [6]


def test_the_fusion_is_the_adapters_own(base):
    """Guidance goes from the feature, here 0, towards the residual at each of the three levels."""
    stage = stage_for(base, (0.5, 0.5, 0.5), mapping=Doubling("guidance"))
    assert added(at(stage), slice(0, 1), 1) == [2 * (1 - 0.5**3)]


def test_gradients_reach_the_mapping_layers_where_the_caller_wants_them():
    layers = MappingLayers([[BlockLayout(1, 1)]] * 3)
    stage = stage_for(CountingBase(TWO_IMAGES), mapping=EagerMapping(layers))
    unet = Decoder()
    with at(stage).fused_into(unet, slice(0, 4)):
        unet(torch.zeros(4, 1, 2, 2)).sum().backward()
    assert all(parameter.grad is not None for parameter in layers.parameters())


def test_two_evaluations_at_one_noise_level_are_one_of_the_base(base):
    """Heun's method ends a step where the next begins."""
    stage = stage_for(base)
    for sigma in (9.0, 4.0, 4.0, 2.0):
        assert added(at(stage, sigma=sigma), slice(0, 1), 1) == [6]
    assert base.levels == [9.0, 4.0, 2.0]


class TestRefreshing:
    """With `refresh_every`, what the base gave at one step serves the next ones."""

    def test_the_base_runs_at_every_nth_step(self, base):
        stage = stage_for(base, window=GuidanceWindow(refresh_every=3))
        for step, sigma in enumerate((9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0)):
            assert added(at(stage, sigma=sigma, step=step), slice(0, 4), 4) == [6, 12, 18, 24]
        assert base.levels == [9.0, 6.0, 3.0]

    def test_held_features_find_their_rows_among_others(self, base):
        stage = stage_for(base, window=GuidanceWindow(refresh_every=2))
        at(stage)
        held = at(stage, rows=batch_rows([3, 1]), step=1)
        assert added(held, slice(0, 6), 6) == [6, 6, 6, 12, 18, 24]
        assert len(base.levels) == 1

    def test_features_found_before_the_adapter_starts_serve_when_it_does(self, base):
        stage = stage_for(base, window=GuidanceWindow(start=0.4, refresh_every=4))
        for step, expected in enumerate((0, 0, 6, 6)):
            assert added(at(stage, step=step, progress=step / 4), slice(0, 1), 1) == [expected]
        assert len(base.levels) == 1


class TestCondOnly:
    """Only the rows of the prompt are mapped, and both halves get their residuals."""

    @pytest.mark.parametrize(
        ("rows", "expected"),
        [(slice(0, 4), [6, 12, 6, 12]), (slice(1, 3), [12, 6]), (slice(0, 2), [6, 12]), (slice(2, 4), [6, 12])],
    )
    def test_rows_of_the_negative_prompt_follow_those_of_the_prompt(self, base, rows, expected):
        mapping = Doubling()
        stage = at(stage_for(base, mapping=mapping, cond_only=True))
        assert added(stage, rows, len(expected)) == expected
        assert mapping.mapped_rows == [2, 2, 2]

    def test_wherever_they_stand(self, base):
        uncond_first = (*TWO_IMAGES[2:], *TWO_IMAGES[:2])
        stage = at(stage_for(base, cond_only=True), rows=uncond_first)
        assert added(stage, slice(0, 4), 4) == [6, 12, 6, 12]

    def test_several_conds_lead_the_uncond_by_their_mean(self):
        rows = batch_rows([2])
        stage = at(stage_for(CountingBase(rows), cond_only=True), rows)
        assert added(stage, slice(0, 3), 3) == [6, 12, 9]


class TestUncondWeight:
    """The negative prompt's rows get a share of the weights, whatever rows a call of the UNet holds."""

    @pytest.mark.parametrize(
        ("rows", "expected"),
        [(slice(0, 4), [6, 12, 9, 12]), (slice(1, 3), [12, 9]), (slice(0, 2), [6, 12]), (slice(2, 4), [9, 12])],
    )
    def test_unconds_get_their_share(self, base, rows, expected):
        assert added(at(stage_for(base, uncond_weight=0.5)), rows, len(expected)) == expected

    @pytest.mark.parametrize("fusion", ["addition", "guidance"])
    def test_without_a_share_their_output_convolution_does_not_run(self, base, fusion):
        joint = stage_for(base, mapping=Refusing(fusion), uncond_weight=0.0)
        assert added(at(joint), slice(2, 4), 2) == [0, 0]

    def test_without_a_share_they_stay_as_they_are(self, base):
        assert added(at(stage_for(base, uncond_weight=0.0)), slice(0, 4), 4) == [6, 12, 0, 0]

    def test_wherever_they_stand(self, base):
        uncond_first = (*TWO_IMAGES[2:], *TWO_IMAGES[:2])
        stage = at(stage_for(base, uncond_weight=0.5), rows=uncond_first)
        assert added(stage, slice(0, 4), 4) == [9, 12, 6, 12]

    def test_every_fusion_knows_it(self, base):
        stage = at(stage_for(base, mapping=Doubling("guidance"), uncond_weight=0.0))
        assert added(stage, slice(0, 4), 4)[2:] == [0, 0]


@dataclass
class SideStream:
    """An overlap whose work is late: what is made on it holds nothing until it has been waited for."""

    inside: bool = False
    work: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """(what was given out, what it will hold)."""

    def begin(self) -> None:
        pass

    @contextmanager
    def on_side_stream(self) -> Iterator[None]:
        self.inside = True
        yield
        self.inside = False

    def late(self, value: Tensor) -> Tensor:
        assert self.inside
        self.work.append((torch.full_like(value, torch.nan), value))
        return self.work[-1][0]

    def finished(self) -> int:
        return len(self.work)

    def wait_for(self, event: int, tensor: Tensor) -> None:
        for given_out, value in self.work[:event]:
            given_out.copy_(value)

    def end(self) -> None:
        self.wait_for(len(self.work), torch.empty(0))


class LateDoubling(Doubling):
    """Mapping layers at work on the side stream."""

    def __init__(self, overlap: SideStream) -> None:
        super().__init__()
        self.overlap = overlap

    def hidden(self, level: int, feature: Tensor, time_embedding: Tensor) -> Tensor:
        return self.overlap.late(super().hidden(level, feature, time_embedding))


class TestOverlap:
    """The base's work is put beside the upgraded model's, and each level waited for when it is needed."""

    @pytest.fixture
    def overlap(self):
        return SideStream()

    @pytest.fixture
    def evaluation(self, base, overlap):
        return at(stage_for(base, overlap=overlap, mapping=LateDoubling(overlap)))

    def test_the_base_waits_for_the_first_residual(self, base, evaluation):
        assert base.levels == []
        evaluation.fuse(0, torch.zeros(4, 1, 2, 2), slice(0, 4))
        assert base.levels == [5.0]

    def test_no_level_is_used_before_it_is_finished(self, evaluation):
        assert added(evaluation, slice(0, 4), 4) == [6, 12, 18, 24]

    def test_no_level_waits_for_a_later_one(self, overlap, evaluation):
        evaluation.fuse(0, torch.zeros(4, 1, 2, 2), slice(0, 4))
        assert [bool(given_out.isnan().any()) for given_out, _ in overlap.work] == [False, True, True]

    def test_the_base_runs_on_the_side_stream(self, base, overlap):
        def beside(latent: Tensor, evaluation: Evaluation) -> BaseStep:
            assert overlap.inside
            return base(latent, evaluation)

        assert added(at(stage_for(beside, overlap=overlap)), slice(0, 1), 1) == [6]

    def test_slices_of_one_evaluation_share_one_run_of_the_base(self, base):
        evaluation = at(stage_for(base, overlap=SideStream()))
        for rows, expected in ((slice(0, 2), [6, 12]), (slice(2, 4), [18, 24])):
            assert added(evaluation, rows, 2) == expected
        assert len(base.levels) == 1


class NothingReadBack(TorchFunctionMode):
    """Refuses what would make the CPU wait for a GPU: numbers read back, and lists of indices sent over."""

    NUMBERS = ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__")
    INDICES = ("nonzero", "masked_select", "index_put")

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        by_list = name == "__getitem__" and isinstance(args[1], (list, Tensor))
        if name in (*self.NUMBERS, *self.INDICES) or by_list:
            raise AssertionError(f"{name} waits for the GPU")
        return function(*args, **(kwargs or {}))


class TestNoWaiting:
    """Nothing in the step loop makes the CPU wait for a GPU."""

    @pytest.mark.parametrize("rows", [TWO_IMAGES, batch_rows([2, 1])], ids=["alike", "several conds"])
    @pytest.mark.parametrize("cond_only", [False, True])
    def test_not_for_a_number_and_not_for_an_index(self, base, rows, cond_only):
        stage, unet = stage_for(base, cond_only=cond_only), Decoder()
        with NothingReadBack():
            for step, sigma in enumerate((9.0, 4.0, 6.0)):
                evaluation = at(stage, rows=rows, sigma=sigma, step=step)
                for part in (slice(0, len(rows)), slice(1, 3)):
                    with evaluation.fused_into(unet, part):
                        unet(torch.zeros(len(rows[part]), 1, 2, 2))

    @pytest.mark.parametrize(
        "wait",
        [lambda x: x[[0, 1]], lambda x: x.tolist(), lambda x: x[0].item(), lambda x: float(x[0]), lambda x: bool(x[0])],
    )
    def test_what_waits_is_noticed(self, wait):
        numbers = torch.zeros(2)
        with pytest.raises(AssertionError, match="waits for the GPU"), NothingReadBack():
            wait(numbers)
