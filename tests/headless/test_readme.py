"""README's example from Python runs as it stands, with the small models under its file names."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest
import safetensors.torch
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image

from lib_xadapter.headless import XAdapterPipeline

README = Path(__file__).parents[2] / "README.md"
FILES = {
    "v1-5.safetensors": "base",
    "sd_xl.safetensors": "upgraded",
    "ink.safetensors": "lora",
    "X_Adapter_v1.safetensors": "adapter",
}


def example() -> str:
    """The block of code, with few steps."""
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    return re.sub(r"\"num_inference_steps\": \d+", '"num_inference_steps": 2', code)


@pytest.fixture
def with_configs(small, tmp_path, monkeypatch):
    """`from_single_file` finds the small models' configs, where diffusers would fetch those of the full ones, and their
    text encoders, which it knows by the full ones' widths and would leave without weights."""
    loaded = XAdapterPipeline.from_single_file(
        base=small.base, upgraded=small.upgraded, adapter=None, tokenizer=small.tokenizer
    )
    for kind, pipeline in ((StableDiffusionPipeline, loaded.base), (StableDiffusionXLPipeline, loaded.upgraded)):
        folder = tmp_path / kind.__name__
        pipeline.unet.register_to_config(sample_size=8 if pipeline is loaded.base else 16)
        pipeline.save_pretrained(folder)
        encoders = {name: part for name, part in pipeline.components.items() if name.startswith("text_encoder")}
        given = {"config": str(folder), "local_files_only": True, **encoders}
        monkeypatch.setattr(kind, "from_single_file", functools.partial(kind.from_single_file, **given))


def test_the_example_runs(small, with_configs, tmp_path, monkeypatch):
    pytest.importorskip("peft", reason="diffusers loads LoRAs by it")
    code = example()
    for name, model in FILES.items():
        assert f'"{name}"' in code
        (tmp_path / name).symlink_to(getattr(small, model))
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(code, str(README), "exec"), names)
    (one,), (other,) = names["made"].images, names["again"].images
    assert isinstance(one, Image.Image)
    assert one.size == other.size == (128, 128)
    assert one.tobytes() != other.tobytes()
    lora = safetensors.torch.load_file(small.lora)
    active = {name for name, _ in names["base"].unet.named_parameters() if "lora" in name}
    assert len(active) > 0 and len(lora) > 0
    assert all(bool(torch.isfinite(latent).all()) for latent in names["made"].base_side.latents)
