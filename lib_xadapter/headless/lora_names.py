"""LoRAs as they are named on the command line and in prompts; read before anything heavy is imported."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import WrongArgument


@dataclass(frozen=True)
class Lora:
    """A file and how strongly it is merged."""

    path: Path
    weight: float = 1.0


def read_lora(text: str) -> tuple[str, float]:
    """Name and weight of `name:0.8`; 1 where no weight follows.

    Raises:
        WrongArgument: what follows is no number.
    """
    name, colon, weight = text.rpartition(":")
    # the colon of C:\\style.safetensors is none of ours
    if not colon or re.match(r"[\\/]", weight):
        return text, 1.0
    try:
        return name, float(weight)
    except ValueError:
        raise WrongArgument(f"--lora: '{text}' is no FILE or FILE:WEIGHT, as '{weight}' is no number.") from None


@dataclass(frozen=True)
class LoraTags:
    """A prompt without its `<lora:name:weight>` tags, and what they named."""

    prompt: str
    loras: tuple[tuple[str, float], ...] = field(default=())


TAG = re.compile(r"<(?:lora|lyco):([^:>]+)(?::([^:>]+))?[^>]*>")


def take_tags(prompt: str) -> LoraTags:
    """Raises: WrongArgument: the weight of a tag is no number."""
    loras = []
    for found in TAG.finditer(prompt):
        try:
            loras.append((found[1], float(found[2] or 1)))
        except ValueError:
            raise WrongArgument(f"prompt: '{found[0]}' has the weight '{found[2]}', expected a number.") from None
    return LoraTags(re.sub(r"  +", " ", TAG.sub("", prompt)).strip(), tuple(loras))
