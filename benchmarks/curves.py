"""Two figures of `evaluate` against each other: what is kept of a condition against the distance to SDXL's world.

    python -m benchmarks.curves [NAME=]FIGURES… --across NAME --up NAME --out PICTURE [--without WAY …]

Each FIGURES is a figures.json. Ways whose names end in another switch point or weight are the points of one curve. NAME
tells the curves of a file from those of the files before it, where they are others.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

NUMBER_AT_THE_END = re.compile(r"(.+), (switch point|weight) ([\d.]+)")


@dataclass(frozen=True)
class Point:
    """A way of making pictures: its switch point or weight, and both of its figures."""

    number: str
    across: float
    up: float


Curves = dict[str, list[Point]]


def curves_of(figures: Mapping[str, Any], across: str, up: str, without: Sequence[str] = ()) -> Curves:
    """Name of a curve → its points.

    Args:
        figures: the content of a figures.json.
        across, up: names of figures.
        without: ways that are left out.
    """
    found: Curves = {}
    values = {figure["name"]: figure["ways"] for figure in figures["figures"]}
    for way in figures["ways"]:
        if way in without or way not in values[across] or way not in values[up]:
            continue
        numbered = NUMBER_AT_THE_END.fullmatch(way)
        curve, number = (f"{numbered[1]}, by {numbered[2]}", numbered[3]) if numbered else (way, "")
        found.setdefault(curve, []).append(Point(number, values[across][way]["value"], values[up][way]["value"]))
    return found


def together(named: Sequence[tuple[str, Curves]]) -> Curves:
    """The curves of several named files; one that a file before has, too, is there once."""
    found: Curves = {}
    for file, curves in named:
        for curve, points in curves.items():
            if not set(points) <= set(found.get(curve, ())):
                found[f"{curve}, {file}" if curve in found else curve] = points
    return found


def drawn(curves: Mapping[str, Sequence[Point]], across: str, up: str) -> Figure:
    """A line with its points for each curve."""
    picture = Figure(figsize=(8, 4.5), layout="constrained")
    axes = picture.subplots()
    for name, points in curves.items():
        axes.plot([point.across for point in points], [point.up for point in points], marker="o", label=name)
        for point in points:
            axes.annotate(point.number, (point.across, point.up), (5, 5), textcoords="offset points", fontsize=8)
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.legend(fontsize=8)
    return picture


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", nargs="+", metavar="[NAME=]FIGURES")
    parser.add_argument("--across", required=True, metavar="NAME")
    parser.add_argument("--up", required=True, metavar="NAME")
    parser.add_argument("--without", nargs="*", default=[], metavar="WAY", help="ways that are left out")
    parser.add_argument("--out", type=Path, required=True, metavar="PICTURE")
    options = parser.parse_args(arguments)
    named = []
    for given in options.figures:
        name, _, path = given.rpartition("=")
        figures = json.loads(Path(path).read_text(encoding="utf-8"))
        named.append((name, curves_of(figures, options.across, options.up, options.without)))
    drawn(together(named), options.across, options.up).savefig(options.out, dpi=110)


if __name__ == "__main__":
    main()
