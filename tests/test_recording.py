"""The base run before the upgraded model gives what it gives beside it, and what was recorded is kept within limits."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from lib_xadapter.errors import XAdapterError
from lib_xadapter.feature_sources import BaseStep, Lockstep
from lib_xadapter.joint_stage import Course, Moment
from lib_xadapter.recording import Playback, Recording, Shelf, record
from lib_xadapter.rows import batch_rows
from lib_xadapter.taps import BaseFeatures
from lib_xadapter.trajectory import Trajectory

LEVELS = (9.0, 4.0, 4.0, 6.0, 2.0)
"""With an evaluation at a known level, and a rise."""


def base(latent: torch.Tensor, sigma: float) -> BaseStep:
    feature = torch.stack([latent, latent * sigma])[:, 0]
    rows = batch_rows([1])
    return BaseStep(BaseFeatures((feature,) * 3, torch.full((2, 1), sigma)), rows, latent.tanh() / sigma)


def lockstep() -> Lockstep:
    return Lockstep(base, Trajectory(torch.randn(1, 4, 3, 5, generator=torch.Generator().manual_seed(1))))


@pytest.fixture
def recording() -> Recording:
    return record(lockstep(), LEVELS)


def test_a_recording_gives_what_the_base_gives_beside_the_upgraded_model(recording):
    beside, played = lockstep(), Playback(recording, "cpu")
    for sigma in LEVELS:
        ours, theirs = played.at(sigma), beside.at(sigma)
        assert ours.rows == theirs.rows
        for mine, other in zip(ours.features.levels, theirs.features.levels, strict=True):
            assert torch.equal(mine, other)
        assert ours.features.time_embedding[0, 0] == sigma


def test_it_holds_each_level_once(recording):
    assert [step.sigma for step in recording.steps] == [9.0, 4.0, 6.0, 2.0]
    assert recording.size == 4 * (3 * (2 * 4 * 3 * 5) + 2) * 4


def test_each_evaluation_is_announced():
    announced = []
    record(lockstep(), LEVELS, lambda: announced.append(1))
    assert len(announced) == 4


@pytest.mark.parametrize(("asked", "sentence"), [((8.0,), "8, where 9 was"), ((*LEVELS, 1.0), "1, where nothing")])
def test_a_level_that_is_not_there_is_told(recording, asked, sentence):
    played = Playback(recording, "cpu")
    with pytest.raises(XAdapterError, match=sentence):
        for sigma in asked:
            played.at(sigma)


def test_levels_are_those_at_which_the_base_runs():
    moments = [Moment(10.0 - place, place // 2, place / 12) for place in range(12)]
    assert Course().base_levels(moments) == [moment.sigma for moment in moments]
    assert Course(end=0.5, refresh_every=2).base_levels(moments) == [10.0, 9.0, 6.0, 5.0]


@dataclass(frozen=True)
class Thing:
    size: int


class TestShelf:
    def test_the_longest_unused_goes_first(self):
        shelf: Shelf[Thing] = Shelf(lambda: 30)
        for name in "abc":
            shelf.put(name, Thing(10))
        shelf.find("a")
        shelf.put("d", Thing(10))
        assert [name for name in "abcd" if shelf.find(name)] == ["a", "c", "d"]
        assert shelf.size == 30

    def test_what_is_too_large_is_not_kept_and_drives_nothing_away(self):
        shelf: Shelf[Thing] = Shelf(lambda: 30)
        shelf.put("small", Thing(20))
        shelf.put("large", Thing(31))
        assert shelf.find("large") is None
        assert shelf.find("small") == Thing(20)

    def test_the_same_key_takes_the_place_of_the_earlier(self):
        shelf: Shelf[Thing] = Shelf(lambda: 30)
        shelf.put("a", Thing(20))
        shelf.put("a", Thing(25))
        assert shelf.size == 25

    def test_a_smaller_limit_holds_from_the_next_time_on(self):
        limit = [30]
        shelf: Shelf[Thing] = Shelf(lambda: limit[0])
        shelf.put("a", Thing(20))
        limit[0] = 15
        shelf.put("b", Thing(10))
        assert shelf.find("a") is None
        assert shelf.size == 10
