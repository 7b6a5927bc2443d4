"""How long a step of each stage of `miniature` takes on one core, in processor time.

    python -m benchmarks.miniature_steps FOLDER [STAGE …]

FOLDER is an --out of `miniature` in which the stages before are done, with however small a --share. One step more than
is timed is made first.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

import torch
from torch import nn

from lib_xadapter.miniature import making
from lib_xadapter.miniature.learning import Course, Drawn, Loss, optimizers
from lib_xadapter.miniature.making import Work
from lib_xadapter.miniature.stages import STAGES

TIMED = 3


class Timed(Exception):
    """Ends a stage when its steps are timed."""


def seconds_of(work: Work, name: str) -> float:
    """Processor time of one step of a stage that learns; for banks of latents, of one picture."""
    found: list[float] = []

    def learn(module: nn.Module, loss: Loss, course: Course, folder: Path, name: str) -> int:
        chosen = optimizers(module, course)
        for step in range(1 + TIMED):
            begun = time.process_time()
            module.zero_grad()
            loss(Drawn.of(0, step)).backward()
            for optimizer in chosen:
                optimizer.step()
            found.append(time.process_time() - begun)
        raise Timed

    def course(self: Work, stage: making.Stage) -> Course:
        return Course(1, stage.batch, 1e-4)

    with patch.object(making, "learn", learn), patch.object(Work, "course", course):
        try:
            begun = time.process_time()
            pictures = making.MAKERS[name](work, STAGES[name])
            found = [0.0, (time.process_time() - begun) / pictures]
        except Timed:
            pass
    return sum(found[1:]) / len(found[1:])


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("stages", nargs="*", metavar="STAGE")
    options = parser.parse_args(given)
    torch.set_num_threads(1)
    for name in options.stages or [name for name, stage in STAGES.items() if stage.steps and name != "adapter"]:
        seconds = seconds_of(Work(options.folder), name)
        stage = STAGES[name]
        row = {"stage": name, "batch": stage.batch, "seconds a step": round(seconds, 4)}
        print(json.dumps({**row, "minutes": round(seconds * stage.steps / 60, 1)}), flush=True)


if __name__ == "__main__":
    main()
