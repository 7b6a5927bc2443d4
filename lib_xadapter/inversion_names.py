"""Names of textual inversions in prompts."""

from __future__ import annotations

import re
from collections.abc import Iterable


def mentions(texts: Iterable[str], name: str) -> bool:
    """Whether one of the texts has the name as a word of its own."""
    pattern = re.compile(rf"(?<!\w){re.escape(name)}(?!\w)", flags=re.IGNORECASE)
    return any(pattern.search(text) for text in texts)


def without_names(prompt: str, names: Iterable[str]) -> str:
    """The prompt less the names, and the commas that led to them."""
    for name in sorted(names, key=len, reverse=True):
        prompt = re.sub(rf"(?:,\s*)?(?<!\w){re.escape(name)}(?!\w)", "", prompt, flags=re.IGNORECASE)
    return prompt
