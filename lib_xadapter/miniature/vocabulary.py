"""The part of CLIP's vocabulary that the miniature world speaks.

All its words are one token each. The merges that make them are taken from CLIP's own table in their order, so that a
text falls into the same tokens as by the whole table, and the text encoders need some hundred rows instead of 49408.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..headless.tokenizers import END, START, read_shipped_table, vocabulary_of
from ..saving import write_whole
from .captions import WORDS

LENGTH = 77
"""Tokens of every prompt, filled up."""
WORD_END = "</w>"


@functools.cache
def merges() -> tuple[tuple[str, str], ...]:
    """The merges that make the words of the grammar, in CLIP's order."""
    _, table = read_shipped_table()
    ranks = {pair: rank for rank, pair in enumerate(table)}
    used = {pair for word in WORDS for pair in _merged(word, ranks)}
    return tuple(sorted(used, key=ranks.__getitem__))


def _merged(word: str, ranks: Mapping[tuple[str, str], int]) -> list[tuple[str, str]]:
    """The merges that make a word of its letters."""
    parts, made = [*word[:-1], word[-1] + WORD_END], []
    while len(parts) > 1:
        pair = min(itertools.pairwise(parts), key=lambda two: ranks.get(two, len(ranks)))
        place = next(at for at in range(len(parts) - 1) if (parts[at], parts[at + 1]) == pair)
        parts[place : place + 2] = ["".join(pair)]
        made.append(pair)
    return made


@functools.cache
def numbers() -> Mapping[str, int]:
    """Token → its number among ours."""
    return vocabulary_of(list(merges()))


def clip_numbers() -> list[int]:
    """For each of our tokens, its number in CLIP's whole vocabulary."""
    whole, _ = read_shipped_table()
    return [whole[token] for token in numbers()]


def token_rows(caption: str, pad: str = END, replaced: Mapping[str, Sequence[int]] | None = None) -> list[int]:
    """The tokens of a text of the grammar's words.

    Args:
        caption: words with blanks between them.
        pad: what it is filled up with.
        replaced: words that stand for tokens of their own, such as those of a textual inversion.
    """
    ours, replaced = numbers(), replaced or {}
    tokens = [number for word in caption.split() for number in replaced.get(word, [ours.get(word + WORD_END, 0)])]
    filled = [ours[START], *tokens, ours[END]]
    return [*filled, *[ours[pad]] * (LENGTH - len(filled))]


def write_tokenizer(folder: Path) -> None:
    """vocab.json and merges.txt, as CLIPTokenizer reads them."""
    table = "".join(f"{first} {second}\n" for first, second in merges())
    vocabulary = json.dumps(numbers(), ensure_ascii=False)
    write_whole(folder / "vocab.json", lambda to: to.write_text(vocabulary, encoding="utf-8"))
    write_whole(folder / "merges.txt", lambda to: to.write_text(f"#version: 0.2\n{table}", encoding="utf-8"))
