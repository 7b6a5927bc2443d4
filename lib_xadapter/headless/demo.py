"""`demo`: the whole pipeline on small models with random weights, so that anyone can see it work on any machine."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import diffusers
import numpy
import torch
import transformers
from PIL import Image, ImageDraw

from .. import __version__
from ..errors import WrongArgument
from ..settings import Settings
from .asked import Files
from .bars import Bars
from .generate import load_models
from .grid import labelled_grid, save_picture
from .job import LARGEST_SEED, Job
from .jobs import Picture, make_pictures
from .lora_names import Lora
from .models import Models, Placement
from .options import say
from .pipeline import Progress, no_progress
from .saving import write_whole
from .small_models import SmallModels, make_small_models

NOTICE = "These models have random weights: they make patterns, not pictures. What to see is which model follows which."
WEIGHTS = (0.0, 0.5, 1.0, 1.5)
STEPS = 8
SIZE = 256
PROMPT = "a house by the sea"
BASELINE = "SDEdit + SDXL"
BASE_ALONE = "SD1.5 alone"
CONTROL_MAP = "control map"


@dataclass(frozen=True)
class Plugins:
    """A row of the grid: what the base wears."""

    name: str
    lora: bool = False
    control: bool = False


ROWS = (Plugins("no plugin"), Plugins("LoRA", lora=True), Plugins("ControlNet", control=True))


@dataclass(frozen=True)
class Cell:
    """A picture of the grid and how long it took."""

    row: str
    column: str
    image: Image.Image
    seconds: float
    text: str = ""


@dataclass(frozen=True)
class DemoModels:
    """What the pictures are made with.

    Attributes:
        files: with every plugin that a row can wear.
        tokenizer: as in `load_models`.
        placement: where the models run.
    """

    files: Files
    tokenizer: Path | None = None
    placement: Placement = field(default_factory=Placement)

    @classmethod
    def of_small(cls, small: SmallModels) -> DemoModels:
        files = Files(small.base, small.upgraded, small.adapter, (Lora(small.lora),), (small.controlnet,))
        return cls(files, small.tokenizer)

    def worn(self, row: Plugins) -> Files:
        """The files of a row."""
        loras, controlnets = self.files.loras, self.files.controlnets
        return replace(self.files, loras=loras if row.lora else (), controlnets=controlnets if row.control else ())


@dataclass(frozen=True)
class DemoRequest:
    """What can be turned.

    Attributes:
        prompt, base_prompt: of SDXL, and of the base where it is told something else.
        seed, switch_point, weights, steps: as in `Job`.
        size: of both sides, in pixels.
        rows: one for each set of plugins.
        control_image: the ControlNet's map; None draws one.
        control_scale: how strong the ControlNet is.
    """

    prompt: str = PROMPT
    base_prompt: str = ""
    seed: int = 1
    switch_point: float = Settings().switch_point
    weights: tuple[float, ...] = WEIGHTS
    steps: int = STEPS
    size: int = SIZE
    rows: tuple[Plugins, ...] = ROWS
    control_image: Image.Image | None = None
    control_scale: float = 1.0

    @property
    def map(self) -> Image.Image:
        """What the ControlNet is given."""
        return self.control_image or control_map(self.size // 2)


def run_demo(options: argparse.Namespace) -> int:
    """Make the models, the pictures, the grid and the report, and say where they are."""
    began = time.perf_counter()
    if not 0 <= options.seed <= LARGEST_SEED:
        raise WrongArgument(f"--seed is {options.seed}, expected a whole number from 0 to {LARGEST_SEED}.")
    say(NOTICE)
    small = make_small_models(options.cache or default_cache())
    made_models = time.perf_counter() - began
    request = DemoRequest(seed=options.seed)
    with Bars(len(request.rows) * len(request.weights)) as bars:
        cells = []
        for cell in make_cells(DemoModels.of_small(small), request, bars.show):
            cells.append(cell)
            bars.finished(cell.column != BASE_ALONE)
    for number, cell in enumerate(cells):
        save_picture(options.out / f"{number:02d} {cell.row}, {cell.column}.png", cell.image, cell.text)
    grid = save_picture(options.out / "grid.png", cells_grid(cells, request))
    whole = time.perf_counter() - began
    facts = report(small, request, cells) | {"seconds": {"models": round(made_models, 1), "whole": round(whole, 1)}}
    text = json.dumps(facts, indent=2, ensure_ascii=False)
    path = write_whole(options.out / "report.json", lambda to: to.write_text(text + "\n", encoding="utf-8"))
    say(f"{len(cells)} pictures in {whole:.0f} s.\n  grid:   {grid}\n  report: {path}\n  models: {small.folder}")
    return 0


def default_cache() -> Path:
    """Where the small models are kept."""
    caches = os.environ.get("XDG_CACHE_HOME")
    return (Path(caches) if caches else Path.home() / ".cache") / "lib_xadapter" / "demo"


def make_cells(models: DemoModels, request: DemoRequest, progress: Progress = no_progress) -> Iterator[Cell]:
    """The cells of the grid, row after row, each as soon as it is finished."""
    for row in request.rows:
        files = models.worn(row)
        yield from _row(row, files, load_models(files, models.placement, models.tokenizer), request, progress)


def _row(row: Plugins, files: Files, models: Models, request: DemoRequest, progress: Progress) -> Iterator[Cell]:
    adapter = files.adapter.stem if files.adapter else "None"
    job = Job(
        prompt=request.prompt,
        settings=Settings(base_checkpoint=files.base.stem, adapter=adapter, base_prompt=request.base_prompt),
        width=request.size,
        height=request.size,
        steps=request.steps,
        seed=request.seed,
        switch_points=(request.switch_point,),
        weights=request.weights,
        control_images=(request.map,) * len(files.controlnets),
        control_scales=((request.control_scale,),) * len(files.controlnets),
        model=files.upgraded.stem,
        loras=tuple((lora.path.stem, lora.weight) for lora in files.loras),
        control_names=tuple(net.stem for net in files.controlnets),
    )
    began = time.perf_counter()
    base_alone = 0.0

    def watched(stage: str, done: int, total: int) -> None:
        nonlocal base_alone
        if stage == "base" and done == total:
            base_alone = time.perf_counter() - began
        progress(stage, done, total)

    for place, picture in enumerate(make_pictures(models, job, progress=watched)):
        seconds, began = time.perf_counter() - began, time.perf_counter()
        if place == 0:
            seconds -= base_alone
            yield Cell(row.name, BASE_ALONE, picture.base_image, base_alone)
        yield Cell(row.name, _column(picture), picture.image, seconds, picture.text)


def _column(picture: Picture) -> str:
    weight = picture.settings.weight
    return f"X-Adapter {weight:g}" if weight else BASELINE


def control_map(size: int) -> Image.Image:
    """White outlines on black, as an edge detector gives."""
    image = Image.new("RGB", (size, size))
    draw = ImageDraw.Draw(image)
    line = max(size // 32, 1)
    draw.ellipse((size // 8, size // 8, size * 7 // 8, size * 7 // 8), outline="white", width=line)
    draw.polygon([(size // 2, size // 4), (size * 3 // 4, size * 3 // 4), (size // 4, size * 3 // 4)], outline="white")
    return image


def cells_grid(cells: Sequence[Cell], request: DemoRequest) -> Image.Image:
    """The cells, a row for each set of plugins; before them the maps that ControlNets were given."""
    rows, columns = (list(dict.fromkeys(getattr(cell, side) for cell in cells)) for side in ("row", "column"))
    images = {(cell.row, cell.column): cell.image for cell in cells}
    maps = {(row.name, CONTROL_MAP): request.map for row in request.rows if row.control and row.name in rows}
    columns = [CONTROL_MAP, *columns] if maps else columns
    images |= maps
    return labelled_grid([[images.get((row, column)) for column in columns] for row in rows], rows, columns)


def report(small: SmallModels, request: DemoRequest, cells: Sequence[Cell]) -> dict[str, Any]:
    """What was done, on what, and how far every picture is from the baseline of its row."""
    baselines = {cell.row: cell.image for cell in cells if cell.column == BASELINE}
    files = (small.upgraded, small.base, small.lora, small.controlnet, small.adapter)
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
        "models": {str(path): path.stat().st_size for path in files},
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
