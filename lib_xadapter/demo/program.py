"""`demo`: one command, a grid of pictures and a report."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import diffusers
import numpy
import torch
import transformers
from PIL import Image

from .. import __version__
from ..errors import WrongArgument
from ..headless.bars import Bars
from ..headless.grid import save_picture
from ..headless.job import LARGEST_SEED
from ..headless.options import say
from ..miniature.finished import MiniatureModels
from ..saving import write_whole
from .cells import BASE_ALONE, BASELINE, NOTICE, Cell, DemoModels, DemoRequest, cells_grid, make_cells


def run_demo(options: argparse.Namespace) -> int:
    """Make the pictures, the grid and the report, and say where they are."""
    began = time.perf_counter()
    if not 0 <= options.seed <= LARGEST_SEED:
        raise WrongArgument(f"--seed is {options.seed}, expected a whole number from 0 to {LARGEST_SEED}.")
    say(NOTICE)
    models, request = MiniatureModels(), DemoRequest(seed=options.seed)
    with Bars(len(request.rows) * (len(request.weights) + 1)) as bars:
        cells = []
        for cell in make_cells(DemoModels.of_miniature(models), request, bars.show):
            cells.append(cell)
            bars.finished(cell.column != BASE_ALONE)
    for number, cell in enumerate(cells):
        save_picture(options.out / f"{number:02d} {cell.row}, {cell.column}.png", cell.image, cell.text)
    grid = save_picture(options.out / "grid.png", cells_grid(cells, request))
    whole = time.perf_counter() - began
    facts = report(models, request, cells) | {"seconds": round(whole, 1)}
    text = json.dumps(facts, indent=2, ensure_ascii=False)
    path = write_whole(options.out / "report.json", lambda to: to.write_text(text + "\n", encoding="utf-8"))
    say(f"{len(cells)} pictures in {whole:.0f} s.\n  grid:   {grid}\n  report: {path}\n  models: {models.folder}")
    return 0


def report(models: MiniatureModels, request: DemoRequest, cells: Sequence[Cell]) -> dict[str, Any]:
    """What was done, on what, and how far every picture is from the baseline of its row."""
    baselines = {cell.row: cell.image for cell in cells if cell.column == BASELINE}
    return {
        "notice": NOTICE,
        "versions": {
            "lib_xadapter": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
        },
        "machine": {"system": platform.platform(), "processors": os.cpu_count(), "threads": torch.get_num_threads()},
        "models": str(models.folder),
        "request": dataclasses.asdict(replace(request, control_image=None)),
        "pictures": [
            {
                "row": cell.row,
                "column": cell.column,
                "seconds": round(cell.seconds, 2),
                "grey_levels_from_baseline": _difference(cell.image, baselines.get(cell.row)),
            }
            for cell in cells
        ],
    }


def _difference(image: Image.Image, baseline: Image.Image | None) -> float | None:
    """Mean absolute difference in grey levels, None where there is nothing of the same size to compare with."""
    if baseline is None or baseline.size != image.size:
        return None
    first, second = (numpy.asarray(picture, dtype=numpy.float32) for picture in (image, baseline))
    return round(float(numpy.abs(first - second).mean()), 2)
