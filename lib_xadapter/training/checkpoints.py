"""Checkpoints of a training: everything that going on to the bit needs, in one file that is whole or not there.

Nothing random is among it: what is drawn is drawn anew for each step, from the seed, the step's number and the row's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
from safetensors import SafetensorError
from torch import Tensor

from ..errors import WrongFile, first_line
from ..saving import write_tensors

FACTS = "xadapter.checkpoint"
"""Key of a file's metadata under which stands what is no tensor."""
LAYERS, OPTIMIZER, EMA = "layers", "optimizer", "ema"
NAME = re.compile(r"step-(?P<step>\d{8})\.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """A training between two steps.

    Attributes:
        step: how many are behind it.
        tensors: by group (layers, optimizer, ema) and name.
        facts: whatever else, as JSON can hold it.
    """

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    facts: Mapping[str, Any]


class Checkpoints:
    """The checkpoints of a folder.

    Args:
        folder: made where it is not there.
        keep: how many stay, the last ones.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder = folder
        self._keep = keep

    @property
    def files(self) -> list[Path]:
        """Whole checkpoints, the oldest first."""
        found = self._folder.glob("step-*.safetensors") if self._folder.is_dir() else ()
        return sorted(path for path in found if NAME.fullmatch(path.name))

    @property
    def last(self) -> Path | None:
        """The newest, None where there is none."""
        return self.files[-1] if self.files else None

    def save(self, checkpoint: Checkpoint) -> Path:
        """Write a checkpoint, then let the oldest go.

        Raises:
            WrongFile: it cannot be written; those that were there are untouched.
        """
        path = self._folder / f"step-{checkpoint.step:08d}.safetensors"
        groups = checkpoint.tensors.items()
        tensors = {f"{group}/{name}": tensor for group, named in groups for name, tensor in named.items()}
        write_tensors(path, tensors, {FACTS: json.dumps({"step": checkpoint.step, **checkpoint.facts})})
        for old in self.files[: -self._keep]:
            old.unlink()
        return path


def read_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint, on the CPU.

    Raises:
        WrongFile: the file is none.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {})[FACTS])
            tensors: dict[str, dict[str, Tensor]] = {LAYERS: {}, OPTIMIZER: {}, EMA: {}}
            for key in file.keys():
                group, name = key.split("/", 1)
                tensors[group][name] = file.get_tensor(key)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise WrongFile(f"{path} is no checkpoint of a training: {first_line(error)}") from error
    return Checkpoint(facts.pop("step"), tensors, facts)
