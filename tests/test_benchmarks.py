"""Benchmarks that need no WebUI run at their smallest; how long anything takes is not looked at."""

from __future__ import annotations

import importlib
import json

import pytest
import torch
from PIL import Image
from torch import nn

pytest.importorskip("matplotlib", reason="needs the extra 'benchmarks'")
pytest.importorskip("diffusers", reason="needs the extra 'headless'")

from benchmarks import curves, miniature_facts, miniature_tables, picture_rows
from benchmarks.mapping_layers import Case, operations
from benchmarks.random_adapter import RELEASED, random_adapter
from benchmarks.timing import Spread, Times
from lib_xadapter.mapping import MappingLayers, read_layout
from lib_xadapter.miniature.drawing import upgraded_picture
from lib_xadapter.miniature.making import write_pictures

QUICK = ["--small", "--device", "cpu", "--rounds", "1", "--warm-up", "0"]


def run(name: str, folder, capsys, *more: str) -> dict:
    """A benchmark's JSON, once its table is printed and its plot drawn."""
    importlib.import_module(f"benchmarks.{name}").main([*QUICK, "--out", str(folder), *more])
    (written,) = folder.glob("*.json")
    assert written.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    content = json.loads(written.read_text())
    assert content["question"] in capsys.readouterr().out
    return content


def test_mapping_layers(tmp_path, capsys):
    found = run("mapping_layers", tmp_path, capsys, "--paths", "eager channels-last", "--sizes", "64x64")
    assert [row["path"] for row in found["rows"]] == ["eager NCHW", "eager channels-last"]
    assert all(row["apart"] < 1e-5 for row in found["rows"])


def test_a_joint_step(tmp_path, capsys):
    found = run("joint_step", tmp_path, capsys, "--sizes", "64x64")
    assert {row["step"] for row in found["rows"]} >= {"SDXL alone", "sum of these", "joint, recorded"}
    assert found["not_run"] == {"joint, overlapped": "needs a GPU"}


def test_peak_memory(tmp_path, capsys):
    found = run("peak_memory", tmp_path, capsys, "--size", "64x64", "--steps", "1")
    alone, lockstep, recorded = (row["weights on the device, GB"] for row in found["rows"])
    assert recorded == pytest.approx(alone + found["result"]["adapter, GB"], rel=1e-5)
    assert lockstep > recorded


@pytest.mark.parametrize("more", [["--seeds", "1"], ["--full-size"]], ids=["pictures", "latents"])
def test_cheaper(tmp_path, capsys, more):
    rows = run("cheaper", tmp_path, capsys, "--size", "64x64", "--steps", "2", *more)["rows"]
    apart = {row["variant"]: row["latents apart"]["median"] for row in rows}
    assert apart.pop("refresh_every 1") == 0
    assert min(apart.values()) > 0
    assert ("at most" in rows[0]) == (more != ["--full-size"])


def test_a_training_step(tmp_path, capsys):
    pytest.importorskip("datasets", reason="needs the extra 'train'")
    found = run("training_step", tmp_path, capsys, "--size", "128", "--dtype", "float32")
    (row,) = found["rows"]
    assert row["peak, GB"] > row["base, GB"] + row["upgraded model, GB"] > 0


def test_arithmetic_in_float32_gives_what_bfloat16s_own_gives():
    from benchmarks.rounded_arithmetic import rounded_arithmetic

    torch.manual_seed(0)
    parts = (nn.Conv2d(4, 8, 3, padding=1), nn.ConvTranspose2d(8, 4, 2, stride=2), nn.Flatten(), nn.Linear(256, 5))
    net, x = nn.Sequential(*parts), torch.randn(2, 4, 4, 4, requires_grad=True)

    def computed() -> list[torch.Tensor]:
        made = net(x)
        return [made, *torch.autograd.grad(made.float().square().sum(), [x, *net.parameters()])]

    with torch.autocast("cpu", torch.bfloat16):
        own = computed()
        with rounded_arithmetic():
            ours = computed()
    for one, other in zip(ours, own, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=0.02, atol=0.02)


def test_a_training_step_at_full_size_computes_what_it_cannot_do_without():
    pytest.importorskip("datasets", reason="needs the extra 'train'")
    from benchmarks.training_step import counted, over_parts

    assert 0.99 <= over_parts(counted(small=False, size=1024)) <= 1.05


def test_the_mapping_layers_have_the_operations_that_the_paper_leads_to():
    """1.8 TFLOP for each CFG half at 1024 px."""
    with torch.device("meta"):
        released = MappingLayers(read_layout(RELEASED.shapes()))
    assert operations(released, Case((1024, 1024), 1, torch.float32)) == pytest.approx(1.79e12, rel=0.01)


def test_operations_grow_with_rows_and_pixels():
    adapter = random_adapter(torch.float32, small=True)
    one, four = (operations(adapter, Case(size, rows, torch.float32)) for size, rows in (((64, 64), 2), ((128, 64), 4)))
    assert four == 4 * one


def test_ratios_are_taken_round_by_round():
    """A machine that is slow for a while is slow for both."""
    assert Times((2.0, 20.0, 6.0)).over(Times((1.0, 10.0, 3.0))) == Spread(2.0, 2.0, 2.0)


def test_true_pictures_show_the_facts_of_their_own_captions_and_others_do_not(tmp_path):
    write_pictures(tmp_path, range(8), upgraded_picture)
    captions = [(tmp_path / f"{seed}.txt").read_text() for seed in range(8)]
    rows = [
        {"caption": caption, "pictures": {"true": f"{seed}.png", "of another": f"{(seed + 1) % 8}.png"}}
        for seed, caption in enumerate(captions)
    ]
    (tmp_path / "figures.json").write_text(json.dumps({"ways": ["true", "of another"], "pictures": rows}))
    found = miniature_facts.measured(tmp_path / "figures.json").estimates
    assert found["true"].value > 0.95
    assert found["of another"].value < 0.4


@pytest.mark.parametrize("name", miniature_tables.RUNS)
def test_a_run_of_the_miniature_tables_comes_after_those_that_it_takes_pictures_of(name):
    run, before = miniature_tables.RUNS[name], [*miniature_tables.RUNS]
    before = before[: before.index(name)]
    assert {*filter(None, [run.like]), *(one.run for one in run.beside)} <= {*before}
    assert run.adapter is None or run.adapter in miniature_tables.ADAPTERS


def figures_of(**ways: float) -> dict:
    names = {way.replace("_", " "): value for way, value in ways.items()}
    figures = [
        {"name": name, "ways": {way: {"value": value} for way, value in names.items()}} for name in ("F1", "FID")
    ]
    return {"ways": list(names), "figures": figures}


def test_ways_that_differ_in_their_switch_point_become_a_curve(tmp_path):
    first = figures_of(SDXL=0.3, **{"X-Adapter, switch point 0.4": 0.2, "X-Adapter, switch point 1": 0.1, "SD1.5": 0.9})
    other = figures_of(SDXL=0.3, **{"X-Adapter, switch point 0.4": 0.4})
    found = curves.together(
        [("", curves.curves_of(first, "FID", "F1", ["SD1.5"])), ("amplified", curves.curves_of(other, "FID", "F1"))]
    )
    assert found == {
        "SDXL": [curves.Point("", 0.3, 0.3)],
        "X-Adapter, by switch point": [curves.Point("0.4", 0.2, 0.2), curves.Point("1", 0.1, 0.1)],
        "X-Adapter, by switch point, amplified": [curves.Point("0.4", 0.4, 0.4)],
    }
    (tmp_path / "figures.json").write_text(json.dumps(first))
    named = ["--across", "FID", "--up", "F1", "--out", str(tmp_path / "curves.png")]
    curves.main([str(tmp_path / "figures.json"), *named])
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_pictures_of_an_evaluation_stand_side_by_side(tmp_path):
    for name, colour in (("one", "red"), ("other", "blue")):
        Image.new("RGB", (8, 8), colour).save(tmp_path / f"{name}.png")
    row = {"pictures": {"SD1.5": "one.png", "SDXL": "other.png"}}
    (tmp_path / "figures.json").write_text(json.dumps({"ways": ["SD1.5", "SDXL"], "pictures": [row, row]}))
    picture_rows.main([str(tmp_path / "figures.json"), "--out", str(tmp_path / "rows.png"), "--captions", "1"])
    pixels = {colour: number for number, colour in Image.open(tmp_path / "rows.png").getcolors(10_000)}
    assert pixels[255, 0, 0] == pixels[0, 0, 255]
