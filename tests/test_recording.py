"""The base run before the upgraded model gives what it gives beside it, and what was recorded is kept within limits."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from lib_xadapter.errors import XAdapterError
from lib_xadapter.evaluations import Evaluation, GuidanceWindow
from lib_xadapter.feature_sources import BaseStep, FeatureSource, Lockstep, OncePerLevel
from lib_xadapter.recording import LeastRecentlyUsed, Playback, Recording, record
from lib_xadapter.rows import batch_rows
from lib_xadapter.taps import BaseFeatures
from lib_xadapter.trajectory import Trajectory

LEVELS = (9.0, 4.0, 4.0, 6.0, 2.0)
"""With an evaluation at a known level, and a rise."""


def at(sigma: float) -> Evaluation:
    return Evaluation(sigma, 0, 0.0)


EVALUATIONS = [at(sigma) for sigma in LEVELS]


def base(latent: torch.Tensor, evaluation: Evaluation) -> BaseStep:
    sigma = evaluation.sigma
    feature = torch.stack([latent, latent * sigma])[:, 0]
    rows = batch_rows([1])
    return BaseStep(BaseFeatures((feature,) * 3, torch.full((2, 1), sigma)), rows, latent.tanh() / sigma)


def lockstep() -> FeatureSource:
    return OncePerLevel(Lockstep(base, Trajectory(torch.randn(1, 4, 3, 5, generator=torch.Generator().manual_seed(1)))))


@pytest.fixture
def recording() -> Recording:
    return record(lockstep(), EVALUATIONS)


def test_a_recording_gives_what_the_base_gives_beside_the_upgraded_model(recording):
    beside, played = lockstep(), OncePerLevel(Playback(recording, "cpu"))
    for sigma in LEVELS:
        ours, theirs = played.at(at(sigma)), beside.at(at(sigma))
        assert ours.rows == theirs.rows
        for mine, other in zip(ours.features.levels, theirs.features.levels, strict=True):
            assert torch.equal(mine, other)
        assert ours.features.time_embedding[0, 0] == sigma


def test_it_holds_each_level_once(recording):
    assert [step.sigma for step in recording.steps] == [9.0, 4.0, 6.0, 2.0]
    assert recording.size == 4 * (3 * (2 * 4 * 3 * 5) + 2) * 4


def test_each_evaluation_is_announced():
    announced = []
    record(lockstep(), EVALUATIONS, lambda: announced.append(1))
    assert len(announced) == 4


def test_the_time_embedding_is_recorded_where_the_mapping_layers_use_it():
    recording = record(lockstep(), EVALUATIONS, time_embedding=False)
    assert recording.size == 4 * 3 * (2 * 4 * 3 * 5) * 4
    assert Playback(recording, "cpu").at(at(9.0)).features.time_embedding is None


def test_its_size_is_told_before_anything_is_kept():
    told = []

    def refuse(size: int) -> None:
        told.append(size)
        raise MemoryError

    with pytest.raises(MemoryError):
        record(lockstep(), [at(sigma) for sigma in (9.0, 4.0, 2.0)], reserve=refuse)
    assert told == [record(lockstep(), [at(sigma) for sigma in (9.0, 4.0, 2.0)]).size]


@pytest.mark.parametrize(("asked", "sentence"), [((8.0,), "8, where 9 was"), ((*LEVELS, 1.0), "1, where nothing")])
def test_a_level_that_is_not_there_is_told(recording, asked, sentence):
    played = OncePerLevel(Playback(recording, "cpu"))
    with pytest.raises(XAdapterError, match=sentence):
        for sigma in asked:
            played.at(at(sigma))


def test_the_base_runs_at_every_nth_step_up_to_the_end_of_the_window():
    every = [Evaluation(10.0 - place, place // 2, place / 12) for place in range(12)]
    assert GuidanceWindow().base_evaluations(every) == every
    found = GuidanceWindow(end=0.5, refresh_every=2).base_evaluations(every)
    assert [evaluation.sigma for evaluation in found] == [10.0, 9.0, 6.0, 5.0]


@dataclass(frozen=True)
class Thing:
    size: int


class TestRecordingCache:
    def test_the_longest_unused_goes_first(self):
        cache: LeastRecentlyUsed[Thing] = LeastRecentlyUsed(lambda: 30)
        for name in "abc":
            cache.put(name, Thing(10))
        cache.find("a")
        cache.put("d", Thing(10))
        assert [name for name in "abcd" if cache.find(name)] == ["a", "c", "d"]
        assert cache.size == 30

    def test_what_is_too_large_is_not_kept_and_drives_nothing_away(self):
        cache: LeastRecentlyUsed[Thing] = LeastRecentlyUsed(lambda: 30)
        cache.put("small", Thing(20))
        cache.put("large", Thing(31))
        assert cache.find("large") is None
        assert cache.find("small") == Thing(20)

    def test_the_same_key_takes_the_place_of_the_earlier(self):
        cache: LeastRecentlyUsed[Thing] = LeastRecentlyUsed(lambda: 30)
        cache.put("a", Thing(20))
        cache.put("a", Thing(25))
        assert cache.size == 25

    def test_a_smaller_limit_holds_from_the_next_time_on(self):
        limit = [30]
        cache: LeastRecentlyUsed[Thing] = LeastRecentlyUsed(lambda: limit[0])
        cache.put("a", Thing(20))
        limit[0] = 15
        cache.put("b", Thing(10))
        assert cache.find("a") is None
        assert cache.size == 10

    def test_room_is_made_before_the_next_is_recorded(self):
        cache: LeastRecentlyUsed[Thing] = LeastRecentlyUsed(lambda: 30)
        for name in "abc":
            cache.put(name, Thing(10))
        cache.make_room(15)
        assert [name for name in "abc" if cache.find(name)] == ["c"]

    def test_what_will_not_be_kept_drives_nothing_away(self):
        cache: LeastRecentlyUsed[Thing] = LeastRecentlyUsed(lambda: 30)
        cache.put("a", Thing(10))
        cache.make_room(31)
        assert cache.find("a")
