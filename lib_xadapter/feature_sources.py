"""Where the joint stage gets the base's features from: the base run in lockstep, or a recording of it.

The base never depends on the upgraded model, so what its decoder gives at a noise level is the same whether it runs
beside the upgraded model or before it. Source: paper, "Inference strategy".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from .evaluations import Evaluation, same_level
from .rows import Row
from .taps import BaseFeatures
from .trajectory import Point, Trajectory


@dataclass(frozen=True)
class RowFeatures:
    """The base's decoder features at one noise level, and which image and prompt each of their rows belongs to."""

    features: BaseFeatures
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class BaseStep(RowFeatures):
    """What one evaluation of the base gives.

    Attributes:
        denoised: the base's guided prediction of its clean latent, (images, 4, h, w).
    """

    denoised: Tensor


BaseDenoiser = Callable[[Tensor, Evaluation], BaseStep]
"""(latent, evaluation) → BaseStep: the host's way to evaluate its base, with its prompts, guidance and plugins."""


class FeatureSource(Protocol):
    """Gives the base's features at the evaluations of the joint stage, in their order."""

    def at(self, evaluation: Evaluation) -> RowFeatures:
        """The features at an evaluation's noise level."""


class Lockstep:
    """The base brought to each noise level and evaluated there.

    Args:
        base: evaluates the base.
        trajectory: where the base's latent is.
    """

    def __init__(self, base: BaseDenoiser, trajectory: Trajectory) -> None:
        self._base = base
        self._trajectory = trajectory

    def at(self, evaluation: Evaluation) -> BaseStep:
        latent = self._trajectory.latent_at(evaluation.sigma)
        step = self._base(latent, evaluation)
        self._trajectory.add(Point(evaluation.sigma, latent, step.denoised))
        return step


class OncePerLevel:
    """A source whose features are used again where two evaluations follow each other at one noise level.

    Samplers of second order end a step and begin the next at one level.

    Args:
        source: is asked once.
    """

    def __init__(self, source: FeatureSource) -> None:
        self._source = source
        self._latest: tuple[float, RowFeatures] | None = None

    def at(self, evaluation: Evaluation) -> RowFeatures:
        if self._latest is None or not same_level(self._latest[0], evaluation.sigma):
            self._latest = (evaluation.sigma, self._source.at(evaluation))
        return self._latest[1]
