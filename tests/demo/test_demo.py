"""The demo: one command, a grid, a report."""

from __future__ import annotations

import functools
import json

import pytest
from PIL import Image

from lib_xadapter.demo import cells, program
from lib_xadapter.headless.cli import main


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """What a quick demo leaves behind."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        quick = functools.partial(cells.DemoRequest, steps=2, weights=(0.0, 1.0))
        patch.setattr(program, "DemoRequest", quick)
        assert main(["demo", "--out", str(folder)]) == 0
    return folder


def test_it_writes_a_grid_of_all_rows_and_columns(shown):
    grid = Image.open(shown / "grid.png")
    assert grid.width > 5 * 128
    assert grid.height > 3 * 128
    assert len(list(shown.glob("[0-9]*.png"))) == 12


def test_its_report_says_what_was_made_and_how_far_it_is_from_the_baseline(shown):
    report = json.loads((shown / "report.json").read_text())
    assert "trained from nothing" in report["notice"]
    assert set(report["versions"]) == {"lib_xadapter", "python", "torch", "diffusers", "transformers"}
    distances = {(cell["row"], cell["column"]): cell["grey_levels_from_baseline"] for cell in report["pictures"]}
    for row in ("no plugin", "LoRA", "ControlNet"):
        assert distances[row, "SDEdit + SDXL"] == 0
        assert distances[row, "X-Adapter 1"] > 0
        assert distances[row, "SDXL, its own plugin"] > 0
    assert all(cell["seconds"] > 0 for cell in report["pictures"])


def test_the_grid_shows_the_map_in_the_row_of_the_controlnet():
    """A column before the others, empty in other rows."""
    wide, tall = Image.new("RGB", (128, 128), "red"), Image.new("RGB", (128, 128), "blue")
    made = [cells.Cell("no plugin", "SD1.5 alone", wide, 1.0), cells.Cell("ControlNet", "SD1.5 alone", tall, 1.0)]
    request = cells.DemoRequest(size=128, control_image=Image.new("RGB", (64, 64), "lime"))
    grid = cells.cells_grid(made, request)
    colours = [[grid.getpixel((x, y)) for x in (grid.width - 210, grid.width - 80)] for y in (100, grid.height - 70)]
    white, red, lime, blue = (255, 255, 255), (255, 0, 0), (0, 255, 0), (0, 0, 255)
    assert colours == [[white, red], [lime, blue]]
    without = cells.cells_grid(made[:1], request)
    assert without.width < grid.width - 128


def test_the_report_names_no_map(shown):
    report = json.loads((shown / "report.json").read_text())
    assert report["request"]["size"] == 128
    assert all(cell["column"] != "control map" for cell in report["pictures"])


def test_every_plugin_changes_the_bases_picture(shown):
    bases = [Image.open(path).tobytes() for path in sorted(shown.glob("*SD1.5 alone.png"))]
    assert len(set(bases)) == 3
