"""The demo: one command, a grid, a report."""

from __future__ import annotations

import functools
import json

import pytest
from PIL import Image

from lib_xadapter.headless import demo
from lib_xadapter.headless.cli import main
from lib_xadapter.headless.small_models import make_small_models


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """What a quick demo leaves behind."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "SIZE", 128)
        patch.setattr(demo, "DemoRequest", functools.partial(demo.DemoRequest, steps=1, weights=(0.0, 1.0)))
        assert main(["demo", "--cache", str(folder / "cache"), "--out", str(folder / "out")]) == 0
    return folder


def test_it_writes_a_grid_of_all_rows_and_columns(shown):
    grid = Image.open(shown / "out" / "grid.png")
    assert grid.width > 3 * 128
    assert grid.height > 3 * 128
    assert len(list((shown / "out").glob("[0-9]*.png"))) == 9


def test_its_report_says_what_was_made_and_how_far_it_is_from_the_baseline(shown):
    report = json.loads((shown / "out" / "report.json").read_text())
    assert "random weights" in report["notice"]
    assert set(report["versions"]) == {"lib_xadapter", "python", "torch", "diffusers", "transformers"}
    distances = {(cell["row"], cell["column"]): cell["grey_levels_from_baseline"] for cell in report["pictures"]}
    for row in ("no plugin", "LoRA", "ControlNet"):
        assert distances[row, "SDEdit + SDXL"] == 0
        assert distances[row, "X-Adapter 1"] > 0
    assert all(cell["seconds"] > 0 for cell in report["pictures"])


def test_every_plugin_changes_the_bases_picture(shown):
    bases = [Image.open(path).tobytes() for path in sorted((shown / "out").glob("*SD1.5 alone.png"))]
    assert len(set(bases)) == 3


def test_models_that_are_there_are_not_made_again(shown):
    small = make_small_models(shown / "cache")
    written = {path: path.stat().st_mtime_ns for path in small.folder.rglob("*.safetensors")}
    assert len(written) == 5
    make_small_models(shown / "cache")
    assert {path: path.stat().st_mtime_ns for path in written} == written


def test_the_page_makes_the_same_grid(shown):
    gradio = pytest.importorskip("gradio", reason="demo --ui needs it")
    from lib_xadapter.headless.options import read_options
    from lib_xadapter.headless.page import make_page

    options = read_options(["demo", "--ui", "--out", str(shown / "page")])
    page = make_page(make_small_models(shown / "cache"), options)
    generate = next(function.fn for function in page.fns.values() if function.fn.__name__ == "generate")
    *_, (grid, said) = generate("a cat", 0.8, ["1", "0"], ["LoRA"], 1, 2)
    assert said == f"3 pictures, saved as {shown / 'page' / 'grid.png'}"
    assert grid.size == Image.open(shown / "page" / "grid.png").size
    with pytest.raises(gradio.Error, match="at least one weight"):
        next(generate("a cat", 0.8, [], ["LoRA"], 1, 2))
