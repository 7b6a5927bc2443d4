"""What `train` has trained runs in the real WebUI as in the diffusers host, and the page says which pair it is for."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from .asking import arguments, made
from .conftest import PLAIN
from .test_headless_agreement import JOB, Files, check, headless, in_the_webui, relative_error

os.environ["HF_HUB_OFFLINE"] = "1"
pytest.importorskip("diffusers", reason="needs the extra 'train'")
pytest.importorskip("accelerate", reason="needs the extra 'train'")
pytest.importorskip("datasets", reason="needs the extra 'train'")

from lib_xadapter import load_adapter
from lib_xadapter.headless.cli import main
from lib_xadapter.mapping import save_adapter
from lib_xadapter.pairs import Pair
from tests.training.tiny_models import save_pictures

KINDS = {
    "as-released": (),
    "spade-both": ("--fusion", "spade", "--positions", "both", "--timestep"),
    "guidance-encoder": ("--fusion", "guidance", "--positions", "encoder"),
}


@pytest.fixture(scope="module")
def files(models) -> Files:
    return Files(models / "models")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return save_pictures(tmp_path_factory.mktemp("data") / "pictures", 8)


def trained(files: Files, pictures: Path, out: Path, *more: str) -> Path:
    """A file that was trained for three steps, with a learning rate at which that can be seen."""
    checkpoints = files.folder / "Stable-diffusion"
    words = ["--base", checkpoints / "tiny15.safetensors", "--upgraded", checkpoints / "tinyxl.safetensors"]
    words += ["--tokenizer", files.folder / "tiny-clip", "--data", pictures, "--out", out, "--tracker", "none"]
    words += ["--size", 64, "--batch", 2, "--steps", 3, "--learning-rate", 0.02, "--precision", "float32"]
    assert main(["train", "--cpu", *map(str, words), *more]) == 0
    return out / "adapter.safetensors"


@pytest.mark.parametrize("kind", KINDS)
def test_a_trained_file_does_the_same_in_both_hosts(kind, webui, files, pictures, tmp_path, monkeypatch):
    path = trained(files, pictures, tmp_path / "out", *KINDS[kind])
    listed = files.folder / "X-Adapter" / f"trained-{kind}.safetensors"
    listed.write_bytes(path.read_bytes())
    try:
        models = replace(files.models(), adapter=load_adapter(listed))
        job = replace(JOB, steps=4)
        ours = headless(models, job)
        check(ours, in_the_webui(webui, replace(job, settings=replace(job.settings, adapter=listed.stem))))
        alone = headless(models, replace(job, settings=replace(job.settings, weight=0.0)))
        assert relative_error(ours.finished, alone.finished) > 1e-2
        plan = webui.post("/xadapter/v1/plan", {"args": [{"adapter": listed.stem}]}).content
        assert plan["pair"] == "SD1.5 → SDXL" and plan["line"].endswith("The adapter is for SD1.5 → SDXL.")
    finally:
        listed.unlink()


def test_a_base_of_another_kind_is_remarked_on(webui, files):
    listed = files.folder / "X-Adapter" / "for-sd2.safetensors"
    layers = load_adapter(files.folder / "X-Adapter" / "tiny.safetensors", dtype=torch.float32)
    save_adapter(layers, listed, Pair("sd2", "sdxl").metadata())
    try:
        plan: dict[str, Any] = webui.post("/xadapter/v1/plan", {"args": [{"adapter": "for-sd2"}]}).content
        remark = "the adapter was trained for SD2 → SDXL, the base selected is SD1.5"
        assert plan["line"].endswith(f"T{remark[1:]}.")
        made(webui.txt2img(**PLAIN, **arguments(adapter="for-sd2")))
        assert remark in webui.log
    finally:
        listed.unlink()


def test_a_file_that_tells_nothing_is_not_spoken_of(webui):
    plan = webui.post("/xadapter/v1/plan", {"args": [{"adapter": "tiny"}]}).content
    assert plan["pair"] == "" and "adapter is for" not in plan["line"]
