"""What was measured, as a table in text and as JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .. import __version__
from .intervals import Estimate
from .measuring import HIGHER, Figure, Measured

NONE = "–"


@dataclass(frozen=True)
class Row:
    """The pictures of a caption and a seed, side by side.

    Attributes:
        caption, seed: what they were made of.
        pictures: name of a way, or of what was given → path from the report's folder.
        values: figure → way → value.
    """

    caption: str
    seed: int
    pictures: Mapping[str, str]
    values: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Report:
    """Everything about an evaluation.

    Attributes:
        ways: their names, in the order of the table.
        captions, seeds: the sample: captions, and pictures of each.
        measured: the figures.
        made_with: what the pictures were made with.
        left_out: caption → why it is not in the sample.
        skipped: reason → captions that could not be used.
        pictures: all of the sample.
    """

    ways: tuple[str, ...]
    captions: int
    seeds: int
    measured: Measured
    made_with: Mapping[str, Any]
    left_out: Mapping[str, str]
    skipped: Mapping[str, Sequence[str]]
    pictures: tuple[Row, ...]

    @property
    def sample(self) -> str:
        return (
            f"{_counted(self.captions, 'caption')} with {_counted(self.seeds, 'seed')} each, "
            "95 % intervals by bootstrap over captions"
        )

    @property
    def remarks(self) -> tuple[str, ...]:
        """What is not in the table, each with its reason."""
        return (
            *self.measured.notes,
            *(f"Not computed: {name}: {reason}" for name, reason in self.measured.not_computed.items()),
            *(f"Left out: {name}: {reason}" for name, reason in self.left_out.items()),
            *(f"Skipped: {len(names)} with {reason}: {', '.join(names[:5])}{'' if len(names) <= 5 else ', …'}"
              for reason, names in self.skipped.items()),
        )  # fmt: skip

    def text(self) -> str:
        """The tables."""
        blocks = [self.sample]
        if self.measured.figures:
            blocks += [_aligned(self.rows()), "Differences on the same captions:", _aligned(self.difference_rows())]
        return "\n\n".join([*blocks, *(["\n".join(self.remarks)] if self.remarks else [])]) + "\n"

    def rows(self) -> list[list[str]]:
        """A heading, and a row for each way."""
        figures = self.measured.figures
        return [
            ["", *map(heading, figures)],
            *([way, *(shown(figure.compared.estimates.get(way)) for figure in figures)] for way in self.ways),
        ]

    def difference_rows(self) -> list[list[str]]:
        """A heading, and a row for each pair of ways."""
        figures = self.measured.figures
        found = [{(one.one, one.other): one.estimate for one in figure.compared.differences} for figure in figures]
        pairs = list(dict.fromkeys(pair for differences in found for pair in differences))
        return [
            ["", *(figure.name for figure in figures)],
            *(
                [" less ".join(pair), *(shown(differences.get(pair), signed=True) for differences in found)]
                for pair in pairs
            ),
        ]

    def as_json(self) -> dict[str, Any]:
        """Everything there is."""
        return {
            "lib_xadapter": __version__,
            "sample": {"captions": self.captions, "seeds": self.seeds},
            "made_with": self.made_with,
            "ways": list(self.ways),
            "figures": [_figure_as_json(figure) for figure in self.measured.figures],
            "notes": list(self.measured.notes),
            "not_computed": dict(self.measured.not_computed),
            "left_out": dict(self.left_out),
            "skipped": {reason: list(names) for reason, names in self.skipped.items()},
            "pictures": [dataclasses.asdict(row) for row in self.pictures],
        }


def _counted(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def heading(figure: Figure) -> str:
    return f"{figure.name} {'↑' if figure.better == HIGHER else '↓'}"


def shown(estimate: Estimate | None, signed: bool = False) -> str:
    """A value with its interval; a difference whose interval leaves out 0 has a star."""
    if estimate is None:
        return NONE
    sign = "+" if signed else ""
    digits = 2 if abs(estimate.value) >= 10 else 4
    value = f"{estimate.value:{sign}.{digits}f}"
    if math.isnan(estimate.low):
        return value
    star = " *" if signed and estimate.leaves_out_zero else ""
    return f"{value} [{estimate.low:{sign}.{digits}f}, {estimate.high:{sign}.{digits}f}]{star}"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _figure_as_json(figure: Figure) -> dict[str, Any]:
    compared = figure.compared
    return {
        "name": figure.name,
        "better": figure.better,
        "description": figure.description,
        "resamples": compared.resamples,
        "ways": {way: _estimate_as_json(estimate) for way, estimate in compared.estimates.items()},
        "differences": [
            {"one": one.one, "other": one.other, **_estimate_as_json(one.estimate)} for one in compared.differences
        ],
    }


def _estimate_as_json(estimate: Estimate) -> dict[str, Any]:
    ends = None if math.isnan(estimate.low) else [estimate.low, estimate.high]
    return {"value": estimate.value, "interval": ends}
