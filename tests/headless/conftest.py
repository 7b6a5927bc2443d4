"""Small models for the diffusers host; everything here is skipped where diffusers is not installed."""

from __future__ import annotations

import os

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
pytest.importorskip("diffusers", reason="needs the extra 'headless'")


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """The demo's small models, as files."""
    from lib_xadapter.headless.small_models import make_small_models

    return make_small_models(tmp_path_factory.mktemp("small"))


@pytest.fixture
def generate(small, tmp_path):
    """The `generate` command, into an empty folder."""
    from tests.headless.command_line import CommandLine

    return CommandLine(small.folder, small.tokenizer, tmp_path / "out")


@pytest.fixture
def control_image(tmp_path):
    """A map for the ControlNet, of another size than the base's picture."""
    from lib_xadapter.headless.demo import control_map

    path = tmp_path / "edge.png"
    control_map(96).save(path)
    return path
