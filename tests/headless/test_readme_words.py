"""README's example of what the WebUI has and diffusers has not, run as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from lib_xadapter.headless.model_files import load_base
from tests.headless.lora_figures import cases
from tests.headless.test_inversions import safe, vectors

README = Path(__file__).parents[2] / "README.md"


@pytest.fixture
def example() -> str:
    (found,) = re.findall(r"```py\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    return found


def test_the_example_makes_a_picture(example, small, tmp_path, monkeypatch):
    base = load_base(small.base, torch.float32, small.tokenizer)
    base.set_progress_bar_config(disable=True)
    # a picture of 64 pixels where nothing is said of its size
    base.unet.register_to_config(sample_size=8)
    (lokr,) = (case for case in cases() if case.name == "base lokr")
    lokr.write(tmp_path).path.rename(tmp_path / "style-lokr.safetensors")
    (tmp_path / "embeddings").mkdir()
    safe(tmp_path / "embeddings", "ink", emb_params=vectors())
    monkeypatch.chdir(tmp_path)
    known = {"base": base}
    exec(example, known)
    assert isinstance(known["image"], Image.Image)
    assert not known["said"].is_plain
