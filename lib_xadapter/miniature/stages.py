"""The stages in which everything is made, and how much each may cost. Nothing heavy is imported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

HOURS = 6.0
"""What the minutes below fit into, on two cores with a stage on each."""


@dataclass(frozen=True)
class Stage:
    """A stage: what it makes, from what, and for how long.

    Attributes:
        name: of its folder.
        told: what it makes.
        needs: names of the stages that it builds on.
        minutes: of one core; steps that do not fit are left out, but for latents and mapping layers, which take theirs.
        steps: of learning; for banks of latents, pictures.
        batch: rows a step.
        learning_rate: at its highest.
    """

    name: str
    told: str
    minutes: float
    needs: tuple[str, ...] = ()
    steps: int = 0
    batch: int = 32
    learning_rate: float = 1e-3


STAGES: Mapping[str, Stage] = {
    stage.name: stage
    for stage in (
        # what waits longest comes first, as the two cores take the first stage that can begin
        Stage("upgraded-vae", "VAE of the upgraded model", 50, steps=6000, batch=12, learning_rate=1.5e-3),
        Stage("base-vae", "VAE of the base", 40, steps=6000, batch=12, learning_rate=1.5e-3),
        Stage("upgraded-text", "both text encoders of the upgraded model", 10, steps=2500, batch=64),
        Stage("base-text", "text encoder of the base", 8, steps=2500, batch=64),
        Stage("upgraded-latents", "pictures of the upgraded world, encoded", 30, ("upgraded-vae",), 24576),
        Stage("base-latents", "pictures of the base world, encoded", 10, ("base-vae",), 24576),
        Stage("upgraded", "upgraded model", 160, ("upgraded-latents", "upgraded-text"), 40000, 16, 6e-4),
        Stage("base", "base", 110, ("base-latents", "base-text"), 40000, 16, 6e-4),
        Stage("adapter", "mapping layers, by train", 50, ("base", "upgraded"), 2500, 16, 1e-3),
        Stage("edges", "ControlNet of the base for edges", 40, ("base",), 8000, 16, 1e-3),
        Stage("depth", "ControlNet of the base for depth", 30, ("base",), 6000, 16, 1e-3),
        Stage("judge", "classifier of a caption's facts", 25, steps=4000),
        Stage("sketch", "T2I-Adapter of the base for edges", 14, ("base",), 4000, 16, 1e-3),
        Stage("palette", "LoRA of the base: a palette", 9, ("base",), 1200, 16, 2e-3),
        Stage("lines", "LoCon of the base: line drawings", 9, ("base",), 1200, 16, 2e-3),
        Stage("pattern", "LoHa of the base: dotted objects", 9, ("base",), 1200, 16, 2e-3),
        Stage("word", "textual inversion of the base: a flower", 6, ("base",), 1000, 16, 5e-3),
        Stage(
            "upgraded-edges", "ControlNet of the upgraded model for edges", 40, ("upgraded", "edges"), 6000, 16, 1e-3
        ),
        Stage("upgraded-palette", "LoRA of the upgraded model: the palette", 14, ("upgraded",), 1200, 16, 2e-3),
        Stage(
            "files",
            "all of them as fp16 files",
            1,
            (
                *("base", "upgraded", "edges", "depth", "sketch", "palette", "lines", "pattern", "word"),
                *("upgraded-edges", "upgraded-palette", "adapter", "judge"),
            ),
        ),
        Stage("grids", "pictures of captions, and how many of their facts are found", 5, ("files",), steps=64),
    )
}
