"""Which pair a file is for is told, and remarked on where another base is selected."""

from __future__ import annotations

import pytest

from lib_xadapter.pairs import Pair


def test_a_pair_is_read_as_it_was_written():
    pair = Pair("sd2", "sdxl")
    assert Pair.written_in(pair.metadata()) == pair
    assert str(pair) == "SD2 → SDXL"


@pytest.mark.parametrize("metadata", [{}, {"xadapter.pair": ""}, {"xadapter.pair": "sd1"}, {"format": "pt"}])
def test_a_file_that_does_not_tell_is_for_no_pair_that_is_known(metadata):
    pair = Pair.written_in(metadata)
    assert str(pair) == pair.describe("sd1") == pair.remark("sd2") == ""


def test_another_base_is_remarked_on():
    pair = Pair("sd1", "sdxl")
    assert pair.describe("sd1") == "The adapter is for SD1.5 → SDXL."
    assert pair.describe("") == "The adapter is for SD1.5 → SDXL."
    assert pair.remark("sd1") == ""
    assert pair.describe("sd2") == "The adapter was trained for SD1.5 → SDXL, the base selected is SD2."
