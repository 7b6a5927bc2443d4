"""Where the base stands in its own steps in the joint stage: its changing prompts and its ControlNets go by that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..evaluations import Evaluation, nearest_level

START, END = "control_guidance_start", "control_guidance_end"
"""Of diffusers' pipelines with ControlNets: one number for all of them, or a list."""
AFTER_ALL = (1 - 2**-32, 1.0)
"""A window in which no step begins."""


@dataclass(frozen=True)
class BaseSteps:
    """The base's model evaluations as its user counts them: those of stage 1, or without one those of the joint stage.

    Attributes:
        count: how many.
        levels: their noise levels, where there is a stage 1.
    """

    count: int
    levels: tuple[float, ...] = ()

    def place(self, evaluation: Evaluation) -> int:
        """Which of them an evaluation in the joint stage is, from 0: in stage 1, that of the nearest noise level."""
        if self.levels:
            return nearest_level(self.levels, evaluation.sigma)
        # a quotient times its divisor may fall short of the whole number that it was
        return int(evaluation.progress * self.count + 1e-6)

    def windowed(self, arguments: Mapping[str, Any], evaluations: Sequence[Evaluation]) -> dict[str, Any]:
        """A pipeline's arguments, with the windows of its ControlNets as a call with these evaluations counts them."""
        given = [arguments.get(START, 0.0), arguments.get(END, 1.0)]
        if not evaluations or not {START, END} & arguments.keys():
            return dict(arguments)
        if not any(isinstance(one, (list, tuple)) for one in given):
            start, end = self._window(*given, evaluations)
            return {**arguments, START: start, END: end}
        nets = max(len(one) for one in given if isinstance(one, (list, tuple)))
        starts, ends = (list(one) if isinstance(one, (list, tuple)) else [one] * nets for one in given)
        windows = [self._window(*window, evaluations) for window in zip(starts, ends, strict=True)]
        return {**arguments, START: [start for start, _ in windows], END: [end for _, end in windows]}

    def _window(self, start: float, end: float, evaluations: Sequence[Evaluation]) -> tuple[float, float]:
        """By diffusers' rule a ControlNet acts in step i of n where start ≤ i/n and (i + 1)/n ≤ end."""
        places = map(self.place, evaluations)
        acting = [
            call for call, place in enumerate(places) if place / self.count >= start and (place + 1) / self.count <= end
        ]
        if not acting:
            return AFTER_ALL
        return acting[0] / len(evaluations), (acting[-1] + 1) / len(evaluations)
