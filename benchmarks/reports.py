"""What a benchmark found: a table for the reader, JSON for the machine, a plot beside it."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from .timing import PROCESSOR, WALL, Spread, Turns

RESULTS = Path(__file__).parent / "results"
CALLS_ON_A_GPU = 20
"""So many that what starts and ends the queue does not count."""
ROW_HEIGHT, WIDTH = 0.32, 8
"""Of the plot, in inches."""


@dataclass(frozen=True)
class Machine:
    """What something was measured on."""

    cpu: str
    cores: int
    gpu: str
    system: str
    python: str
    torch: str
    threads: int
    load_before: float
    """Processes that wanted to run, on average over the last minute, before the benchmark began."""

    @classmethod
    def here(cls, device: torch.device) -> Machine:
        return cls(
            cpu=_cpu_name(),
            cores=os.cpu_count() or 0,
            gpu=torch.cuda.get_device_name(device) if device.type == "cuda" else "none used",
            system=platform.system(),
            python=platform.python_version(),
            torch=torch.__version__,
            threads=torch.get_num_threads(),
            load_before=_load(),
        )


def _cpu_name() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _load() -> float:
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else 0.0


@dataclass(frozen=True)
class Bar:
    """One bar of the plot."""

    label: str
    length: Spread


@dataclass(frozen=True)
class Plot:
    """Bars in groups, one below the other.

    Attributes:
        unit: what their length is.
        groups: the bars of each group, by its title.
        mark: where a line is drawn across a group's bars.
    """

    unit: str
    groups: Mapping[str, Sequence[Bar]]
    mark: Mapping[str, float] = field(default_factory=dict)

    def write(self, path: Path, title: str) -> None:
        """Draw it; nothing where matplotlib is not installed."""
        try:
            import matplotlib
        except ImportError:
            print("no plot: matplotlib is not installed")
            return
        matplotlib.use("Agg")
        from matplotlib import pyplot

        height = sum(1.6 + ROW_HEIGHT * len(bars) for bars in self.groups.values())
        figure, all_axes = pyplot.subplots(
            len(self.groups),
            figsize=(WIDTH, 0.4 + height),
            squeeze=False,
            height_ratios=[3 + len(bars) for bars in self.groups.values()],
            layout="constrained",
        )
        for axes, (group, bars) in zip(all_axes[:, 0], self.groups.items(), strict=True):
            self._draw(axes, group, bars)
        figure.suptitle(title, fontsize=10)
        figure.savefig(path, dpi=80)
        pyplot.close(figure)

    def _draw(self, axes: Any, group: str, bars: Sequence[Bar]) -> None:
        lengths = [bar.length for bar in bars]
        whiskers = [[x.median - x.lower for x in lengths], [x.upper - x.median for x in lengths]]
        drawn = axes.barh([bar.label for bar in bars], [x.median for x in lengths], xerr=whiskers, color="tab:blue")
        axes.bar_label(drawn, fmt="%.3g", padding=4, fontsize=8)
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_title(group, fontsize=9)
        axes.set_xlabel(self.unit, fontsize=8)
        axes.tick_params(labelsize=8)
        if group in self.mark:
            axes.axvline(self.mark[group], color="tab:red", linewidth=1)


@dataclass(frozen=True)
class Report:
    """A benchmark's findings.

    Attributes:
        name: of its files.
        question: what was measured, in a line.
        machine: where.
        options: what the benchmark was asked for.
        rows: of the table, each with the same columns.
        result: the figures that the benchmark is about.
        plot: the rows to look at.
        not_run: what could not be run, and why.
    """

    name: str
    question: str
    machine: Machine
    options: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    result: Mapping[str, Any]
    plot: Plot
    not_run: Mapping[str, str] = field(default_factory=dict)

    def publish(self, folder: Path) -> None:
        """Print the table; write JSON and plot into the folder."""
        print(self.text())
        self.write(folder)
        self.plot.write(folder / f"{self.name}.png", self.question)

    def write(self, folder: Path) -> None:
        """Write the JSON, as after each case: what has been measured stays, should a later case fail."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{self.name}.json").write_text(json.dumps(self.content(), indent=1) + "\n", encoding="utf-8")

    def content(self) -> dict[str, Any]:
        """Everything that goes into the JSON."""
        return {
            "question": self.question,
            "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
            "machine": {**asdict(self.machine), "load_after": _load()},
            "options": {name: _written(value) for name, value in self.options.items() if name != "out"},
            "result": _plain(self.result),
            "rows": _plain(self.rows),
            "not_run": dict(self.not_run),
        }

    def text(self) -> str:
        """The table with what is around it."""
        titles = list(self.rows[0])
        cells = [titles, *([_cell(row[title]) for title in titles] for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in cells]
        machine = self.machine
        return "\n".join(
            [
                self.question,
                f"{machine.cores} cores of {machine.cpu}; GPU: {machine.gpu}; torch {machine.torch}, "
                f"{machine.threads} threads; load {machine.load_before:g} before, {_load():g} after",
                "",
                *("  ".join(row).rstrip() for row in padded),
                "",
                *(f"{name}: {_cell(value)}" for name, value in self.result.items()),
                *(f"not run: {name}: {reason}" for name, reason in self.not_run.items()),
            ]
        )


def _cell(value: Any) -> str:
    if isinstance(value, Spread):
        return f"{value.median:.4g} ({value.lower:.4g} to {value.upper:.4g})"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _written(value: Any) -> str:
    """An option, without the folders of the machine that it was run on."""
    return value.name if isinstance(value, Path) else str(value)


def _plain(value: Any) -> Any:
    """Six digits are more than any of this is measured to."""
    if isinstance(value, Spread):
        return _plain(asdict(value))
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def parser_for(description: str, rounds: int) -> argparse.ArgumentParser:
    """A command line with what all benchmarks have in common."""
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    best = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=torch.device, default=torch.device(best), help="default here: %(default)s")
    parser.add_argument("--rounds", type=int, default=rounds, help="that count (default: %(default)s)")
    parser.add_argument("--warm-up", type=int, default=1, help="rounds before those (default: %(default)s)")
    parser.add_argument("--calls", type=int, help="between two looks at the clock (default: 20, on the CPU 1)")
    parser.add_argument(
        "--clock",
        choices=(WALL, PROCESSOR),
        default=WALL,
        help="without a GPU: the time that passes, or the processor's own where others share it (default: %(default)s)",
    )
    parser.add_argument("--small", action="store_true", help="a quick look at small models")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="default: benchmarks/results")
    return parser


def turns_of(options: argparse.Namespace) -> Turns:
    """How the command line asks works to be timed."""
    calls = options.calls or (CALLS_ON_A_GPU if options.device.type == "cuda" else 1)
    return Turns(options.device, options.rounds, options.warm_up, options.clock, calls)


def name_for(benchmark: str, options: argparse.Namespace, *more: str) -> str:
    """The name of a benchmark's files: what was measured, and on what."""
    return "-".join([benchmark, *more, *(["small"] if options.small else []), options.device.type])
