"""The Triton kernels compute what torch computes, run by Triton's interpreter, which needs no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lib_xadapter.cuda_mapping.eight_bits import OLDEST_TRITON, triton_version

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def errors():
    """The interpreter is chosen when Triton's kernels are defined, so for a whole process."""
    if (version := triton_version()) is None or int(version.partition(".")[0]) < OLDEST_TRITON:
        pytest.skip(f"Triton {OLDEST_TRITON} is not installed")
    environment = os.environ | {"TRITON_INTERPRET": "1", "TRITON_DEFAULT_FP_FUSION": "1"}
    command = [sys.executable, "-m", "tests.cuda.triton_interpreted"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_convolutions_in_sixteen_bits_are_as_near_as_rounding_allows(errors):
    assert len(errors["sixteen_bits"]) == 8
    assert max(errors["sixteen_bits"].values()) < 5e-4


def test_convolutions_of_quantised_numbers_are_as_near_as_rounding_allows(errors):
    assert len(errors["eight_bits"]) == 8
    assert max(errors["eight_bits"].values()) < 5e-4


def test_every_row_is_quantised_by_its_own_largest_number(errors):
    assert errors["quantizing"] == 0


def test_levels_in_sixteen_bits_are_near_double_precision(errors):
    assert set(errors["levels"]) == {"0", "1", "2"}
    assert max(errors["levels"].values()) < 5e-3


def test_levels_in_eight_bits_are_within_their_bound(errors):
    assert set(errors["eight_bit_levels"]) == {"0", "1", "2"}
    assert 5e-3 < max(errors["eight_bit_levels"].values()) < 5e-2
