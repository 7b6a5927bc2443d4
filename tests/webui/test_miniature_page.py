"""Trained weights through the page: the picture is the one that `test_miniature_condition` measures over REST."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest

from tests.pictures import grey_levels_apart

from . import test_miniature_condition as condition
from . import test_page
from .asking import made
from .server import WebUIServer
from .test_controlnet_page import open_panel, shown, unit_of
from .test_miniature_condition import CONTROLNET, LORA, PLUGINS, SDEDIT
from .test_page import ID, choose, enable, fill, generate, open_more

SEED = 0

# fixtures
browser, page, server = test_page.browser, test_page.page, condition.server


@pytest.fixture(scope="module")
def webui(server: WebUIServer) -> WebUIServer:
    return server


def give_map(page: Any) -> None:
    open_panel(page)
    png = io.BytesIO()
    condition.edges(SEED).save(png, format="PNG")
    upload = {"name": "map.png", "mimeType": "image/png", "buffer": png.getvalue()}
    unit = unit_of(page, 0)
    page.locator(f"{unit}_input_image input[type=file]").set_input_files(upload)
    page.wait_for_function(f"document.querySelector('{unit}_controlnet_enable_checkbox input').checked")
    choose(page, f"{unit}_controlnet_model_dropdown", "miniature-edges")


SET_UP: dict[str, Callable[[Any], None]] = {CONTROLNET: give_map, LORA: lambda page: None}


@pytest.mark.parametrize("name", SET_UP)
def test_the_page_makes_the_picture_that_is_measured(page, webui, name):
    plugin = PLUGINS[name]
    request = plugin.request(SEED, plugin.given)
    fill(page, "#txt2img_prompt", request["prompt"])
    for field in ("width", "height", "steps", "cfg_scale", "seed"):
        fill(page, f"#txt2img_{field}", request[field])
    enable(page)
    open_more(page)
    choose(page, f"{ID}base_checkpoint", f"{condition.BASE}.safetensors")
    choose(page, f"{ID}adapter", "miniature.safetensors")
    for argument, value in plugin.given.items():
        fill(page, f"{ID}{argument}", value)
    SET_UP[name](page)
    log = generate(page)
    assert "to SD1.5" in log
    ours = shown(page)[0].convert("RGB")
    assert grey_levels_apart(ours, made(webui.txt2img(**request)).images[0].convert("RGB")) <= 1
    sdedit = made(webui.txt2img(**plugin.request(SEED, SDEDIT))).images[0].convert("RGB")
    assert grey_levels_apart(ours, sdedit) > 1
