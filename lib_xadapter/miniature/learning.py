"""The loop that all models of the miniature world are learned by: seeded, resumable, with a moving average."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..errors import WrongFile, XAdapterError
from ..saving import write_whole
from ..training.muon import Muon, is_matrix

logger = logging.getLogger(__name__)

SAVED_EVERY = 120.0
"""Seconds."""
CLIPPED = 1.0
"""Largest norm of the gradients."""
TIMED = 20
"""Steps by which a time limit is turned into a number of steps."""


class Diverged(XAdapterError):
    """The loss is no number any more."""


@dataclass(frozen=True)
class Course:
    """How a model is learned.

    Attributes:
        steps: in all.
        batch: rows a step.
        learning_rate: at its highest; it rises over `warmup` steps and falls as a cosine to a fiftieth.
        decay: of the moving average of the weights.
        seconds: none later than this is begun: after its first `TIMED` steps, and after those of each time that it
            goes on, the steps are made fewer so that they would fit. 0 for no limit.
        seed: of everything that is drawn.
    """

    steps: int
    batch: int
    learning_rate: float
    warmup: int = 200
    decay: float = 0.999
    weight_decay: float = 0.01
    seconds: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Drawn:
    """The random numbers of one step, which depend on the seed and the step alone.

    Attributes:
        step: which one.
        numbers: for what numpy draws.
        noise: for what torch draws.
    """

    step: int
    numbers: numpy.random.Generator
    noise: torch.Generator

    @classmethod
    def of(cls, seed: int, step: int) -> Drawn:
        numbers = numpy.random.default_rng((seed, step))
        return cls(step, numbers, torch.Generator().manual_seed(int(numbers.integers(2**62))))

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.noise)

    def whole(self, below: int, rows: int) -> Tensor:
        return torch.randint(below, (rows,), generator=self.noise)

    def chance(self, share: float, rows: int) -> Tensor:
        """True for about this share of the rows."""
        return torch.rand(rows, generator=self.noise) < share


Loss = Callable[[Drawn], Tensor]


def learn(module: nn.Module, loss: Loss, course: Course, folder: Path, name: str) -> int:
    """Learn the parameters of a module that want gradients, going on from what the folder holds.

    Args:
        module: gets the moving average of its weights in the end.
        loss: of one step, drawn from its own random numbers.
        course: how.
        folder: of the state, written whole or not at all.
        name: for the progress bar.

    Returns:
        The number of steps that it took.

    Raises:
        Diverged: the loss is no number; the last state stays as it was.
    """
    state = _State(module, course, folder / "state.pt")
    begun, saved, first = time.monotonic(), time.monotonic(), state.step
    with tqdm(total=state.steps, initial=state.step, desc=name, dynamic_ncols=True, mininterval=5) as bar:
        while state.step < state.steps:
            value = state.advance(loss)
            bar.update()
            bar.set_postfix_str(f"loss {value:.4f}", refresh=False)
            if course.seconds and state.step - first == TIMED:
                state.shorten((time.monotonic() - begun) / TIMED)
                bar.total = state.steps
            if time.monotonic() - saved > SAVED_EVERY:
                state.save()
                saved = time.monotonic()
    state.save()
    state.average()
    return state.steps


class _State:
    """Weights, optimizer, moving average and step."""

    def __init__(self, module: nn.Module, course: Course, path: Path) -> None:
        self._course, self._path = course, path
        self._weights = {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
        self._optimizers = optimizers(module, course)
        self._average = [weight.detach().clone() for weight in self._weights.values()]
        self.step, self.steps = 0, course.steps
        if path.is_file():
            self._load()

    def advance(self, loss: Loss) -> float:
        """One step; gives its loss."""
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self._rate()
            optimizer.zero_grad(set_to_none=True)
        tensor = loss(Drawn.of(self._course.seed, self.step))
        if not math.isfinite(value := float(tensor.detach())):
            raise Diverged(f"The loss is {value} at step {self.step}; the last state stays at {self._path}.")
        tensor.backward()
        torch.nn.utils.clip_grad_norm_(self._weights.values(), CLIPPED)
        for optimizer in self._optimizers:
            optimizer.step()
        self.step += 1
        # a short memory at first, so that the weights of the start are forgotten
        decay = min(self._course.decay, (1 + self.step) / (10 + self.step))
        current = [weight.detach() for weight in self._weights.values()]
        torch._foreach_lerp_(self._average, current, 1 - decay)
        return value

    def _rate(self) -> float:
        course = self._course
        warm = min(1.0, (self.step + 1) / max(course.warmup, 1))
        fallen = 0.5 * (1 + math.cos(math.pi * self.step / self.steps))
        return course.learning_rate * warm * (0.02 + 0.98 * fallen)

    def shorten(self, seconds: float) -> None:
        """Fewer steps, where one takes so long that they would not fit."""
        fit = max(self.step, int(self._course.seconds / seconds))
        if self.steps > fit:
            logger.warning("%s: %d steps instead of %d fit its time.", self._path.parent.name, fit, self.steps)
            self.steps = fit

    def average(self) -> None:
        """Give the module the moving average."""
        with torch.no_grad():
            for weight, average in zip(self._weights.values(), self._average, strict=True):
                weight.copy_(average)

    def save(self) -> None:
        state = {
            "step": self.step,
            "steps": self.steps,
            "weights": dict(self._weights.items()),
            "average": self._average,
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
        }
        write_whole(self._path, lambda to: torch.save(state, to))

    def _load(self) -> None:
        state: Mapping[str, Any] = torch.load(self._path, weights_only=True)
        if state["weights"].keys() != self._weights.keys():
            raise WrongFile(f"{self._path} holds the state of another model; take another --out.")
        with torch.no_grad():
            for name, weight in self._weights.items():
                weight.copy_(state["weights"][name])
        for optimizer, its in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(its)
        self._average = list(state["average"])
        self.step, self.steps = state["step"], state["steps"]


def optimizers(module: nn.Module, course: Course) -> list[torch.optim.Optimizer]:
    """Muon for matrices, AdamW for tables of embeddings and all else; biases and norms do not decay."""
    tables = {id(table.weight) for table in module.modules() if isinstance(table, nn.Embedding)}
    weights = [weight for weight in module.parameters() if weight.requires_grad]
    matrices = [weight for weight in weights if is_matrix(weight) and id(weight) not in tables]
    taken = {id(weight) for weight in matrices}
    others = [weight for weight in weights if id(weight) not in taken]
    groups = [
        {"params": [weight for weight in others if weight.ndim > 1], "weight_decay": course.weight_decay},
        {"params": [weight for weight in others if weight.ndim <= 1], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=course.learning_rate, betas=(0.9, 0.99), foreach=True)
    if not matrices:
        return [adam]
    return [adam, Muon(matrices, course.learning_rate, weight_decay=course.weight_decay)]


def batches(bank: int, batch: int, drawn: Drawn) -> list[int]:
    """Rows of a bank for one step: all of them once, in an order of each round's own, before any comes again."""
    first = drawn.step * batch
    return [_in_order(bank, number) for number in range(first, first + batch)]


def _in_order(bank: int, number: int) -> int:
    """The place of a number in the order of its round: a walk whose stride has no divisor in common with the bank."""
    turn, place = divmod(number, bank)
    stride = 2 * (bank // 3) + 2 * turn + 1
    while math.gcd(stride, bank) != 1:
        stride += 1
    return (place * stride + turn) % bank
