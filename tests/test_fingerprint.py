"""Values that differ in anything have other fingerprints, and what cannot be compared has none."""

from __future__ import annotations

import itertools

import numpy
import pytest
import torch
from PIL import Image

from lib_xadapter.fingerprint import fingerprint


def palette_image(colour: str) -> Image.Image:
    """Of one colour, which stands in its palette alone."""
    return Image.new("RGB", (2, 1), colour).convert("P", palette=Image.Palette.ADAPTIVE)


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
    [torch.zeros(2, dtype=torch.bfloat16)],
    [torch.tensor(0.0)],
    [Image.new("L", (2, 1))],
    [palette_image("red")],
    [palette_image("blue")],
]


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(DIFFERENT, 2)), ids=str)
def test_what_differs_has_another_fingerprint(one, other):
    assert fingerprint(one) != fingerprint(other)


def test_what_is_equal_has_the_same():
    assert fingerprint({"b": [1], "a": torch.ones(2)}) == fingerprint({"a": torch.ones(2), "b": [1]})


def test_an_object_whose_contents_are_not_known_has_none():
    """It may have changed by the next time and look the same."""
    assert fingerprint({"a": [object()]}) is None
    assert fingerprint(numpy.array([object()])) is None


def test_a_tensor_that_wants_gradients_has_that_of_its_numbers():
    assert fingerprint(torch.ones(2, requires_grad=True)) == fingerprint(torch.ones(2))
