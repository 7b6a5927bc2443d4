"""Textual inversions: vectors that stand for words of a prompt, found by their name as the WebUI finds them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from transformers import CLIPTokenizer

from ..errors import DoesNotFit, WrongFile
from ..inversion_names import files_below, mentions
from ..lora_layers import BUNDLED_EMBEDDING
from ..mapping import read_weights
from ..pickled_weights import read_pickle
from .model_files import check_finite

MOST_VECTORS = 75
"""That fit into a window of the text encoder."""


@dataclass(frozen=True)
class Inversion:
    """A textual inversion.

    Attributes:
        name: what it is called in prompts.
        vectors: (number, width) for each text encoder of its model.
    """

    name: str
    vectors: tuple[Tensor, ...]

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(vectors.shape[1] for vectors in self.vectors)

    @property
    def number(self) -> int:
        return len(self.vectors[0])


class Inversions:
    """Textual inversions by name; a file is read when a prompt first has its name.

    Args:
        files: by name.
        read: those that came another way, such as those that LoRA files bring along.
    """

    def __init__(self, files: Mapping[str, Path] | None = None, read: Iterable[Inversion] = ()) -> None:
        self._files = dict(files or {})
        # a file of one's own goes before what a LoRA brings
        self._read = {inversion.name: inversion for inversion in read if inversion.name not in self._files}

    @classmethod
    def below(cls, *folders: Path) -> Inversions:
        """Those in folders and their subfolders, each named as its file."""
        return cls(files_below(*folders))

    @property
    def names(self) -> list[str]:
        return [*self._files, *(name for name in self._read if name not in self._files)]

    def with_those_of(self, loras: Iterable[Path]) -> Inversions:
        """These, and what LoRA files bring along."""
        bundled = [inversion for path in loras for inversion in bundled_inversions(path)]
        return Inversions(self._files, [*self._read.values(), *bundled])

    def named(self, name: str) -> Inversion:
        """Raises: WrongFile: its file holds none."""
        if name not in self._read:
            self._read[name] = read_inversion(self._files[name])
        return self._read[name]

    def of_widths(self, widths: Sequence[int], texts: Iterable[str]) -> list[str]:
        """Names in the texts whose vectors are as wide as these text encoders."""
        given = list(texts)
        return [name for name in self.names if mentions(given, name) and self.named(name).widths == tuple(widths)]


@dataclass(frozen=True)
class Match:
    """A textual inversion in a prompt, and how many of the prompt's tokens are its name."""

    inversion: Inversion
    tokens: int


class Lookup:
    """Finds textual inversions among a prompt's tokens: the longest name that stands there and fits the text encoders.

    Args:
        inversions: those that there are.
        tokenizer: of the prompt.
        widths: of the model's text encoders.
    """

    def __init__(self, inversions: Inversions, tokenizer: CLIPTokenizer, widths: Sequence[int]) -> None:
        self._inversions = inversions
        self._widths = tuple(widths)
        self._names: dict[int, list[tuple[list[int], str]]] = {}
        for name in inversions.names:
            numbers = tokenizer(name, add_special_tokens=False, verbose=False)["input_ids"]
            if numbers:
                self._names.setdefault(numbers[0], []).append((numbers, name))
        for named in self._names.values():
            named.sort(key=lambda entry: -len(entry[0]))

    def at(self, numbers: Sequence[int], place: int) -> Match | None:
        """What begins at a place among token numbers.

        Raises:
            DoesNotFit: it has more vectors than a window of the text encoder takes.
        """
        for name_numbers, name in self._names.get(numbers[place], ()):
            if list(numbers[place : place + len(name_numbers)]) != name_numbers:
                continue
            inversion = self._inversions.named(name)
            if inversion.widths != self._widths:
                continue
            if inversion.number > MOST_VECTORS:
                raise DoesNotFit(
                    f"The textual inversion '{name}' has {inversion.number} vectors, expected up to {MOST_VECTORS}."
                )
            return Match(inversion, len(name_numbers))
        return None


# --- files ------------------------------------------------------------------------------------------------------------


def read_inversion(path: Path) -> Inversion:
    """A textual inversion of the WebUI's trainer, of kohya's or diffusers', for one text encoder or SDXL's two.

    Raises:
        WrongFile: it is none.
    """
    data = read_weights(path) if path.suffix.lower() == ".safetensors" else read_pickle(path)
    inversion = _from_data(path.stem, data) if isinstance(data, Mapping) else None
    if inversion is None:
        raise WrongFile(f"{path.name} is no textual inversion: it holds neither one term nor clip_l and clip_g.")
    check_finite({"its vectors": torch.cat([vectors.flatten() for vectors in inversion.vectors])}, path.name)
    return inversion


def bundled_inversions(path: Path) -> list[Inversion]:
    """Those that a LoRA file brings along, under `bundle_emb.NAME.…`."""
    if path.suffix.lower() != ".safetensors":
        return []
    found: dict[str, dict[str, Any]] = {}
    with safetensors.safe_open(path, "pt") as file:
        for key in file.keys():
            if BUNDLED_EMBEDDING.fullmatch(key):
                _, name, vector = key.split(".", 2)
                data = found.setdefault(name, {})
                if vector.startswith("string_to_param."):
                    data["string_to_param"] = {vector.partition(".")[2]: file.get_tensor(key)}
                else:
                    data[vector] = file.get_tensor(key)
    inversions = {name: _from_data(name, data) for name, data in found.items()}
    if wrong := next((name for name, inversion in inversions.items() if inversion is None), None):
        raise WrongFile(f"{path.name} brings '{wrong}' along, which is no textual inversion.")
    return [inversion for inversion in inversions.values() if inversion is not None]


def _from_data(name: str, data: Mapping[str, Any]) -> Inversion | None:
    if "string_to_param" in data:
        terms = data["string_to_param"]
    elif {"clip_l", "clip_g"} <= data.keys():
        return Inversion(name, (_rows(data["clip_l"]), _rows(data["clip_g"])))
    else:
        terms = data
    if (
        not isinstance(terms, Mapping)
        or len(terms) != 1
        or not isinstance(vectors := next(iter(terms.values())), Tensor)
    ):
        return None
    return Inversion(name, (_rows(vectors),))


def _rows(vectors: Tensor) -> Tensor:
    return vectors.detach().float().reshape(-1, vectors.shape[-1])
