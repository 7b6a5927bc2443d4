"""A model file is found by what people call it, and by nothing that only looks alike."""

from __future__ import annotations

import pytest

from lib_xadapter.file_names import find_named

FILES = {1: ["styles/Ink.safetensors"], 2: ["ink.ckpt", "0123456789"], 3: ["grain.pth"]}


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("styles/Ink.safetensors", 1),
        ("STYLES\\ink", 1),
        ("Ink", 2),
        ("ink [0123456789]", 2),
        ("0123456789", 2),
        ("old/Grain.bin", 3),
        ("gra", None),
        ("styles", None),
        ("", None),
    ],
)
def test_a_name_finds_its_file(name, found):
    assert find_named(name, FILES) == found


def test_the_exact_name_goes_before_a_similar_one():
    assert find_named("Ink.ckpt", {1: ["ink.ckpt"], 2: ["Ink.ckpt"]}) == 2


def test_the_folder_decides_between_two_of_one_name():
    files = {1: ["old/ink.ckpt"], 2: ["new/ink.ckpt"]}
    assert (find_named("new/ink", files), find_named("ink", files)) == (2, 1)
