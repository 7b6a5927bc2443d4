"""What the demo shows: a row for each plugin of SD1.5, a column for each way of making a picture with it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from PIL import Image

from ..headless.generate import load_models
from ..headless.generate_command import Files
from ..headless.grid import labelled_grid
from ..headless.job import Job
from ..headless.jobs import Picture, make_pictures
from ..headless.lora_names import Lora
from ..headless.models import Placement
from ..headless.pipeline import Progress, no_progress
from ..miniature.drawing import edge_map
from ..miniature.finished import MiniatureModels
from ..miniature.scenes import Scene, scene_of
from ..miniature.worlds import HELD_OUT, caption
from ..settings import Settings

NOTICE = (
    "The models are small ones of a drawn world, trained from nothing: SD1.5's half paints flat shapes at 64 pixels, "
    "SDXL's half paints shaded ones at 128, and the plugins are SD1.5's."
)
WEIGHTS = (0.0, 0.5, 1.0, 1.5)
STEPS = 20
CFG_SCALE = 4.0
SIZE = 128
SCENE = HELD_OUT + 8
"""Seed of a scene that no model has seen: its caption is the prompt, its edges are the control map."""
BASELINE = "SDEdit + SDXL"
BASE_ALONE = "SD1.5 alone"
NATIVE = "SDXL, its own plugin"
CONTROL_MAP = "control map"


@dataclass(frozen=True)
class Plugins:
    """A row of the grid: the base's plugins."""

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
        native: the same with plugins of SDXL itself instead, the upper bound; None where there are none.
    """

    files: Files
    tokenizer: Path | None = None
    placement: Placement = field(default_factory=Placement)
    native: Files | None = None

    @classmethod
    def of_miniature(cls, models: MiniatureModels) -> DemoModels:
        bare = Files(models.base, models.upgraded, models.adapter, (), ())
        return cls(
            replace(bare, loras=(Lora(models.lora("palette")),), controlnets=(models.controlnet("edges"),)),
            models.tokenizer,
            native=replace(
                bare,
                adapter=None,
                loras=(Lora(models.lora("upgraded-palette")),),
                upgraded_controlnets=(models.controlnet("upgraded-edges"),),
            ),
        )

    def files_for(self, row: Plugins) -> Files:
        """The files of a row."""
        return _files_for(self.files, row)

    def native_files_for(self, row: Plugins) -> Files | None:
        """The same of SDXL itself."""
        return self.native and _files_for(self.native, row)


def _files_for(files: Files, row: Plugins) -> Files:
    return replace(
        files,
        loras=files.loras if row.lora else (),
        controlnets=files.controlnets if row.control else (),
        upgraded_controlnets=files.upgraded_controlnets if row.control else (),
    )


@dataclass(frozen=True)
class DemoRequest:
    """What can be turned.

    Attributes:
        prompt, base_prompt: of SDXL, and of the base where it is told something else.
        seed, switch_point, weights, steps: as in `Job`.
        size: of both sides, in pixels.
        rows: one for each set of plugins.
        control_image: the ControlNet's map; None for the edges of the scene.
        control_scale: how strong the ControlNet is.
        cfg_scale: of both models.
    """

    prompt: str = caption(SCENE)
    base_prompt: str = ""
    seed: int = 1
    switch_point: float = Settings().switch_point
    weights: tuple[float, ...] = WEIGHTS
    steps: int = STEPS
    size: int = SIZE
    rows: tuple[Plugins, ...] = ROWS
    control_image: Image.Image | None = None
    control_scale: float = 1.0
    cfg_scale: float = CFG_SCALE

    @property
    def map(self) -> Image.Image:
        """What the base's ControlNet is given."""
        return self.control_image or control_map(scene_of(SCENE), self.size // 2)

    @property
    def large_map(self) -> Image.Image:
        """What SDXL's own ControlNet is given."""
        return self.control_image or control_map(scene_of(SCENE), self.size)


def make_cells(models: DemoModels, request: DemoRequest, progress: Progress = no_progress) -> Iterator[Cell]:
    """The cells of the grid, row after row, each as soon as it is finished."""
    for row in request.rows:
        yield from _joint_cells(row, models, request, progress)
        if models.native is not None:
            yield _native_cell(row, models, request, progress)


def _job(files: Files, request: DemoRequest) -> Job:
    adapter = files.adapter.stem if files.adapter else "None"
    return Job(
        prompt=request.prompt,
        settings=Settings(base_checkpoint=files.base.stem, adapter=adapter, base_prompt=request.base_prompt),
        width=request.size,
        height=request.size,
        steps=request.steps,
        cfg_scale=request.cfg_scale,
        seed=request.seed,
        switch_points=(request.switch_point,),
        weights=request.weights,
        control_images=(request.map,) * len(files.controlnets),
        control_scales=((request.control_scale,),) * len(files.controlnets),
        model=files.upgraded.stem,
        loras=tuple((lora.path.stem, lora.weight) for lora in files.loras),
        control_names=tuple(net.stem for net in files.controlnets),
    )


def _joint_cells(row: Plugins, models: DemoModels, request: DemoRequest, progress: Progress) -> Iterator[Cell]:
    files = models.files_for(row)
    loaded = load_models(files, models.placement, models.tokenizer)
    began = time.perf_counter()
    base_alone = 0.0

    def watched(stage: str, done: int, total: int) -> None:
        nonlocal base_alone
        if stage == "base" and done == total:
            base_alone = time.perf_counter() - began
        progress(stage, done, total)

    for place, picture in enumerate(make_pictures(loaded, _job(files, request), progress=watched)):
        seconds, began = time.perf_counter() - began, time.perf_counter()
        if place == 0:
            seconds -= base_alone
            yield Cell(row.name, BASE_ALONE, picture.base_image, base_alone)
        yield Cell(row.name, _column(picture), picture.image, seconds, picture.text)


def _native_cell(row: Plugins, models: DemoModels, request: DemoRequest, progress: Progress) -> Cell:
    """What SDXL makes by itself, with such a plugin of its own."""
    files = models.native_files_for(row)
    loaded = load_models(files, models.placement, models.tokenizer)
    job = _job(files, request)
    alone = replace(
        job,
        settings=replace(job.settings, single_stage=True),
        weights=(0.0,),
        upgraded_maps=(request.large_map,) * len(files.upgraded_controlnets),
        upgraded_map_scales=(request.control_scale,) * len(files.upgraded_controlnets),
    )
    began = time.perf_counter()
    (picture,) = make_pictures(loaded, alone, progress=progress)
    return Cell(row.name, NATIVE, picture.image, time.perf_counter() - began, picture.text)


def _column(picture: Picture) -> str:
    weight = picture.settings.weight
    return f"X-Adapter {weight:g}" if weight else BASELINE


def control_map(scene: Scene, size: int) -> Image.Image:
    """White outlines on black."""
    return Image.fromarray(edge_map(scene, size)).convert("RGB")


def cells_grid(cells: Sequence[Cell], request: DemoRequest) -> Image.Image:
    """The cells, a row for each set of plugins; before them the maps that ControlNets were given."""
    rows, columns = (list(dict.fromkeys(getattr(cell, side) for cell in cells)) for side in ("row", "column"))
    images = {(cell.row, cell.column): cell.image for cell in cells}
    maps = {(row.name, CONTROL_MAP): request.map for row in request.rows if row.control and row.name in rows}
    columns = [CONTROL_MAP, *columns] if maps else columns
    images |= maps
    return labelled_grid([[images.get((row, column)) for column in columns] for row in rows], rows, columns)
