"""CLIP's vocabulary, which single files do not carry: from a folder of the user's or from an installed package."""

from __future__ import annotations

import gzip
import importlib.util
import json
from pathlib import Path

from transformers import CLIPTokenizer

from ..errors import WrongFile

START, END = "<|startoftext|>", "<|endoftext|>"
VOCABULARY_SIZE = 49408
SHIPPED_TABLES = (("clip", "bpe_simple_vocab_16e6.txt.gz"), ("open_clip", "bpe_simple_vocab_16e6.txt.gz"))
"""Packages that carry CLIP's table of merges (OpenAI CLIP, `simple_tokenizer.py`)."""
OPEN_CLIP_PADDING = "!"
"""SD2's text encoder and SDXL's second fill up with token 0."""


def load_tokenizer(folder: Path | None = None, pad_token: str = END) -> CLIPTokenizer:
    """CLIP's tokenizer.

    Args:
        folder: holds vocab.json and merges.txt; None looks into the installed packages.
        pad_token: what short prompts are filled up with.

    Raises:
        WrongFile: there is no vocabulary.
    """
    vocabulary, merges = _read_folder(folder) if folder else read_shipped_table()
    return CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=pad_token, model_max_length=77)


def byte_letters() -> list[str]:
    """The letter that stands for each byte in CLIP's and GPT-2's vocabularies, printable ones first."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = 256 - len(printable)
    return [*map(chr, printable), *(chr(256 + place) for place in range(others))]


def vocabulary_of(merges: list[tuple[str, str]]) -> dict[str, int]:
    """Token numbers: letters, letters that end a word, merges in their order, start and end of text."""
    letters = byte_letters()
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges), START, END]
    return {token: number for number, token in enumerate(tokens)}


def _read_folder(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    for name in ("vocab.json", "merges.txt"):
        if not (folder / name).is_file():
            raise WrongFile(f"The tokenizer folder {folder} misses {name}, expected vocab.json and merges.txt.")
    try:
        vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
        merges = [_pair(line) for line in lines if line and not line.startswith("#version")]
    except ValueError as error:
        raise WrongFile(f"The tokenizer folder {folder} holds no CLIP vocabulary: {error}.") from error
    return vocabulary, merges


def read_shipped_table() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's whole vocabulary and its merges, from an installed package.

    Raises:
        WrongFile: no package carries it.
    """
    for package, table in SHIPPED_TABLES:
        spec = importlib.util.find_spec(package)
        path = Path(spec.origin).parent / table if spec and spec.origin else None
        if path and path.is_file():
            lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")
            letters_and_ends = 2 * 256 + 2
            merges = [_pair(line) for line in lines[1 : 1 + VOCABULARY_SIZE - letters_and_ends]]
            return vocabulary_of(merges), merges
    raise WrongFile(
        "CLIP's vocabulary is missing: install openai-clip, which carries it, "
        "or name a folder with vocab.json and merges.txt by --tokenizer."
    )


def _pair(line: str) -> tuple[str, str]:
    first, second = line.split()
    return first, second
