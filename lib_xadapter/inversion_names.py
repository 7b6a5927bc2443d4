"""Textual inversions by name: their files, and their names in prompts."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

SUFFIXES = (".pt", ".bin", ".safetensors")


def files_below(*folders: Path) -> dict[str, Path]:
    """Textual inversions in folders and their subfolders, each named as its file."""
    paths = (path for folder in folders for path in sorted(folder.rglob("*")))
    return {path.stem: path for path in paths if path.suffix.lower() in SUFFIXES and path.is_file()}


def mentions(texts: Iterable[str], name: str) -> bool:
    """Whether one of the texts has the name as a word of its own."""
    pattern = re.compile(rf"(?<!\w){re.escape(name)}(?!\w)", flags=re.IGNORECASE)
    return any(pattern.search(text) for text in texts)


def without_names(prompt: str, names: Iterable[str]) -> str:
    """The prompt less the names, and the commas that led to them."""
    for name in sorted(names, key=len, reverse=True):
        prompt = re.sub(rf"(?:,\s*)?(?<!\w){re.escape(name)}(?!\w)", "", prompt, flags=re.IGNORECASE)
    return prompt
