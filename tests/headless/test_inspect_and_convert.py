"""`inspect` tells files apart, `convert` writes an adapter that is the same."""

from __future__ import annotations

import os

import pytest
import safetensors.torch
import torch

from lib_xadapter import load_adapter
from lib_xadapter.headless.cli import main
from tests.small_adapter import AdapterPlan, save


def said(capsys, path) -> str:
    assert main(["inspect", str(path)]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("which", "sentences"),
    [
        ("base", ["a checkpoint of SD1.5", "UNet of 4 channels, VAE, text encoder"]),
        ("upgraded", ["a checkpoint of SDXL", "VAE, text encoder"]),
        ("lora", ["a LoRA for SD1.5", "rank 4"]),
        ("controlnet", ["a ControlNet for a model with prompts of 64 channels", "CompVis layout"]),
        (
            "adapter",
            [
                "an X-Adapter",
                "3 ResNet blocks a level, GroupNorm off, timestep conditioning off",
                "level 0: 128 → 128 channels",
                "level 2: 32 → 64 channels, twice the size",
            ],
        ),
    ],
)
def test_a_file_is_told(which, sentences, small, capsys):
    text = said(capsys, getattr(small, which))
    for sentence in sentences:
        assert sentence in text
    assert "float32" in text


def test_an_adapters_options_are_told(tmp_path, capsys):
    path = save(AdapterPlan(blocks=2, norm=True, time_channels=64).weights(), tmp_path / "options.bin")
    assert "2 ResNet blocks a level, GroupNorm on, timestep conditioning on (64 channels)" in said(capsys, path)


def test_embeddings_are_told(tmp_path, capsys):
    base, upgraded = tmp_path / "base.safetensors", tmp_path / "xl.safetensors"
    safetensors.torch.save_file({"emb_params": torch.zeros(3, 768)}, base)
    safetensors.torch.save_file({"clip_l": torch.zeros(2, 768), "clip_g": torch.zeros(2, 1280)}, upgraded)
    assert "an embedding for SD1.5\n  3 tokens" in said(capsys, base)
    assert "an embedding for SDXL\n  2 tokens" in said(capsys, upgraded)


def test_a_file_that_nobody_knows_is_told(tmp_path, capsys):
    path = tmp_path / "else.safetensors"
    safetensors.torch.save_file({f"{number}": torch.zeros(2, 2) for number in range(5)}, path)
    assert "not known" in said(capsys, path)


def test_the_weights_are_not_read(small, tmp_path, capsys):
    """The header alone, then nothing: a hole of the right size."""
    path = tmp_path / "hole.safetensors"
    path.write_bytes(_header(small.base))
    os.truncate(path, small.base.stat().st_size)
    assert "a checkpoint of SD1.5" in said(capsys, path)


def _header(path) -> bytes:
    with path.open("rb") as file:
        length = file.read(8)
        return length + file.read(int.from_bytes(length, "little"))


def test_a_converted_adapter_is_the_same(tmp_path, capsys):
    source = save(AdapterPlan().weights(), tmp_path / "X_Adapter_v1.bin")
    assert main(["convert", str(source), str(tmp_path / "out.safetensors")]) == 0
    assert "48 tensors" in capsys.readouterr().out
    before, after = load_adapter(source).state_dict(), load_adapter(tmp_path / "out.safetensors").state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_a_conversion_can_halve_the_weights(tmp_path):
    source = save(AdapterPlan().weights(), tmp_path / "X_Adapter_v1.bin")
    assert main(["convert", str(source), str(tmp_path / "half.safetensors"), "--dtype", "float16"]) == 0
    assert {value.dtype for value in load_adapter(tmp_path / "half.safetensors").state_dict().values()} == {
        torch.float16
    }
