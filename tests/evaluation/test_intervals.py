"""Intervals hold what they promise, on samples whose truth is known."""

from __future__ import annotations

import numpy
import pytest

from lib_xadapter.evaluation.intervals import MeanOverCaptions, compare, drawn


def test_a_mean_has_the_interval_of_its_standard_error(noise):
    values = noise.normal(3, 2, size=2000)
    estimate = compare({"way": MeanOverCaptions(values)}, 2000).estimates["way"]
    assert estimate.value == pytest.approx(values.mean())
    expected = 1.96 * values.std() / numpy.sqrt(2000)
    assert (estimate.high - estimate.low) / 2 == pytest.approx(expected, rel=0.1)


def test_95_percent_of_intervals_hold_the_truth(noise):
    held = 0
    for seed in range(400):
        estimate = compare({"way": MeanOverCaptions(noise.exponential(size=60))}, 60, 300, seed).estimates["way"]
        held += estimate.low <= 1 <= estimate.high
    assert 0.90 <= held / 400 <= 0.98


def test_differences_are_paired(noise):
    """What both ways share falls out: the difference is surer than either way."""
    shared = noise.normal(size=300) * 10
    ways = {"one": MeanOverCaptions(shared + 0.2), "other": MeanOverCaptions(shared + noise.normal(0, 0.1, 300))}
    compared = compare(ways, 300)
    (difference,) = compared.differences
    assert (difference.one, difference.other) == ("one", "other")
    assert difference.estimate.value == pytest.approx(0.2, abs=0.03)
    assert difference.estimate.leaves_out_zero
    widths = [one.high - one.low for one in (difference.estimate, compared.estimates["one"])]
    assert widths[0] < widths[1] / 50


def test_equal_ways_differ_by_nothing(noise):
    values = noise.normal(size=50)
    (difference,) = compare({"one": MeanOverCaptions(values), "other": MeanOverCaptions(values)}, 50).differences
    assert (difference.estimate.value, difference.estimate.low, difference.estimate.high) == (0, 0, 0)


def test_seeds_of_a_caption_go_together(noise):
    """Seeds that say nothing new make nothing surer."""
    values = noise.normal(size=200)
    once = compare({"way": MeanOverCaptions(values)}, 200)
    often = compare({"way": MeanOverCaptions(numpy.repeat(values[:, None], 5, axis=1))}, 200)
    assert often.estimates["way"].low == pytest.approx(once.estimates["way"].low)
    assert often.estimates["way"].high == pytest.approx(once.estimates["way"].high)


def test_draws_are_those_of_their_seed_and_as_many_as_captions():
    counts = drawn(30, 40, seed=1)
    assert (counts.sum(axis=1) == 30).all()
    assert (drawn(30, 40, seed=1) == counts).all()
    assert not (drawn(30, 40, seed=2) == counts).all()


def test_one_caption_is_too_few_for_an_interval():
    estimate = compare({"way": MeanOverCaptions(numpy.array([2.0]))}, 1).estimates["way"]
    assert estimate.value == 2
    assert numpy.isnan([estimate.low, estimate.high]).all()
    assert not estimate.leaves_out_zero
