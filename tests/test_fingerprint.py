"""Values that differ in anything have other fingerprints, and what cannot be compared has none."""

from __future__ import annotations

import itertools

import numpy
import pytest
import torch
from PIL import Image

from lib_xadapter.fingerprint import fingerprint

DIFFERENT = [
    [["a"], "b"],
    [["a", "b"]],
    ["a", "b"],
    ["ab"],
    {"a": "b"},
    {"a": ["b"]},
    [1],
    [1.0],
    [True],
    [None],
    ["None"],
    [torch.zeros(2)],
    [torch.zeros(2, 1)],
    [numpy.zeros(2)],
    [Image.new("L", (2, 1))],
]


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(DIFFERENT, 2)), ids=str)
def test_what_differs_has_another_fingerprint(one, other):
    assert fingerprint(one) != fingerprint(other)


def test_what_is_equal_has_the_same():
    assert fingerprint({"b": [1], "a": torch.ones(2)}) == fingerprint({"a": torch.ones(2), "b": [1]})


def test_an_object_whose_contents_are_not_known_has_none():
    """It may have changed by the next time and look the same."""
    assert fingerprint({"a": [object()]}) is None
