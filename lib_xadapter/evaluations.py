"""The model evaluations of the joint stage: where each stands, when the base runs, and when the adapter acts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .settings import Settings

SAME_LEVEL = 1e-6
"""Relative difference under which two noise levels are one."""


def same_level(sigma: float, other: float) -> bool:
    """Whether two noise levels are one, rounding apart."""
    return abs(sigma - other) <= SAME_LEVEL * max(sigma, other)


@dataclass(frozen=True)
class Evaluation:
    """One call of the upgraded model's guided denoiser.

    Attributes:
        sigma: its noise level, as in `trajectory`.
        step: the sampling step that it belongs to, from 0; samplers of second order make two evaluations of a step.
        progress: how much of the joint stage has gone, 0..1.
    """

    sigma: float
    step: int
    progress: float


@dataclass(frozen=True)
class GuidanceWindow:
    """The part of the joint stage in which the adapter acts, and how often the base runs.

    Attributes:
        start, end: fractions of the steps between which residuals are added; the base runs from the beginning to `end`.
        refresh_every: the base runs at every n-th step, and its features are used until the next.
    """

    start: float = 0.0
    end: float = 1.0
    refresh_every: int = 1

    @classmethod
    def from_settings(cls, settings: Settings) -> GuidanceWindow:
        """The window that a picture's settings describe."""
        return cls(settings.guidance_start, settings.guidance_end, settings.refresh_every)

    def acts(self, evaluation: Evaluation) -> bool:
        """Whether residuals are added."""
        return self.start <= evaluation.progress <= self.end

    def runs_base(self, evaluation: Evaluation) -> bool:
        """Whether the base is evaluated."""
        return evaluation.progress <= self.end and evaluation.step % self.refresh_every == 0

    def base_evaluations(self, evaluations: Iterable[Evaluation]) -> list[Evaluation]:
        """Those at which the base is evaluated, in their order."""
        return [evaluation for evaluation in evaluations if self.runs_base(evaluation)]


def distinct_levels(evaluations: Iterable[Evaluation]) -> list[Evaluation]:
    """The first at each noise level: samplers of second order end a step and begin the next at one level."""
    found: list[Evaluation] = []
    for evaluation in evaluations:
        if not found or not same_level(found[-1].sigma, evaluation.sigma):
            found.append(evaluation)
    return found


def nearest_level(levels: Sequence[float], sigma: float) -> int:
    """The place of the noise level that is nearest in log σ."""
    distances = [abs(math.log(max(level, 1e-8) / max(sigma, 1e-8))) for level in levels]
    return min(range(len(distances)), key=distances.__getitem__)
