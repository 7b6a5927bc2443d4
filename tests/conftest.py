"""What several tests share: golden figures, small models, small adapters."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest

from lib_xadapter import load_adapter
from lib_xadapter.headless.cli import round_alike
from tests.small_adapter import AdapterPlan, save

# nothing has computed yet
round_alike()

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden_mapping():
    return numpy.load(GOLDEN / "mapping.npz")


@pytest.fixture(scope="session")
def golden_joint_step():
    return numpy.load(GOLDEN / "joint_step.npz")


@pytest.fixture
def adapter_file(tmp_path):
    return save(AdapterPlan().weights(), tmp_path / "small.safetensors")


@pytest.fixture
def adapter(adapter_file):
    return load_adapter(adapter_file)


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """Small models with random weights, as files."""
    from tests.small_models import make_small_models

    return make_small_models(tmp_path_factory.mktemp("small"))
