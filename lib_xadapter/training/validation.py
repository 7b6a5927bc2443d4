"""Validation grids: what the adapter makes by now, beside what there is without it, of the same prompts and seeds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from ..headless.grid import labelled_grid, save_picture
from ..headless.job import Job
from ..headless.jobs import make_pictures
from ..headless.models import Models
from ..mapping import MappingLayers
from ..settings import Settings

COLUMNS = ("base alone", "SDEdit + upgraded", "adapter")
WEIGHTS = (0.0, 1.0)
LABEL = 24


@dataclass(frozen=True)
class Validation:
    """What is painted every so many steps.

    Attributes:
        models: the pair, the base with its plugin where one is named; their adapter is that of the moment.
        prompts: a row of the grid each, with seeds 0, 1, 2, ….
        size: in pixels of the upgraded model.
        steps: of the sampler.
        folder: where the grids go.
    """

    models: Models
    prompts: Sequence[str]
    size: int
    steps: int
    folder: Path

    def paint(self, layers: Callable[[], AbstractContextManager[MappingLayers]], step: int) -> Image.Image:
        """The grid of a step, which is written too.

        Args:
            layers: while what it gives is open, the mapping layers are as they would be used.
        """
        with layers() as adapter, torch.no_grad():
            models = dataclasses.replace(self.models, adapter=adapter)
            rows = [self._row(models, prompt, seed) for seed, prompt in enumerate(self.prompts)]
        grid = labelled_grid(rows, [prompt[:LABEL] for prompt in self.prompts], COLUMNS)
        save_picture(self.folder / f"step-{step:08d}.png", grid)
        return grid

    def _row(self, models: Models, prompt: str, seed: int) -> list[Image.Image]:
        job = Job(
            prompt=prompt,
            settings=Settings(),
            width=self.size,
            height=self.size,
            steps=self.steps,
            seed=seed,
            weights=WEIGHTS,
        )
        without, with_adapter = make_pictures(models, job)
        return [without.base_image, without.image, with_adapter.image]
