"""Everything that waits for an NVIDIA GPU, in portions of eight minutes at most, and what came of it: goal by goal.

    python -m benchmarks.gpu_acceptance                     all portions, one after the other
    python -m benchmarks.gpu_acceptance --portion mapping   one of them
    python -m benchmarks.gpu_acceptance --portion report    none: the report of what is in --out by now

A portion leaves its results in `--out` as it goes, and the report is made of what is there. On a machine that has torch
and nothing else, the tests and the mapping layers run with pytest, numpy, safetensors, psutil and Pillow.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

NOT_RUN = "not run"

LARGE_BATCH = "8 rows"


@dataclass(frozen=True)
class Portion:
    """Something that runs by itself.

    Attributes:
        commands: arguments of the Python interpreter, one process each; `{out}` is the folder of results.
        longest: seconds that all of them may take.
        needs: packages beside what every portion needs.
    """

    commands: tuple[tuple[str, ...], ...]
    longest: float
    needs: tuple[str, ...] = ()


PATHS = ("eager channels-last", "channels-last, added in place", "cuda")
"""Without what `torch.compile` takes minutes for."""

PORTIONS: Mapping[str, Portion] = {
    "tests": Portion((("-m", "pytest", "-m", "gpu", "tests/cuda", "-q", "--junit-xml={out}/tests.xml"),), longest=300),
    "mapping": Portion(
        (
            (
                *("-m", "benchmarks.mapping_layers", "--device", "cuda", "--out", "{out}"),
                *("--sizes", "1024x1024", "--rounds", "3", "--paths", *PATHS),
            ),
        ),
        longest=420,
    ),
    "joint": Portion(
        (
            ("-m", "benchmarks.peak_memory", "--device", "cuda", "--out", "{out}"),
            ("-m", "benchmarks.joint_step", "--device", "cuda", "--rounds", "2", "--out", "{out}"),
        ),
        longest=480,
        needs=("diffusers", "transformers"),
    ),
}
REPORT = "report"


@dataclass(frozen=True)
class Finding:
    """A line of the report; `met` is None where nothing was measured."""

    goal: str
    measured: str
    met: bool | None


def run(portion: Portion, out: Path) -> str | None:
    """A portion's processes, one after the other.

    Returns:
        Why it did not come to its end, None where it did.
    """
    if missing := [name for name in portion.needs if importlib.util.find_spec(name) is None]:
        return f"{' and '.join(missing)} not installed"
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + portion.longest
    for command in portion.commands:
        filled = [argument.format(out=out) for argument in command]
        try:
            ended = subprocess.run([sys.executable, *filled], timeout=end - time.monotonic())
        except subprocess.TimeoutExpired:
            return f"{command[1]} was not through after {portion.longest:g} seconds"
        if ended.returncode:
            return f"{command[1]} ended with {ended.returncode}"
    return None


# ---- what the results say


def found(out: Path) -> list[Finding]:
    """Every goal, by the results in a folder."""
    return [*tests(out), *accuracy(out), *mapping_layers(out), *joint_step(out), *peak_memory(out)]


def tests(out: Path) -> Iterable[Finding]:
    goals = {"GPU tests fail: none": lambda name: True, "overlapped as serial, to the bit": is_overlap}
    path = out / "tests.xml"
    cases = list(ElementTree.parse(path).iter("testcase")) if path.is_file() else []
    for goal, concerns in goals.items():
        concerned = [case for case in cases if concerns(f"{case.get('classname')}.{case.get('name')}")]
        failed = sum(case.find("failure") is not None or case.find("error") is not None for case in concerned)
        skipped = sum(case.find("skipped") is not None for case in concerned)
        ran = len(concerned) - skipped
        yield Finding(goal, f"{failed} of {ran} fail, {skipped} skipped", not failed) if ran else nothing(goal)


def is_overlap(name: str) -> bool:
    return ".test_overlap." in f".{name}"


def accuracy(out: Path) -> Iterable[Finding]:
    for dtype, bound in (("float16", 5e-3), ("bfloat16", 2e-2)):
        goal = f"mapping layers, {dtype}: within {bound:g} of the eager ones"
        rows = [row for row in rows_of(out, "mapping_layers-cuda") if row["path"] == "cuda" and dtype in typed(row)]
        worst = max((row["apart"] for row in rows), default=None)
        yield nothing(goal) if worst is None else Finding(goal, f"{worst:.2g}", worst <= bound)


def typed(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The words of a row's case: "1024x1024, 8 rows, float16"."""
    return tuple(row["case"].split(", "))


def mapping_layers(out: Path) -> Iterable[Finding]:
    goals: Mapping[str, tuple[float, Callable[[Mapping[str, Any]], float]]] = {
        "of the ceiling of a matrix product": (0.7, lambda row: row["of the ceiling"]),
        "times as fast as the released form": (1.5, lambda row: row["times as fast"]["median"]),
    }
    rows = rows_of(out, "mapping_layers-cuda")
    chosen = [row for row in rows if row["path"] == "cuda" and {LARGE_BATCH, "float16"} <= set(typed(row))]
    for words, (bound, value) in goals.items():
        goal = f"mapping layers, {LARGE_BATCH}, float16: at least {bound:g} {words}"
        yield Finding(goal, f"{value(chosen[0]):.3g}", value(chosen[0]) >= bound) if chosen else nothing(goal)


def joint_step(out: Path) -> Iterable[Finding]:
    goal = "joint step, overlapped: at most 0.95 of the sum of its parts"
    rows = [row for row in rows_of(out, "joint_step-float16-cuda") if row["step"] == "joint, overlapped"]
    for row in rows:
        value = row["of the sum"]["median"]
        yield Finding(f"{goal} ({row['rows']} rows)", f"{value:.3g}", value <= 0.95)
    if not rows:
        yield nothing(goal)


def peak_memory(out: Path) -> Iterable[Finding]:
    goal = "recorded: at most 0.3 GB more at once than SDXL alone and the adapter"
    result = content_of(out, "peak_memory-cuda").get("result", {})
    if "recorded beyond SDXL alone, GB" not in result:
        return [nothing(goal)]
    more = result["recorded beyond SDXL alone, GB"] - result["adapter, GB"]
    estimated, needed = (
        result.get(f"{word} for a joint step beside the weights, GB") for word in ("estimated", "measured")
    )
    findings = [Finding(goal, f"{more:.3g} GB", more <= 0.3)]
    if needed is not None:
        enough = "what a joint step needs beside the weights is no more than estimated"
        findings.append(Finding(enough, f"{needed:.3g} GB, estimated {estimated:.3g}", needed <= estimated))
    return findings


def nothing(goal: str) -> Finding:
    return Finding(goal, NOT_RUN, None)


def rows_of(out: Path, name: str) -> list[dict[str, Any]]:
    return content_of(out, name).get("rows", [])


def content_of(out: Path, name: str) -> dict[str, Any]:
    path = out / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


# ---- the report


def report(out: Path, cut_short: Mapping[str, str]) -> str:
    """The findings as a table; also in `acceptance.json`.

    Args:
        cut_short: portion → why it did not come to its end.
    """
    findings = found(out)
    content = {"gpu": gpu(), "findings": [asdict(finding) for finding in findings], "cut_short": dict(cut_short)}
    out.mkdir(parents=True, exist_ok=True)
    (out / "acceptance.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    words = {True: "met", False: "NOT MET", None: "open"}
    rows = [("goal", "measured", "met"), *((one.goal, one.measured, words[one.met]) for one in findings)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([gpu(), "", *lines, *(f"{name}: {reason}" for name, reason in cut_short.items())])


def gpu() -> str:
    """What is measured on."""
    import torch

    if not torch.cuda.is_available():
        return f"no GPU; torch {torch.__version__}"
    return f"{torch.cuda.get_device_name()}; torch {torch.__version__}, CUDA {torch.version.cuda}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--portion", choices=(*PORTIONS, REPORT), help="default: all of them")
    parser.add_argument("--out", type=Path, default=Path("acceptance"), metavar="DIR", help="default: %(default)s")
    options = parser.parse_args(arguments)
    chosen = [name for name in PORTIONS if options.portion in (None, name)]
    cut_short = {name: reason for name in chosen if (reason := run(PORTIONS[name], options.out)) is not None}
    print(report(options.out, cut_short))
    return 1 if cut_short or any(finding.met is False for finding in found(options.out)) else 0


if __name__ == "__main__":
    sys.exit(main())
