"""How many facts of their captions the pictures of an evaluation of the miniature world show, by the classifier.

    python -m benchmarks.miniature_facts RUN/figures.json

A row for each way, with 95 % intervals, and the differences between ways on the same captions.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
from PIL import Image

from lib_xadapter.evaluation.intervals import Compared, MeanOverCaptions, compare
from lib_xadapter.miniature.captions import Facts, parse
from lib_xadapter.miniature.finished import MiniatureModels
from lib_xadapter.miniature.judge import Judge, find_facts, load_judge
from lib_xadapter.miniature.worlds import tensor_of

AT_ONCE = 64


def shares(judge: Judge, pictures: Sequence[Path], facts: Sequence[Facts]) -> list[float]:
    """Of each picture, the share of the facts that it shows."""
    found = []
    for first in range(0, len(pictures), AT_ONCE):
        opened = [numpy.asarray(Image.open(path).convert("RGB")) for path in pictures[first : first + AT_ONCE]]
        found += find_facts(judge, tensor_of(opened), list(facts[first : first + AT_ONCE]))
    return [one.found / one.total for one in found]


def measured(path: Path) -> Compared:
    """Of an evaluation's figures.json, all ways that have a picture of each caption."""
    figures: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    rows, judge = figures["pictures"], load_judge(MiniatureModels().judge)
    facts = [parse(row["caption"]) for row in rows]
    ways = {way: [path.parent / row["pictures"][way] for row in rows] for way in figures["ways"]}
    values = {way: numpy.array(shares(judge, pictures, facts)) for way, pictures in ways.items()}
    return compare({way: MeanOverCaptions(of_way) for way, of_way in values.items()}, len(rows))


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", type=Path, metavar="FIGURES.JSON", help="of `evaluate` on the miniature captions")
    compared = measured(parser.parse_args(given).figures)
    for way, one in compared.estimates.items():
        print(f"{way:30} {one.value:.3f} ({one.low:.3f} to {one.high:.3f})")
    for one in compared.differences:
        of = one.estimate
        print(f"{f'{one.one} less {one.other}':40} {of.value:+.3f} ({of.low:+.3f} to {of.high:+.3f})")


if __name__ == "__main__":
    main()
