"""What the finished files draw by themselves, and how much of their captions is found in it."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from ..headless.model_files import load_base, load_upgraded
from ..saving import write_whole
from . import model_files
from .autoencoders import fidelity
from .captions import facts_of
from .finished import MiniatureModels
from .judge import Judge, find_facts, load_judge
from .making import SIZE, Work
from .scenes import scene_of
from .worlds import HELD_OUT, WORLDS, caption, picture_of, tensor_of

logger = logging.getLogger(__name__)

STEPS, GUIDANCE = 20, 4.0
AT_ONCE = 16
COLUMNS = 8
MOST_SHOWN = 32


def write_grids(work: Work, pictures: int) -> int:
    """Grids of both models beside the true pictures, and figures.json with the shares of facts."""
    seeds = range(HELD_OUT, HELD_OUT + pictures)
    judge = load_judge(MiniatureModels(work.models).judge)
    figures: dict[str, Any] = {"captions": pictures, "steps": STEPS, "guidance": GUIDANCE}
    for world, name, load in (
        ("base", model_files.BASE, load_base),
        ("upgraded", model_files.UPGRADED, load_upgraded),
    ):
        pipeline = load(work.models / "Stable-diffusion" / name, torch.float32)
        pipeline.set_progress_bar_config(disable=True)
        draw, _ = WORLDS[world]
        true = tensor_of([draw(scene_of(seed)) for seed in seeds])
        drawn = draw_captions(pipeline, [caption(seed) for seed in seeds], SIZE[world])
        facts = [facts_of(scene_of(seed)) for seed in seeds]
        figures[world] = {
            "facts found in true pictures": share_found(judge, true, facts),
            "facts found": share_found(judge, drawn, facts),
            "facts found with another caption": share_found(judge, drawn, facts[1:] + facts[:1]),
            "vae, dB": fidelity(pipeline.vae, true),
        }
        logger.warning("%s: %s", world, figures[world])
        _save_grid(work.out / "grids" / f"{world}.png", drawn, true)
    text = json.dumps(figures, indent=1)
    write_whole(work.out / "grids" / "figures.json", lambda to: to.write_text(text, encoding="utf-8"))
    return STEPS


def draw_captions(pipeline: Any, captions: Sequence[str], size: int, seed: int = 0) -> Tensor:
    """What a pipeline makes of captions, (rows, 3, size, size), -1 to 1; picture n from seed + n."""
    made = []
    for first in range(0, len(captions), AT_ONCE):
        part = list(captions[first : first + AT_ONCE])
        generators = [torch.Generator().manual_seed(seed + first + number) for number in range(len(part))]
        found = pipeline(
            part,
            height=size,
            width=size,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            generator=generators,
            output_type="pt",
        ).images
        made.append(2 * found.float().cpu() - 1)
    return torch.cat(made)


def share_found(judge: Judge, pictures: Tensor, facts: list) -> float:
    """The share of all captions' facts that is found in their pictures."""
    found = find_facts(judge, pictures, facts)
    return sum(one.found for one in found) / max(sum(one.total for one in found), 1)


def _save_grid(path: Path, drawn: Tensor, true: Tensor) -> None:
    """Rows of drawn pictures, each above the row of the true ones."""
    shown = min(len(drawn), MOST_SHOWN) // COLUMNS * COLUMNS or len(drawn)
    rows = []
    for first in range(0, shown, COLUMNS):
        for one in (drawn, true):
            part = functional.interpolate(one[first : min(first + COLUMNS, shown)], (128, 128), mode="nearest")
            rows.append(numpy.concatenate([picture_of(row) for row in part], 1))
    grid = Image.fromarray(numpy.concatenate(rows))
    write_whole(path, grid.save)
