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
        makes: what it makes, in words.
        needs: names of the stages that it builds on.
        minutes: of one core; steps that do not fit are left out, but for latents and mapping layers, which take theirs.
        steps: of learning; for banks of latents, pictures.
        batch: rows a step.
        learning_rate: at its highest.
    """

    name: str
    makes: str
    minutes: float
    needs: tuple[str, ...] = ()
    steps: int = 0
    batch: int = 32
    learning_rate: float = 1e-3


STAGES: Mapping[str, Stage] = {
    stage.name: stage
    for stage in (
        # what waits longest comes first, as the two cores take the first stage that can begin
        Stage("upgraded-vae", "VAE of the upgraded model", 28, steps=6000, batch=12, learning_rate=3e-3),
        Stage("base-vae", "VAE of the base", 24, steps=6000, batch=12, learning_rate=3e-3),
        Stage("upgraded-text", "both text encoders of the upgraded model", 12, steps=2000, batch=64),
        Stage("base-text", "text encoder of the base", 10, steps=2600, batch=64),
        Stage("upgraded-latents", "pictures of the upgraded world, encoded", 15, ("upgraded-vae",), 16384),
        Stage("base-latents", "pictures of the base world, encoded", 6, ("base-vae",), 16384),
        Stage("upgraded", "upgraded model", 140, ("upgraded-latents", "upgraded-text"), 10400, 16, 4e-3),
        Stage("base", "base", 90, ("base-latents", "base-text"), 12000, 16, 4e-3),
        Stage("adapter", "mapping layers, by train", 40, ("base", "upgraded"), 1800, 16, 1e-3),
        Stage("edges", "ControlNet of the base for edges", 40, ("base",), 3000, 16, 2e-3),
        Stage("depth", "ControlNet of the base for depth", 22, ("base",), 1000, 16, 2e-3),
        Stage("judge", "classifier of a caption's facts", 16, steps=2500),
        Stage("clip", "CLIP, to measure by", 20, steps=1000, batch=64),
        Stage("depth-estimator", "depth estimator, to measure by", 12, steps=700),
        Stage("sketch", "T2I-Adapter of the base for edges", 10, ("base",), 600, 16, 2e-3),
        Stage("palette", "LoRA of the base: a palette", 7, ("base",), 600, 16, 2e-3),
        Stage("lines", "LoCon of the base: line drawings", 7, ("base",), 600, 16, 2e-3),
        Stage("pattern", "LoHa of the base: dotted objects", 7, ("base",), 600, 16, 2e-3),
        Stage("word", "textual inversion of the base: a flower", 5, ("base",), 600, 16, 5e-3),
        Stage(
            "upgraded-edges", "ControlNet of the upgraded model for edges", 36, ("upgraded", "edges"), 1600, 16, 2e-3
        ),
        Stage("upgraded-palette", "LoRA of the upgraded model: the palette", 10, ("upgraded",), 600, 16, 2e-3),
        Stage(
            "files",
            "all of them as fp16 files",
            1,
            (
                *("base", "upgraded", "edges", "depth", "sketch", "palette", "lines", "pattern", "word"),
                *("upgraded-edges", "upgraded-palette", "adapter", "judge", "clip", "depth-estimator"),
            ),
        ),
        Stage("grids", "pictures of captions, and how many of their facts are found", 5, ("files",), steps=64),
    )
}
