"""Pictures of an evaluation side by side: a row for each way, a column for each of its first captions.

python -m benchmarks.picture_rows RUN/figures.json --out rows.png [--captions 8]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from lib_xadapter.headless.grid import labelled_grid, save_picture


def rows_of(path: Path, captions: int) -> Image.Image:
    """Of an evaluation's figures.json."""
    figures: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    ways, pictures = figures["ways"], [row["pictures"] for row in figures["pictures"][:captions]]
    rows = [[Image.open(path.parent / of_caption[way]).convert("RGB") for of_caption in pictures] for way in ways]
    return labelled_grid(rows, ways, [""] * len(pictures))


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", type=Path, metavar="FIGURES.JSON", help="of `evaluate`")
    parser.add_argument("--captions", type=int, default=8, metavar="N", help="the first N; default: %(default)s")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    options = parser.parse_args(given)
    print(save_picture(options.out, rows_of(options.figures, options.captions)))


if __name__ == "__main__":
    main()
