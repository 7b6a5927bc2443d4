"""Model files by the names that people give them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

MODEL_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")

Found = TypeVar("Found")


def find_named(name: str, candidates: Mapping[Found, Iterable[str]]) -> Found | None:
    """The candidate of a name, None where nothing is called so; of several the first.

    A name matches letter for letter, or else without case, extension and hash, or else without folders, too.

    Args:
        name: as the user gave it, such as `styles/Ink`, `ink.safetensors` or `ink [0123456789]`.
        candidates: each with the names that it is known by.
    """
    for spelled in (str, _bare, _without_folders):
        for found, names in candidates.items():
            if spelled(name) in map(spelled, names):
                return found
    return None


def _bare(name: str) -> str:
    without_hash = re.sub(r"\s*\[[^\]]+\]\s*$", "", name.strip())
    suffixes = "|".join(map(re.escape, MODEL_SUFFIXES))
    return re.sub(rf"({suffixes})$", "", without_hash, flags=re.IGNORECASE).replace("\\", "/").lower()


def _without_folders(name: str) -> str:
    return _bare(name).rsplit("/", 1)[-1]
