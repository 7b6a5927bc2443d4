"""Small models for the diffusers host; everything here is skipped where diffusers is not installed."""

from __future__ import annotations

import os

import pytest
from PIL import Image, ImageDraw

os.environ["HF_HUB_OFFLINE"] = "1"
pytest.importorskip("diffusers", reason="needs the extra 'headless'")


@pytest.fixture(scope="module")
def one_thread():
    """Two ways to the same sums come to the same bytes: several threads share them out as they find time."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pipe(small):
    """Two pipelines of the small models, made one."""
    from lib_xadapter.headless import XAdapterPipeline

    made = XAdapterPipeline.from_single_file(
        base=small.base, upgraded=small.upgraded, adapter=small.adapter, tokenizer=small.tokenizer
    )
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def picture():
    """Something to paint over."""
    from tests.pictures import control_map

    return control_map(128)


@pytest.fixture(scope="module")
def mask():
    """The right half of it is painted."""
    image = Image.new("L", (128, 128))
    ImageDraw.Draw(image).rectangle((64, 0, 127, 127), fill=255)
    return image


@pytest.fixture
def generate(small, tmp_path):
    """The `generate` command, into an empty folder."""
    from tests.headless.command_line import CommandLine

    return CommandLine(small.folder, small.tokenizer, tmp_path / "out")


@pytest.fixture
def control_image(tmp_path):
    """A map for the ControlNet, of another size than the base's picture."""
    from tests.pictures import control_map

    path = tmp_path / "edge.png"
    control_map(96).save(path)
    return path
