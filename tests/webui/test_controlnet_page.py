"""Units set up in the ControlNet panel, in a real browser."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
from PIL import Image

from tests.pictures import grey_levels_apart

from . import test_page
from .asking import made
from .conftest import PLAIN
from .server import WebUIServer
from .test_page import ID, ask_for, choose, enable, generate, wait_for_line
from .units import T2I_OF_SDXL, T2I_WITHOUT_NAME, ask, final, picture, unit

PANEL = "#txt2img_controlnet"

# fixtures
browser, page = test_page.browser, test_page.page


@pytest.fixture(scope="module")
def webui(controlnet_webui: WebUIServer) -> WebUIServer:
    return controlnet_webui


def unit_of(page: Any, number: int) -> str:
    return f"{PANEL}_ControlNet-{number}"


def open_panel(page: Any) -> None:
    page.locator(f"{PANEL} #controlnet > .label-wrap").click()
    page.wait_for_selector(f"{unit_of(page, 0)}_controlnet_model_dropdown", state="visible")


def open_unit(page: Any, number: int) -> None:
    page.locator(f"{PANEL}_tabs > .tab-nav button", has_text=f"ControlNet Unit {number}").click()


def set_up(page: Any, number: int, model: str) -> None:
    """Upload a picture, which ticks "Enable", and choose a model."""
    prefix = unit_of(page, number)
    png = io.BytesIO()
    picture().save(png, format="PNG")
    upload = {"name": "map.png", "mimeType": "image/png", "buffer": png.getvalue()}
    page.locator(f"{prefix}_input_image input[type=file]").set_input_files(upload)
    page.wait_for_function(f"document.querySelector('{prefix}_controlnet_enable_checkbox input').checked")
    choose(page, f"{prefix}_controlnet_model_dropdown", model)


def wait_for_plugins(page: Any, text: str) -> None:
    wait_for_line(page, text, f"{ID}plugins")


def shown(page: Any) -> list[Image.Image]:
    """The pictures of the gallery, detected maps last."""
    sources = page.locator("#txt2img_gallery .thumbnail-item img, #txt2img_gallery .thumbnail-small img").evaluate_all(
        "images => images.map(image => image.src)"
    )
    return [Image.open(io.BytesIO(page.request.get(source).body())) for source in dict.fromkeys(sources)]


def test_the_line_says_where_each_enabled_unit_will_go(page):
    enable(page)
    open_panel(page)
    set_up(page, 0, T2I_WITHOUT_NAME)
    wait_for_plugins(page, f"ControlNet unit 0 {T2I_WITHOUT_NAME} [")
    assert page.locator(f"{ID}plugins").inner_text().endswith("] to SD1.5.")
    open_unit(page, 1)
    set_up(page, 1, T2I_OF_SDXL)
    wait_for_plugins(page, f"to SD1.5; ControlNet unit 1 {T2I_OF_SDXL} [")
    choose(page, f"{unit_of(page, 1)}_controlnet_model_dropdown", "None")
    wait_for_plugins(page, "ControlNet unit 1 none to neither model (is enabled and has no model)")
    page.locator(f"{unit_of(page, 1)}_controlnet_enable_checkbox input").click()
    page.wait_for_function("id => !document.querySelector(id).textContent.includes('unit 1')", arg=f"{ID}plugins")


def test_a_unit_of_the_panel_makes_the_picture_that_rest_makes(page, webui):
    ask_for(page)
    enable(page)
    open_panel(page)
    set_up(page, 0, T2I_WITHOUT_NAME)
    wait_for_plugins(page, "to SD1.5")
    log = generate(page)
    assert re.search(rf"X-Adapter plugins: ControlNet unit 0 {T2I_WITHOUT_NAME} \[\w+\] to SD1.5", log)
    assert re.search(rf"X-Adapter: ControlNet unit 0 {T2I_WITHOUT_NAME} \[\w+\] to SD1.5\.", log)
    ours, detected = shown(page)
    assert (ours.size, detected.size) == ((256, 256), (128, 128))
    rest = {"steps": PLAIN["steps"], "sampler_name": "DPM++ 2M", "scheduler": "Automatic"}
    over_rest = made(ask(webui, [unit(T2I_WITHOUT_NAME, "none")], {}, **rest))
    for one, other in zip((ours, detected), over_rest.images, strict=True):
        assert grey_levels_apart(one.convert("RGB"), other.convert("RGB")) <= 1
    assert grey_levels_apart(ours.convert("RGB"), final(webui, [], {}, **rest)) > 1
