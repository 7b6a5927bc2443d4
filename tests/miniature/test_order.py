"""The order of the paper's Table 1 on 32 captions: features that are led to the wrong place lose it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("diffusers", reason="needs the extra 'headless'")
pytest.importorskip("cv2", reason="needs the extra 'evaluate'")
pytest.importorskip("skimage", reason="needs the extra 'evaluate'")

from lib_xadapter import joint_stage
from lib_xadapter.headless.cli import main
from lib_xadapter.miniature.drawing import UPGRADED_SIZE
from lib_xadapter.miniature.finished import MiniatureModels
from lib_xadapter.miniature.making import write_held_out

CAPTIONS = 32
MODELS = MiniatureModels()


@pytest.fixture(scope="module")
def captions(tmp_path_factory) -> Path:
    """Captions that no model has seen, with pictures of the base world, whose edges are kept or not."""
    base, _ = write_held_out(tmp_path_factory.mktemp("captions"), CAPTIONS)
    return base


def edges_kept(captions: Path, adapter: Path, out: Path) -> dict:
    """F1 of edges in a small table: its ways, and the differences between them."""
    models = ("--base", MODELS.base, "--upgraded", MODELS.upgraded, "--tokenizer", MODELS.tokenizer)
    plugins = ("--controlnet", MODELS.controlnet("edges"), "--control", "canny")
    size = ("--width", UPGRADED_SIZE, "--height", UPGRADED_SIZE, "--steps", 12, "--cfg", 4, "--batch", 16)
    given = ("--captions", captions, "--adapter", adapter, "--out", out, "--device", "cpu", "--metrics", "condition")
    assert main(["evaluate", *map(str, (*models, *plugins, *size, *given))]) == 0
    figures = json.loads((out / "figures.json").read_text(encoding="utf-8"))["figures"]
    return next(figure for figure in figures if figure["name"] == "F1, edges")


def interval_of(figure: dict, one: str, other: str) -> tuple[float, float]:
    """Of the difference between two ways on the same captions."""
    for found in figure["differences"]:
        low, high = found["interval"]
        if (found["one"], found["other"]) == (one, other):
            return low, high
        if (found["one"], found["other"]) == (other, one):
            return -high, -low
    raise AssertionError(f"{one} and {other} were not compared")


@pytest.fixture(scope="module")
def table(captions, tmp_path_factory) -> dict:
    return edges_kept(captions, MODELS.adapter, tmp_path_factory.mktemp("table"))


def test_xadapter_keeps_more_of_the_edges_than_sdedit(table):
    assert interval_of(table, "X-Adapter", "SDEdit + SDXL")[0] > 0


def test_with_the_features_of_the_picture_beside_that_is_lost(captions, table, tmp_path, monkeypatch):
    match = joint_stage.match_rows

    def one_further(rows, of_base):
        first, *others = match(rows, of_base)
        return [*others, first]

    monkeypatch.setattr(joint_stage, "match_rows", one_further)
    figure = edges_kept(captions, MODELS.adapter, tmp_path / "out")
    assert figure["ways"]["X-Adapter"]["value"] < table["ways"]["X-Adapter"]["value"]
    assert interval_of(figure, "X-Adapter", "SDEdit + SDXL")[0] < 0
