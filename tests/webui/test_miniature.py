"""The miniature models do the same in the WebUI as on diffusers: here with random weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests.pictures import grey_levels_apart, mean_difference

from .asking import arguments, made
from .server import WebUIServer

pytest.importorskip("diffusers", reason="needs the extra 'headless'")

from lib_xadapter.headless.cli import main
from lib_xadapter.miniature.model_files import BASE, UPGRADED
from lib_xadapter.miniature.webui_files import write_for_webui
from tests.miniature.random_models import LORAS, save_models

PROMPT = "small red circle left in front of large blue square center on sky"


@pytest.fixture(scope="module")
def miniature(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("miniature")
    save_models(folder)
    return folder


@pytest.fixture(scope="module")
def server(miniature, tmp_path_factory, start_webui) -> Iterator[WebUIServer]:
    folder = tmp_path_factory.mktemp("miniature-webui")
    write_for_webui(miniature, folder)
    with start_webui("miniature", models=[folder], options={"sd_model_checkpoint": UPGRADED}) as started:
        yield started


def in_the_webui(server: WebUIServer, prompt: str = PROMPT, **given: object) -> Image.Image:
    request = {"prompt": prompt, "width": 128, "height": 128, "steps": 4, "sampler_name": "Euler", "seed": 5}
    chosen = arguments(base_checkpoint=BASE, adapter="miniature.safetensors", **given)
    return made(server.txt2img(**request, cfg_scale=4, negative_prompt="", **chosen)).image.convert("RGB")


def on_diffusers(models: Path, out: Path, *more: str) -> Image.Image:
    files = {
        "base": models / "Stable-diffusion" / BASE,
        "upgraded": models / "Stable-diffusion" / UPGRADED,
        "adapter": models / "X-Adapter/miniature.safetensors",
    }
    given = {"prompt": PROMPT, "width": 128, "height": 128, "steps": 4, "sampler": "Euler", "seed": 5, "cfg": 4}
    options = [part for name, value in {**files, **given}.items() for part in (f"--{name}", str(value))]
    assert main(["generate", *options, "--device", "cpu", "--out", str(out), *more]) == 0
    (picture,) = out.glob("*.png")
    return Image.open(picture).convert("RGB")


def check_same(one: Image.Image, other: Image.Image) -> None:
    """To what is lost where queries are written smaller in half precision."""
    assert mean_difference(one, other) < 0.25
    assert grey_levels_apart(one, other) <= 4


def test_the_picture_is_the_same(server, miniature, tmp_path):
    led, alone = (in_the_webui(server, weight=weight) for weight in (1.0, 0.0))
    check_same(led, on_diffusers(miniature, tmp_path / "led"))
    check_same(alone, on_diffusers(miniature, tmp_path / "alone", "--weight", "0"))
    assert mean_difference(led, alone) > 1


@pytest.mark.parametrize("name", LORAS)
def test_a_lora_does_the_same(server, miniature, tmp_path, name):
    ours = in_the_webui(server, f"{PROMPT} <lora:miniature-{name}:0.7>")
    lora = miniature / "Lora" / f"miniature-{name}.safetensors"
    check_same(ours, on_diffusers(miniature, tmp_path / "led", "--lora", f"{lora}:0.7"))
    assert mean_difference(ours, in_the_webui(server)) > 1
