"""LoRAs as they are named on the command line and in prompts; read before anything heavy is imported."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from ..errors import WrongArgument

T = TypeVar("T")


MODELS = {"base": ("base",), "sdxl": ("upgraded",), "both": ("base", "upgraded")}
"""What `model=` of a tag says → the models that the LoRA goes to."""


@dataclass(frozen=True)
class Lora:
    """A file, how strongly it is merged, and into which models.

    Attributes:
        path: the file, or its name as the user gave it.
        weight: of its part for the text encoder, and for the UNet where that has none of its own.
        unet_weight: of its part for the UNet.
        rank: how much of its rank is used, None for all of it.
        models: "base", "upgraded", or both; () for the one that the file was made for.
    """

    path: Path
    weight: float = 1.0
    unet_weight: float | None = None
    rank: int | None = None
    models: tuple[str, ...] = ()

    @property
    def said(self) -> str:
        """What stands behind its name in a tag."""
        unet = "" if self.unet_weight is None else f":{self.unet_weight:g}"
        rank = "" if self.rank is None else f":dyn={self.rank}"
        model = next((f":model={name}" for name, models in MODELS.items() if models == self.models), "")
        return f"{self.weight:g}{unet}{rank}{model}"


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
    loras: tuple[Lora, ...] = field(default=())


TAG = re.compile(r"<(?:lora|lyco):([^>]+)>")


def take_tags(prompt: str, option: str = "prompt") -> LoraTags:
    """As the WebUI reads them: `<lora:name:weight>`, `<lora:name:text encoder:UNet:rank>`, `te=`, `unet=`, `dyn=`.

    Raises:
        WrongArgument: a tag says what is not known, or no number where one is expected.
    """
    loras = tuple(_read_tag(found, option) for found in TAG.finditer(prompt))
    return LoraTags(re.sub(r"  +", " ", TAG.sub("", prompt)).strip(), loras)


def _read_tag(found: re.Match[str], option: str) -> Lora:
    name, *words = found[1].split(":")
    placed = [word for word in words if "=" not in word]
    said = dict(zip(("te", "unet", "dyn"), placed, strict=False)) | dict(
        word.split("=", 1) for word in words if "=" in word
    )
    if unknown := sorted(said.keys() - {"te", "unet", "dyn", "model"}):
        raise WrongArgument(f"{option}: '{found[0]}' says '{unknown[0]}', expected te, unet, dyn or model.")

    def number(key: str, kind: Callable[[str], T]) -> T | None:
        try:
            return kind(said[key]) if key in said else None
        except ValueError:
            raise WrongArgument(
                f"{option}: '{found[0]}' has the weight '{said[key]}', expected a {EXPECTED[kind]}."
            ) from None

    model = said.get("model")
    if model is not None and model not in MODELS:
        raise WrongArgument(f"{option}: '{found[0]}' says 'model={model}', expected {', '.join(MODELS)}.")
    weight = number("te", float)
    models = MODELS[model] if model is not None else ()
    return Lora(Path(name), 1.0 if weight is None else weight, number("unet", float), number("dyn", int), models)


EXPECTED = {float: "number", int: "whole number"}
