"""The demo's page: one's own models and map, errors in its own words, and a stop button, also in a real browser."""

from __future__ import annotations

import os
import re
import shutil
import threading

import pytest
from PIL import Image

from tests.browsers import chromium
from tests.pictures import grey_levels_apart

pytest.importorskip("gradio", reason="demo --ui needs it")

import gradio

from lib_xadapter.demo import page as demo_page
from lib_xadapter.demo.cells import DemoModels
from lib_xadapter.demo.page import ADAPTER, BASE, CONTROLNET, LORA, UPGRADED, make_page
from lib_xadapter.headless.generate_command import Files
from lib_xadapter.headless.lora_names import Lora
from lib_xadapter.headless.options import read_options

LOOK = 300_000
"""Milliseconds for what the page does by itself, on a slow machine."""


@pytest.fixture
def own(small):
    """Models with random weights in the place of the miniature ones: as quick as can be."""
    files = Files(small.base, small.upgraded, small.adapter, (Lora(small.lora),), (small.controlnet,))
    return DemoModels(files, small.tokenizer)


@pytest.fixture
def options(tmp_path, small):
    return read_options(["demo", "--ui", "--out", str(tmp_path / "out"), "--models-dir", str(small.folder)])


@pytest.fixture
def chosen(small):
    """What the page says when one row of quick pictures is wanted."""
    return {
        "prompt": "a cat",
        "base_prompt": "",
        "switch_point": 0.8,
        "weights": ["1", "0"],
        "rows": ["LoRA"],
        UPGRADED: str(small.upgraded),
        BASE: str(small.base),
        ADAPTER: str(small.adapter),
        LORA: [str(small.lora)],
        "lora_weight": 1.0,
        CONTROLNET: str(small.controlnet),
        "control_image": Image.new("RGB", (64, 64), "white"),
        "control_scale": 1.0,
        "size": 128,
        "steps": 1,
        "cfg_scale": 4.0,
        "seed": 2,
    }


@pytest.fixture
def generate(own, options):
    """What the page's button does, with what it says."""
    page = make_page(own, options)
    function = next(one for one in page.fns.values() if one.fn.__name__ == "generate")

    def made(chosen):
        return list(function.fn(None, *chosen.values()))

    names = [component.label for component in function.inputs]
    assert names.index(UPGRADED) < names.index(BASE) < names.index(ADAPTER)
    return made


def test_the_page_makes_a_grid_and_keeps_it(generate, chosen, tmp_path):
    *_, (grid, said) = generate(chosen)
    path = tmp_path / "out" / "grid.png"
    assert said == f"3 pictures, saved as {path}"
    assert grid.tobytes() == Image.open(path).tobytes()


def test_ones_own_files_are_found_by_name_in_the_models_folder(generate, chosen, small):
    *_, (grid, _) = generate(chosen)
    named = {UPGRADED: "small-sdxl", BASE: "small-sd15.safetensors", ADAPTER: "small", LORA: ["small-style"]}
    *_, (again, _) = generate(chosen | named)
    assert grey_levels_apart(again, grid) <= 1


def test_the_page_offers_what_lies_in_the_models_folder(own, options):
    page = make_page(own, options)
    dropdowns = [block for block in page.blocks.values() if isinstance(block, gradio.Dropdown)]
    choices = {block.label: [name for name, _ in block.choices] for block in dropdowns}
    assert choices[BASE] == ["small-sd15", "small-sd15.safetensors", "small-sdxl.safetensors"]
    assert choices[LORA] == ["small-style", "small-style.safetensors"]


def test_ones_own_map_and_its_strength_change_the_controlnets_pictures(generate, chosen):
    chosen |= {"rows": ["ControlNet"], "weights": ["1"]}
    grids = {
        generate(chosen | changed)[-1][0].crop((400, 0, 900, 200)).tobytes()
        for changed in ({}, {"control_image": Image.effect_noise((64, 64), 90).convert("RGB")}, {"control_scale": 0.0})
    }
    assert len(grids) == 3


def test_the_weight_of_the_lora_changes_the_pictures(generate, chosen):
    grids = {generate(chosen | {"weights": ["1"], "lora_weight": weight})[-1][0].tobytes() for weight in (0.0, 2.0)}
    assert len(grids) == 2


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"weights": []}, "Tick at least one weight and one row of plugins."),
        ({LORA: []}, "LoRA: choose a file."),
        ({BASE: None}, "SD1.5 checkpoint: choose a file."),
        ({"rows": ["ControlNet"], "control_image": None}, "The ControlNet needs a control map"),
        ({BASE: "nobody"}, "SD1.5 checkpoint: there is no checkpoint 'nobody'"),
        ({LORA: [__file__]}, "LoRA: test_demo_page.py"),
    ],
)
def test_what_is_wrong_is_told_in_the_pages_own_words(generate, chosen, changed, message):
    assert error_of(generate, chosen | changed).startswith(message)


def error_of(generate, chosen) -> str:
    with pytest.raises(gradio.Error) as caught:
        generate(chosen)
    return str(caught.value.message)


@pytest.mark.parametrize("model", [BASE, UPGRADED])
def test_half_of_the_miniature_pair_is_refused(generate, chosen, tmp_path, model):
    other = shutil.copy(chosen[model], tmp_path / "other.safetensors")
    assert error_of(generate, chosen | {model: str(other)}).startswith("Choose both models of the miniature pair")


def test_a_checkpoint_of_sdxl_is_no_base(generate, chosen, tmp_path):
    other = str(shutil.copy(chosen[UPGRADED], tmp_path / "other.safetensors"))
    message = error_of(generate, chosen | {UPGRADED: other, BASE: other})
    assert message.startswith("SD1.5 checkpoint: other.safetensors is a checkpoint of SDXL, expected SD1.5 or SD2.")


def test_stop_ends_in_the_midst_of_a_picture_and_keeps_those_that_are_finished(own, options, chosen, tmp_path):
    stop = threading.Event()
    models = demo_page.read_models(chosen, own, options)
    request = demo_page.read_request(chosen | {"steps": 4})
    lines = []
    for grid, said in demo_page._pictures(models, request, stop, tmp_path / "grid.png"):
        lines.append(said)
        if said.startswith("2 of 3"):
            kept = grid
            stop.set()
    assert lines[-1] == f"Stopped: 2 of 3 pictures, saved as {tmp_path / 'grid.png'}"
    assert Image.open(tmp_path / "grid.png").tobytes() == kept.tobytes()


def test_stop_before_the_first_picture_keeps_nothing(own, options, chosen, tmp_path):
    stop = threading.Event()
    stop.set()
    models, request = demo_page.read_models(chosen, own, options), demo_page.read_request(chosen)
    *_, (grid, said) = demo_page._pictures(models, request, stop, tmp_path / "grid.png")
    assert (grid, said) == (None, "Stopped before the first picture.")
    assert not list(tmp_path.glob("*.png"))


# --- in a browser -----------------------------------------------------------------------------------------------------


@pytest.fixture
def opened(own, options):
    """The page in Chromium."""
    with chromium() as browser:
        page = make_page(own, options)
        _, address, _ = page.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, share=False)
        tab = browser.new_page(viewport={"width": 1400, "height": 1500})
        tab.set_default_timeout(LOOK)
        tab.goto(address)
        yield tab
    page.close()


def untick(tab, *rows):
    for row in rows:
        tab.locator("#rows").get_by_label(row).uncheck()


def fill(tab, name, value):
    box = tab.locator(f"#{name} input[type=number]")
    box.fill(str(value))
    box.press("Enter")


def test_a_visitor_chooses_a_map_and_stops(opened, tmp_path):
    tab = opened
    picture = tmp_path / "mine.png"
    Image.new("RGB", (64, 64), "lime").save(picture)
    tab.locator("#map").get_by_label("Remove Image").or_(tab.locator("#map button[title='Clear']")).first.click()
    tab.locator("#map input[type=file]").set_input_files(str(picture))
    tab.locator("#map img").wait_for()
    untick(tab, "no plugin", "LoRA")
    fill(tab, "size", 128)
    fill(tab, "steps", 2)
    tab.locator("#generate").click()
    tab.locator("#said").get_by_text("3 pictures, saved as").wait_for()
    with Image.open(tmp_path / "out" / "grid.png") as grid:
        colours = {colour for _, colour in grid.convert("RGB").getcolors(2**24)}
    assert (0, 255, 0) in colours

    fill(tab, "steps", 50)
    tab.locator("#generate").click()
    tab.locator("#said").get_by_text(re.compile("[12] of 3 pictures")).wait_for()
    tab.locator("#stop").click()
    tab.locator("#said").get_by_text("Stopped: ").wait_for()
    if shot := os.environ.get("PAGE_SHOT"):
        tab.screenshot(path=shot, full_page=True)


def test_a_wrong_file_is_told_on_the_page(opened, tmp_path):
    tab = opened
    tab.get_by_text("Models", exact=True).click()
    box = tab.locator("#choose-sd1\\.5 input")
    box.fill(str(tmp_path / "nothing.safetensors"))
    box.press("Enter")
    tab.locator("#generate").click()
    tab.get_by_text("SD1.5 checkpoint: there is no").first.wait_for()
