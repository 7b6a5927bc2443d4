"""Batches by number: what they hold depends on the seed and the number alone."""

from __future__ import annotations

import collections

import numpy
import pytest

from lib_xadapter.errors import WrongArgument
from lib_xadapter.training.batches import Batches, bucket_sizes

SQUARES = [(64, 64)] * 13
MIXED = [(120, 60)] * 9 + [(60, 120)] * 5 + [(70, 72)] * 6


def examples(batch):
    return [crop.example for crop in batch]


def seen(batches, epoch=0):
    numbers = range(epoch * batches.per_epoch, (epoch + 1) * batches.per_epoch)
    return collections.Counter(example for number in numbers for example in examples(batches.at(number)))


@pytest.mark.parametrize("buckets", [False, True])
def test_a_batch_is_the_same_whatever_was_asked_for_before(buckets):
    whole = Batches(MIXED, 4, 7, 64, buckets)
    in_order = [whole.at(number) for number in range(3 * whole.per_epoch)]
    for number in (14, 0, 5, 11):
        assert Batches(MIXED, 4, 7, 64, buckets).at(number) == in_order[number] == whole.at(number)


@pytest.mark.parametrize("buckets", [False, True])
def test_every_epoch_shows_every_picture_in_another_order(buckets):
    batches = Batches(MIXED, 4, 1, 64, buckets)
    for epoch in range(3):
        assert set(seen(batches, epoch)) == set(range(20))
    orders = {tuple(examples(batches.at(epoch * batches.per_epoch))) for epoch in range(3)}
    assert len(orders) == 3


def test_a_picture_is_seen_once_where_the_batches_are_full():
    assert set(seen(Batches([(64, 64)] * 16, 4, 1, 64, False)).values()) == {1}


def test_the_last_batch_is_filled_up():
    batches = Batches(SQUARES, 4, 1, 64, False)
    assert batches.per_epoch == 4
    counts = seen(batches)
    assert sum(counts.values()) == 16
    assert set(counts.values()) == {1, 2}


def test_fewer_pictures_than_a_batch_still_fill_it():
    batches = Batches([(64, 64)] * 3, 8, 1, 64, False)
    assert batches.per_epoch == 1
    assert len(batches.at(0)) == 8


def test_another_seed_gives_another_order():
    first, second = (Batches(SQUARES, 4, seed, 64, False).at(0) for seed in (1, 2))
    assert examples(first) != examples(second)


def test_square_crops_lie_within_the_resized_picture_at_its_full_shorter_side():
    batches = Batches([(300, 100), (100, 250), (64, 64)], 3, 1, 64, False)
    crops = {crop.example: crop for crop in batches.at(0)}
    assert [crops[number].resized for number in range(3)] == [(192, 64), (64, 160), (64, 64)]
    for crop in crops.values():
        assert (crop.width, crop.height) == (64, 64)
        assert 0 <= crop.left <= crop.resized[0] - 64
        assert 0 <= crop.top <= crop.resized[1] - 64


def test_crops_lie_anywhere_and_where_they_did_in_the_epoch_before():
    batches = Batches([(300, 100)] * 40, 8, 1, 64, False)
    epochs = [
        {crop.example: crop for number in range(5) for crop in batches.at(5 * epoch + number)} for epoch in range(2)
    ]
    assert epochs[0] == epochs[1]
    lefts = [crop.left for crop in epochs[0].values()]
    assert min(lefts) < 32
    assert max(lefts) > 96


def test_a_bucketed_batch_is_of_one_size_near_the_pictures_own_ratio():
    batches = Batches(MIXED, 4, 1, 64, True)
    for number in range(batches.per_epoch):
        batch = batches.at(number)
        ((width, height),) = {(crop.width, crop.height) for crop in batch}
        for crop in batch:
            wide, high = MIXED[crop.example]
            assert abs(numpy.log(wide / high * height / width)) < 0.3


def test_a_bucket_of_less_than_a_batch_joins_the_next():
    batches = Batches([(120, 60)] * 8 + [(60, 120)], 4, 1, 64, True)
    assert {(crop.width, crop.height) for number in range(3) for crop in batches.at(number)} == {(80, 48)}


def test_buckets_of_sdxl_are_about_a_square_of_1024():
    sizes = bucket_sizes(1024)
    assert {(1024, 1024), (832, 1216), (1344, 768), (512, 2048)} <= set(sizes)
    for width, height in sizes:
        assert width % 64 == height % 64 == 0
        assert 0.85 < width * height / 1024**2 <= 1


@pytest.mark.parametrize("size", [64, 256, 512, 768, 1024])
def test_half_of_every_bucket_is_a_size_for_the_base(size):
    assert all(side % 16 == 0 for sides in bucket_sizes(size) for side in sides)


@pytest.mark.parametrize("size", [0, 100, 1000, -64])
def test_sizes_whose_half_is_no_multiple_of_8_are_refused(size):
    with pytest.raises(WrongArgument, match=f"'size' is {size}, expected a multiple of 16"):
        Batches(SQUARES, 4, 1, size, False)


def test_batches_of_nothing_are_refused():
    with pytest.raises(WrongArgument, match="'batch' is 0"):
        Batches(SQUARES, 0, 1, 64, False)
    with pytest.raises(WrongArgument, match="no picture"):
        Batches([], 4, 1, 64, False)


def test_a_million_pictures_are_not_a_list_of_batches():
    """What is kept is a few numbers a picture; a batch far away costs no more than the first."""
    sizes = numpy.tile(numpy.array([[1024, 768], [768, 1024]], dtype=numpy.int32), (500_000, 1))
    batches = Batches(sizes, 8, 1, 1024, True)
    assert batches.per_epoch == 125_000
    assert len(set(examples(batches.at(10**9)))) == 8
