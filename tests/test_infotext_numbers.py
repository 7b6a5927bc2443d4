"""Numbers under a picture read as exactly those that made it, and look as short as they can."""

from __future__ import annotations

import pytest

from lib_xadapter.infotext import key_of, read_infotext, write_infotext
from lib_xadapter.settings import Settings


@pytest.mark.parametrize("value", [0.1 + 0.2, 1 / 3, 0.123456789, 1e-9, 0.8000001, (1 / 3, 0.5, 2 / 3)], ids=str)
def test_a_weight_is_read_as_it_was(value):
    assert read_infotext(write_infotext(Settings(weight=value), "1"))["weight"] == value


@pytest.mark.parametrize("text", ["1.5 0.2", "", "1 2 3 4", "much"])
def test_what_is_no_weight_is_passed_over(text):
    assert read_infotext({key_of("enabled"): "1", key_of("weight"): text})["weight"] == Settings().weight


@pytest.mark.parametrize(("value", "text"), [(0.85, "0.85"), (2.0, "2"), ((1.0, 0.5, 0.0), "1 0.5 0")])
def test_a_usual_weight_looks_as_before(value, text):
    assert write_infotext(Settings(weight=value), "1")[key_of("weight")] == text
