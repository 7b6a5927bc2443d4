"""The base runs once for each model evaluation, and each row gets the residual of its own prompt and image."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

from lib_xadapter.joint_stage import BaseStep, JointStage, Window
from lib_xadapter.rows import Row, batch_rows, match_rows
from lib_xadapter.taps import BaseFeatures
from lib_xadapter.trajectory import Trajectory


class Doubling(nn.Module):
    """Mapping layers that double their feature, so that a residual tells which row it came from."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(2.0), requires_grad=False)

    def map_level(self, level: int, feature: torch.Tensor, time_embedding: torch.Tensor) -> torch.Tensor:
        return self.factor * feature


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

    def __call__(self, latent: torch.Tensor, sigma: float) -> BaseStep:
        self.levels.append(sigma)
        feature = torch.arange(1.0, len(self.rows) + 1)[:, None, None, None].expand(-1, 1, 2, 2)
        return BaseStep(latent, BaseFeatures((feature,) * 3, torch.zeros(len(self.rows), 1)), self.rows)


def stage_for(base: CountingBase, weights=(1.0, 1.0, 1.0), window: Window | None = None) -> JointStage:
    return JointStage(base, Trajectory(torch.zeros(2, 4, 2, 2)), Doubling(), weights, window)


def added(stage: JointStage, rows: slice | None, count: int) -> list[float]:
    """What a UNet call adds to rows of zeros."""
    unet = Decoder()
    with stage.coupled_to(unet):
        stage.select(rows)
        return unet(torch.zeros(count, 1, 2, 2))[:, 0, 0, 0].tolist()


TWO_IMAGES = batch_rows([1, 1])


@pytest.fixture
def base():
    return CountingBase(TWO_IMAGES)


def advanced(stage: JointStage, rows=TWO_IMAGES, sigma: float = 5.0, progress: float = 0.0) -> JointStage:
    stage.advance(sigma, progress, rows)
    return stage


@pytest.mark.parametrize(
    ("rows", "expected"),
    [(slice(0, 4), [6, 12, 18, 24]), (slice(0, 2), [6, 12]), (slice(2, 4), [18, 24]), (slice(1, 2), [12])],
)
def test_a_call_gets_the_residuals_of_its_rows(base, rows, expected):
    assert added(advanced(stage_for(base)), rows, len(expected)) == expected


def test_a_call_that_is_not_part_of_the_evaluation_gets_none(base):
    assert added(advanced(stage_for(base)), None, 4) == [0, 0, 0, 0]


def test_each_level_has_its_weight(base):
    assert added(advanced(stage_for(base, (1.0, 0.0, 0.25))), slice(0, 1), 1) == [2.5]


def test_the_base_runs_once_an_evaluation_at_its_noise_level(base):
    stage = stage_for(base)
    for sigma in (9.0, 4.0, 6.0):
        advanced(stage, sigma=sigma)
    assert base.levels == [9.0, 4.0, 6.0]


@pytest.mark.parametrize(
    ("progress", "adds", "runs"), [(0.1, False, True), (0.2, True, True), (0.6, True, True), (0.7, False, False)]
)
def test_outside_its_window_the_adapter_adds_nothing_and_after_it_the_base_rests(base, progress, adds, runs):
    stage = advanced(stage_for(base, window=Window(0.2, 0.6)), progress=progress)
    assert (added(stage, slice(0, 1), 1) != [0]) == adds
    assert bool(base.levels) == runs


def test_conds_of_one_image_get_each_its_own():
    rows = batch_rows([2, 1])
    stage = advanced(stage_for(CountingBase(rows)), rows)
    assert added(stage, slice(0, 5), 5) == [6, 12, 18, 24, 30]


def test_a_base_with_fewer_conds_serves_them_all():
    stage = advanced(stage_for(CountingBase(TWO_IMAGES)), batch_rows([3, 1]))
    assert added(stage, slice(0, 6), 6) == [6, 6, 6, 12, 18, 24]


def test_a_base_with_more_conds_gives_their_mean():
    stage = advanced(stage_for(CountingBase(batch_rows([2, 2]))), TWO_IMAGES)
    assert added(stage, slice(0, 4), 4) == [9, 21, 30, 36]


def test_skipped_unconds_are_simply_not_there():
    assert match_rows(batch_rows([1, 1], with_uncond=False), TWO_IMAGES) == ((0,), (1,))


def test_nothing_is_kept_of_an_evaluation_after_the_stage(base):
    stage = advanced(stage_for(base))
    assert added(stage, slice(0, 1), 1) == [6]
    assert added(stage, slice(0, 1), 1) == [0]
