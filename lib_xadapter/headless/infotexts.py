"""The text under a picture, in the form that the WebUI writes and pastes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from .. import __version__
from ..infotext import write_infotext
from ..settings import Settings
from .sampler_table import sampler_named

PNG_KEY = "parameters"
STRENGTH = "Denoising strength"


@dataclass(frozen=True)
class ControlUnit:
    """A ControlNet at work, as sd-webui-controlnet writes its units."""

    name: str
    scale: float
    module: str = "none"

    def written(self) -> str:
        fields = {
            "Module": self.module,
            "Model": self.name,
            "Weight": f"{self.scale:g}",
            "Resize Mode": "Just Resize",
            "Guidance Start": "0.0",
            "Guidance End": "1.0",
            "Control Mode": "Balanced",
        }
        return ", ".join(f"{key}: {value}" for key, value in fields.items())


@dataclass(frozen=True)
class PictureText:
    """What is written under a picture."""

    prompt: str
    negative_prompt: str
    steps: int
    sampler: str
    cfg_scale: float
    seed: int
    size: tuple[int, int]
    model: str
    settings: Settings
    loras: Sequence[tuple[str, float | str]] = ()
    controls: Sequence[ControlUnit] = ()
    strength: float | None = None
    clip_skip: int = 1

    def written(self) -> str:
        tags = "".join(f" <lora:{name}:{_plain(said)}>" for name, said in self.loras)
        negative = f"\nNegative prompt: {self.negative_prompt}" if self.negative_prompt else ""
        parameters = {
            "Steps": self.steps,
            "Sampler": self.sampler,
            "Schedule type": sampler_named(self.sampler).schedule_type,
            "CFG scale": f"{self.cfg_scale:g}",
            "Seed": self.seed,
            "Size": "x".join(map(str, self.size)),
            "Model": self.model,
            STRENGTH: "" if self.strength is None else f"{self.strength:g}",
            "Clip skip": "" if self.clip_skip == 1 else self.clip_skip,
            **{f"ControlNet {place}": unit.written() for place, unit in enumerate(self.controls)},
            **write_infotext(self.settings, __version__),
        }
        written = ", ".join(f"{key}: {_quoted(str(value))}" for key, value in parameters.items() if value != "")
        return f"{self.prompt}{tags}{negative}\n{written}"


def _plain(said: float | str) -> str:
    return said if isinstance(said, str) else f"{said:g}"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ",:\n") else text
