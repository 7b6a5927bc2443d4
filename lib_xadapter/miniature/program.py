"""`miniature`: all stages, as many at once as there are workers, each a process of its own on one core."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch

from .. import __version__
from ..errors import WrongArgument
from ..headless.generate_command import check_folder
from ..headless.options import say
from ..saving import write_whole
from .finished import FOLDER
from .making import StageFailed, Work, make, write_held_out
from .stages import HOURS, STAGES, Stage
from .worlds import LARGEST_SEED

DONE = "done.json"
MADE = "made.json"
WORK = "work.json"
POLL_SECONDS = 1.0
"""Between two looks at the workers."""
MOST_PICTURES = 100_000
REPORT_SECONDS = 300.0
"""Between two lines on what goes on."""


def miniature(options: argparse.Namespace) -> int:
    """Make what is not done yet."""
    _check(options)
    work = Work(options.out, options.seed, options.share, options.hours)
    if options.webui is not None:
        # what comes before needs none of it
        from .webui_files import write_for_webui

        write_for_webui(work.models if work.models.is_dir() else FOLDER, options.webui)
        say(f"The miniature models are below {options.webui}.")
        return 0
    if options.held_out is not None:
        base, upgraded = write_held_out(options.held_out, options.pictures)
        say(f"{options.pictures} captions with pictures of both worlds are in {base} and {upgraded}.")
        return 0
    if options.list:
        for stage in STAGES.values():
            say(f"{stage.name:18}{'done' if is_done(work, stage) else '':6}{stage.minutes:5g} min  {stage.makes}")
        return 0
    _claim(work)
    if options.stage:
        torch.set_num_threads(1)
        for name in options.stage:
            make_once(work, STAGES[name])
        return 0
    _make_all(work, options.workers)
    _write_made(work)
    say(f"All stages are done: {work.models}")
    return 0


def _check(options: argparse.Namespace) -> None:
    check_folder(options.out)
    if not 0 < options.share <= 1:
        raise WrongArgument(f"--share is {options.share:g}, expected a number above 0, to 1.")
    if not 0 < options.hours <= 1000:
        raise WrongArgument(f"--hours is {options.hours:g}, expected a number above 0, to 1000.")
    if not 1 <= options.workers <= 64:
        raise WrongArgument(f"--workers is {options.workers}, expected a whole number from 1 to 64.")
    if not 1 <= options.pictures <= MOST_PICTURES:
        raise WrongArgument(f"--pictures is {options.pictures}, expected a whole number from 1 to {MOST_PICTURES}.")
    if not 0 <= options.seed <= LARGEST_SEED:
        raise WrongArgument(f"--seed is {options.seed}, expected a whole number from 0 to {LARGEST_SEED}.")


def _claim(work: Work) -> None:
    """Write down what the folder's stages are made with.

    Raises:
        WrongArgument: some are there that were made with something else.
    """
    path, ours = work.out / WORK, {"seed": work.seed, "share": work.share}
    if path.is_file() and (theirs := json.loads(path.read_text(encoding="utf-8"))) != ours:
        raise WrongArgument(
            f"--out: what is in {work.out} was made with --seed {theirs['seed']} --share {theirs['share']:g}; name "
            "another folder."
        )
    _write_json(path, ours)


def is_done(work: Work, stage: Stage) -> bool:
    return (work.folder(stage.name) / DONE).is_file()


def make_once(work: Work, stage: Stage) -> None:
    """Make a stage if it is not done, and write down how it was made."""
    if is_done(work, stage):
        return
    begun = time.monotonic()
    steps = make(work, stage)
    record = {
        "stage": stage.name,
        "steps": steps,
        "seed": work.seed,
        "share": work.share,
        "seconds": round(time.monotonic() - begun),
        "version": __version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }
    _write_json(work.folder(stage.name) / DONE, record)


def _write_made(work: Work) -> None:
    """By which command, seed and version everything was made, and in how many steps."""
    stages = {name: json.loads((work.folder(name) / DONE).read_text(encoding="utf-8")) for name in STAGES}
    command = f"python -m lib_xadapter miniature --seed {work.seed} --share {work.share:g} --hours {work.hours:g}"
    _write_json(work.models / MADE, {"command": command, "version": __version__, "stages": stages})


def _write_json(path: Path, content: object) -> None:
    write_whole(path, lambda to: to.write_text(json.dumps(content, indent=1), encoding="utf-8"))


@dataclass(frozen=True)
class _Running:
    stage: Stage
    process: subprocess.Popen
    log: Path


def _make_all(work: Work, workers: int) -> None:
    running: list[_Running] = []
    reported = time.monotonic()
    try:
        while waiting := [stage for stage in STAGES.values() if not is_done(work, stage)]:
            busy = {one.stage.name for one in running}
            for stage in _can_begin(waiting, busy)[: workers - len(running)]:
                running.append(_begin(work, stage))
            time.sleep(POLL_SECONDS)
            running = [one for one in running if _still_runs(work, one)]
            if time.monotonic() - reported > REPORT_SECONDS:
                reported = time.monotonic()
                say("; ".join(f"{one.stage.name}: {_last_line(one.log)}" for one in running))
    finally:
        for one in running:
            one.process.terminate()
        for one in running:
            one.process.wait()


def _can_begin(waiting: Sequence[Stage], busy: set[str]) -> list[Stage]:
    """In the order of the table."""
    missing = {stage.name for stage in waiting}
    return [stage for stage in waiting if stage.name not in busy and not missing.intersection(stage.needs)]


def _begin(work: Work, stage: Stage) -> _Running:
    log = work.folder(stage.name) / "log.txt"
    command = [sys.executable, "-m", "lib_xadapter", "miniature", "--stage", stage.name, "--out", str(work.out)]
    command += ["--seed", str(work.seed), "--share", repr(work.share), "--hours", repr(work.hours)]
    one_core = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    say(f"{stage.name} begins: {stage.makes}, at most {stage.minutes * work.hours / HOURS:.0f} minutes; {log}")
    with log.open("a", encoding="utf-8") as to:
        process = subprocess.Popen(command, stdout=to, stderr=subprocess.STDOUT, env={**os.environ, **one_core})
    return _Running(stage, process, log)


def _still_runs(work: Work, one: _Running) -> bool:
    """Raises: StageFailed: it ended without being done."""
    if one.process.poll() is None:
        return True
    if not is_done(work, one.stage):
        raise StageFailed(f"The stage '{one.stage.name}' failed: {_last_line(one.log)} ({one.log}).")
    say(f"{one.stage.name} is done.")
    return False


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").strip().splitlines()
    return lines[-1].strip() if lines else ""
