"""The loop of a training, in one process or several, by Hugging Face accelerate.

Every process has all frozen models and computes some rows of each batch; their gradients are summed, so that the number
of processes changes nothing but the order of a sum. Each step's batch and random numbers follow from its number alone:
that is all there is to going on after an interruption.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import math
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from ..errors import XAdapterError, first_line
from ..mapping import MappingLayers
from .batches import Batches, Crop
from .checkpoints import Checkpoint, Checkpoints
from .encoding import EncodedRows, Encoder
from .pictures import Pictures
from .recipe import FLOAT32, TENSORBOARD, Course, Recipe
from .state import TrainedState
from .step import Draws, TrainingStep
from .validation import Validation

logger = logging.getLogger(__name__)

BANDS = 4
"""Of timesteps, for which the loss is told apart."""
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class LostProcess(XAdapterError):
    """Another process of this training is gone."""


class Interruption:
    """Whether somebody wants the training to end; a second Ctrl-C ends it at once."""

    def __init__(self) -> None:
        self.by: str | None = None

    @contextmanager
    def noticed(self) -> Iterator[None]:
        """While open, SIGTERM and Ctrl-C are noted instead of obeyed."""
        before = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.by = signal.Signals(number).name
        signal.signal(number, signal.default_int_handler)


@dataclass(frozen=True)
class Part:
    """Rows of a step that one process computes at once: their numbers in the batch, and the batch's size."""

    step: int
    rows: tuple[int, ...]
    crops: tuple[Crop, ...]
    batch: int


@dataclass(frozen=True)
class Sums:
    """What a step's rows come to, summed over all of them, by band of timesteps.

    Attributes:
        losses, rows: (BANDS,).
        stops: how many processes were told to end.
    """

    losses: Tensor
    rows: Tensor
    stops: float = 0.0

    @classmethod
    def none(cls, device: torch.device) -> Sums:
        return cls(*(torch.zeros(BANDS, device=device) for _ in range(2)))

    @property
    def loss(self) -> float:
        return float(self.losses.sum() / self.rows.sum())

    def add(self, losses: Tensor, timesteps: Tensor, of: int) -> None:
        """Rows with these losses at these of so many timesteps."""
        bands = timesteps * BANDS // of
        self.losses.index_add_(0, bands, losses.float())
        self.rows.index_add_(0, bands, torch.ones_like(losses, dtype=torch.float32))

    def by_band(self, of: int) -> dict[str, float]:
        """Mean loss of each band that had rows, by the timesteps that it holds."""
        edges = [of * band // BANDS for band in range(BANDS + 1)]
        names = [f"loss/timesteps {low}-{high - 1}" for low, high in itertools.pairwise(edges)]
        triples = zip(names, self.losses.tolist(), self.rows.tolist(), strict=True)
        return {name: loss / rows for name, loss, rows in triples if rows}


@dataclass(frozen=True)
class Outcome:
    """How a training ended.

    Attributes:
        step: how many steps are behind it.
        of_steps: how many there are.
        interrupted_by: a signal's name, None where it came to its end.
        checkpoint: the last one.
    """

    step: int
    of_steps: int
    interrupted_by: str | None
    checkpoint: Path | None


class Training:
    """A training that is ready to begin or to go on.

    Args:
        accelerator: this process among all.
        recipe, course: what is asked for.
        base, upgraded: diffusers pipelines, frozen, on the device.
        layers: the mapping layers, on the device, float32.
        pictures, encoder: what is learned from.
        checkpoints: where they are kept.
        facts: what a checkpoint must tell to be gone on from: of models and pictures.
        validation: None for none.
        controlnet: of the base, frozen, on the device; None for none.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        recipe: Recipe,
        course: Course,
        base: Any,
        upgraded: Any,
        layers: MappingLayers,
        pictures: Pictures,
        encoder: Encoder,
        checkpoints: Checkpoints,
        facts: Mapping[str, Any] | None = None,
        validation: Validation | None = None,
        controlnet: nn.Module | None = None,
    ) -> None:
        self._accelerator, self._recipe, self._course = accelerator, recipe, course
        self._pictures, self._encoder = pictures, encoder
        self._checkpoints, self._facts, self._validation = checkpoints, dict(facts or {}), validation
        self._batches = Batches(pictures.sizes, recipe.batch, recipe.seed, recipe.size, recipe.buckets)
        self.steps = recipe.steps or recipe.epochs * self._batches.per_epoch
        self.state = TrainedState(layers, recipe, self.steps)
        self._computed = TrainingStep(base, upgraded, layers, recipe, self._autocast, course.checkpointing, controlnet)
        self._done = 0
        # validation moves and uses the VAEs and text encoders that the next step's pictures are encoded with
        self._encoding = threading.Lock()
        if course.compile:
            for unet in (base.unet, upgraded.unet):
                unet.compile_repeated_blocks()
            for block in layers.body:
                block.compile()

    def go_on_from(self, checkpoint: Checkpoint) -> None:
        """Be where a checkpoint was."""
        self.state.go_on_from(checkpoint)
        self._done = checkpoint.step

    def run(self) -> Outcome:
        """Train to the end, or until a signal.

        Raises:
            XAdapterError: the loss is no number, a checkpoint cannot be written, a process is gone; checkpoints that
                were there are untouched.
        """
        interruption, saved = Interruption(), None
        first = self._done
        with interruption.noticed(), self._bar() as bar, self._read_ahead() as coming:
            for step in range(first, self.steps):
                sums = self._step(next(coming), interruption)
                self._done = step + 1
                bar.update(self._recipe.batch)
                bar.set_postfix(loss=f"{sums.loss:.4f}", step=self._done)
                self._log(sums)
                ends = sums.stops > 0
                if ends or self._done % self._course.save_every == 0 or self._done == self.steps:
                    saved = self._save()
                if self._validation is not None and self._done % self._course.validate_every == 0 and not ends:
                    self._validate()
                if ends:
                    return Outcome(self._done, self.steps, interruption.by or "another process", saved)
        return Outcome(self._done, self.steps, None, saved or self._checkpoints.last)

    def parts_of(self, step: int) -> list[Part]:
        """This process's share of a step."""
        crops, accelerator = self._batches.at(step), self._accelerator
        mine = numpy.array_split(numpy.arange(len(crops)), accelerator.num_processes)[accelerator.process_index]
        shares = (share.tolist() for share in numpy.array_split(mine, self._course.accumulation))
        return [Part(step, tuple(rows), tuple(crops[row] for row in rows), len(crops)) for rows in shares if rows]

    def _step(self, parts: Sequence[tuple[Part, Future[EncodedRows]]], interruption: Interruption) -> Sums:
        """One step of all processes together."""
        self.state.forget_gradients()
        sums = Sums.none(self._accelerator.device)
        for part, encoded in parts:
            self._compute(part, encoded.result(), sums)
        sums = self._over_processes(sums, interruption)
        self._check_number(sums.loss, "loss")
        norm = self.state.gradient_norm()
        # in float16 the scaler leaves out a step whose gradients are infinite, and scales them less from there on
        if not self.state.scaler.is_enabled():
            self._check_number(norm, "gradient")
        self.state.take_step()
        return sums

    def _compute(self, part: Part, rows: EncodedRows, sums: Sums) -> None:
        device, size = self._accelerator.device, rows.upgraded_mean.shape[-2:]
        draws = Draws.of(self._recipe, part.step, part.rows, size, self._computed.timesteps)
        draws = draws.to(device, rows.upgraded_mean.dtype)
        with self._computed.losses(rows, draws) as losses:
            self.state.scaler.scale(losses.sum() / part.batch).backward()
        sums.add(losses.detach(), draws.timesteps, self._computed.timesteps)

    def _over_processes(self, sums: Sums, interruption: Interruption) -> Sums:
        """Gradients and sums of all processes."""
        stops = torch.tensor([float(interruption.by is not None)], device=sums.losses.device)
        if self._accelerator.num_processes == 1:
            return dataclasses.replace(sums, stops=float(stops))
        with naming_lost_processes(self._checkpoints):
            for parameter in self.state.parameters:
                parameter.grad = self._accelerator.reduce(parameter.grad, "sum")
            numbers = self._accelerator.reduce(torch.cat([sums.losses, sums.rows, stops]), "sum")
        losses, rows, stops = numbers.split([BANDS, BANDS, 1])
        return Sums(losses, rows, float(stops))

    def _check_number(self, value: float, what: str) -> None:
        if not math.isfinite(value):
            last = self._checkpoints.last
            kept = f"{last} is untouched" if last is not None else "no checkpoint was written yet"
            raise XAdapterError(
                f"The {what} of step {self._done + 1} is {value}: train again in another --out with a lower "
                f"--learning-rate, with --clip or another --precision, as --resume keeps these options; {kept}."
            )

    def _save(self) -> Path | None:
        """A checkpoint, written by the first process; the others wait, and end if it fails."""
        error, path = None, None
        if self._accelerator.is_main_process:
            try:
                facts = {"recipe": dataclasses.asdict(self._recipe), **self._facts}
                path = self._checkpoints.save(self.state.checkpoint(self._done, facts))
            except XAdapterError as found:
                error = found
        if self._accelerator.num_processes > 1:
            failed = torch.tensor([float(error is not None)], device=self._accelerator.device)
            with naming_lost_processes(self._checkpoints):
                failed = self._accelerator.reduce(failed, "sum")
            if error is None and bool(failed):
                error = LostProcess("The first process could not write a checkpoint.")
        if error is not None:
            raise error
        return path or self._checkpoints.last

    def _validate(self) -> None:
        if not self._accelerator.is_main_process:
            return
        with self._encoding:
            grid = numpy.asarray(self._validation.paint(self.state.averaged, self._done))
        for tracker in self._accelerator.trackers:
            if hasattr(tracker, "log_images"):
                # the others pass on what they do not know
                layout = {"dataformats": "NHWC"} if tracker.name == TENSORBOARD else {}
                tracker.log_images({"validation": grid[None]}, step=self._done, **layout)

    def _log(self, sums: Sums) -> None:
        figures = {"loss": sums.loss, "learning rate": self.state.learning_rate}
        self._accelerator.log(figures | sums.by_band(self._computed.timesteps), step=self._done)

    def _bar(self) -> tqdm:
        """Pictures, pictures a second and the time that is left."""
        return tqdm(
            total=self.steps * self._recipe.batch,
            initial=self._done * self._recipe.batch,
            unit="picture",
            desc="training",
            dynamic_ncols=True,
            disable=not self._accelerator.is_main_process,
        )

    @contextmanager
    def _read_ahead(self) -> Iterator[Iterator[list[tuple[Part, Future[EncodedRows]]]]]:
        """The parts of each step in turn, those of the next step encoded while one is computed."""
        with ThreadPoolExecutor(1) as pool:

            def encoded(step: int) -> list[tuple[Part, Future[EncodedRows]]]:
                parts = self.parts_of(step) if step < self.steps else []
                return [(part, pool.submit(self._rows, part)) for part in parts]

            def steps() -> Iterator[list[tuple[Part, Future[EncodedRows]]]]:
                coming = encoded(self._done)
                for step in range(self._done, self.steps):
                    now, coming = coming, encoded(step + 1)
                    yield now

            try:
                yield steps()
            finally:
                pool.shutdown(cancel_futures=True)

    def _rows(self, part: Part) -> EncodedRows:
        with self._encoding:
            return self._encoder.rows(self._pictures, part.crops)

    def _autocast(self) -> contextlib.AbstractContextManager:
        if self._recipe.precision == FLOAT32:
            return nullcontext()
        return torch.autocast(self._accelerator.device.type, getattr(torch, self._recipe.precision))


@contextmanager
def naming_lost_processes(checkpoints: Checkpoints) -> Iterator[None]:
    """What torch says where a process is gone becomes one sentence."""
    try:
        yield
    except RuntimeError as error:
        last = checkpoints.last
        kept = f"go on from {last.name} by --resume" if last is not None else "no checkpoint was written yet"
        raise LostProcess(f"Another process of this training is gone ({first_line(error)}); {kept}.") from error
