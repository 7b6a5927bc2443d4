"""The report's page: it asks for nothing but the pictures beside it, and shows them side by side."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy
import pytest
from PIL import Image

from lib_xadapter.evaluation.intervals import MeanOverCaptions, compare
from lib_xadapter.evaluation.measuring import HIGHER, Figure, Measured
from lib_xadapter.evaluation.page import page
from lib_xadapter.evaluation.report import Report, Row
from tests.browsers import chromium

WAYS = ("SD1.5", "X-Adapter")
PATIENCE = 90_000
"""Milliseconds for what the page does by itself, on a slow machine."""


@pytest.fixture
def report(tmp_path) -> Report:
    """Two captions, two ways, one figure, in a folder with the pictures."""
    values = {"SD1.5": numpy.array([0.25, 0.5]), "X-Adapter": numpy.array([0.75, 0.5])}
    figure = Figure(
        "CLIP score", HIGHER, "a cosine", compare({way: MeanOverCaptions(of) for way, of in values.items()}, 2), values
    )
    rows = []
    for place, caption in enumerate(("a <b>cat</b> & 2 dogs", "a moon")):
        paths = {way: f"pictures/{place} #1/{way}.png" for way in WAYS}
        for path in paths.values():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (64, 64), (100 * place, 80, 20)).save(tmp_path / path)
        rows.append(Row(caption, 7, paths, {"CLIP score": {way: float(of[place]) for way, of in values.items()}}))
    measured = Measured((figure,), {"FID": "--inception names no weights of InceptionV3."})
    return Report(WAYS, 2, 1, measured, {"steps": 20}, {}, {}, tuple(rows))


@pytest.fixture
def written(report, tmp_path) -> Path:
    path = tmp_path / "index.html"
    path.write_text(page(report), encoding="utf-8")
    return path


class Links(HTMLParser):
    """What a page loads and what stands in it."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.loaded += [value for name, value in attributes if name in ("src", "href", "srcset", "action")]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_it_loads_the_pictures_beside_it_and_nothing_else(written):
    links = Links()
    links.feed(written.read_text(encoding="utf-8"))
    assert len(links.loaded) == 4
    assert all((written.parent / unquote(path)).is_file() for path in links.loaded)
    assert not any(mark in written.read_text(encoding="utf-8") for mark in ("http:", "https:", "@import", "url("))


def test_captions_figures_and_reasons_stand_in_it(written):
    links = Links()
    links.feed(written.read_text(encoding="utf-8"))
    text = " ".join(" ".join(links.text).split())
    assert "a <b>cat</b> & 2 dogs" in text
    assert "CLIP score ↑" in text
    assert "Not computed: FID: --inception names no weights" in text
    assert "2 captions with 1 seed each, 95 % intervals" in text
    assert "SD1.5 less X-Adapter" in text
    assert "CLIP score 0.250" in text


@pytest.fixture
def browser():
    with chromium() as opened:
        yield opened


def test_a_click_shows_a_captions_pictures_in_full_and_zooms_them_together(browser, written):
    shown = browser.new_page(offline=True)
    shown.set_default_timeout(PATIENCE)
    problems: list[str] = []
    shown.on("pageerror", lambda error: problems.append(str(error)))
    shown.goto(written.as_uri())
    shown.locator("section").nth(1).get_by_role("button").first.click()
    dialog = shown.get_by_role("dialog")
    assert dialog.get_by_text("a moon").is_visible()
    pictures = dialog.locator("img")
    assert pictures.count() == 2
    assert "scale(1)" in pictures.first.get_attribute("style")
    pictures.first.hover()
    shown.mouse.wheel(0, -400)
    shown.wait_for_function("!document.querySelector('dialog img').style.transform.includes('scale(1)')")
    zoomed = [pictures.nth(place).get_attribute("style") for place in range(2)]
    assert zoomed[0] == zoomed[1]
    shown.keyboard.press("ArrowLeft")
    assert pictures.first.get_attribute("style") != zoomed[0]
    for _ in range(8):
        shown.keyboard.press("-")
    assert "scale(1)" in pictures.nth(1).get_attribute("style")
    shown.keyboard.press("Escape")
    dialog.wait_for(state="hidden")
    assert problems == []
