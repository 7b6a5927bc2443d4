"""One model evaluation of the joint stage: base step → features → mapping layers → residuals → rows.

Source: paper, "Inference strategy"; released code, `pipeline/pipeline_sd_xl_adapter_controlnet.py`, its second loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .mapping import MappingLayers
from .rows import Row, match_rows
from .taps import BaseFeatures, Fusion, add_residuals, addition
from .trajectory import Trajectory


@dataclass(frozen=True)
class BaseStep:
    """What one evaluation of the base gives.

    Attributes:
        denoised: the base's guided prediction of its clean latent, (images, 4, h, w).
        features: decoder features of all its rows.
        rows: which image and prompt each of those rows belongs to.
    """

    denoised: Tensor
    features: BaseFeatures
    rows: tuple[Row, ...]


BaseDenoiser = Callable[[Tensor, float], BaseStep]
"""(latent, sigma) → BaseStep: the host's way to evaluate its base, with its prompts, guidance and plugins."""


@dataclass(frozen=True)
class Window:
    """The part of the joint stage in which the adapter acts, as fractions of its steps."""

    start: float = 0.0
    end: float = 1.0

    def holds(self, progress: float) -> bool:
        return self.start <= progress <= self.end


class JointStage:
    """Runs the base beside the upgraded model and hands each of its rows a residual.

    A host calls `advance` before each model evaluation, `select` before each UNet call in it, and keeps
    `coupled_to(unet)` open around its sampler.

    Args:
        base: evaluates the base.
        trajectory: where the base's latent is.
        adapter: the mapping layers.
        weights: weight of each level's residual.
        window: when the adapter acts.
        fuse: how a residual enters a feature.
    """

    def __init__(
        self,
        base: BaseDenoiser,
        trajectory: Trajectory,
        adapter: MappingLayers,
        weights: Sequence[float],
        window: Window | None = None,
        fuse: Fusion = addition,
    ) -> None:
        self._base = base
        self._trajectory = trajectory
        self._adapter = adapter
        self._weights = tuple(weights)
        self._window = window or Window()
        self._fuse = fuse
        self._residuals: tuple[Tensor | None, ...] = ()
        self._rows: slice | None = None

    @contextmanager
    def coupled_to(self, upgraded_unet: nn.Module) -> Iterator[None]:
        """While open, the upgraded UNet gets the residuals of the rows that were selected."""
        try:
            with add_residuals(upgraded_unet, self._residual, self._weights, self._fuse):
                yield
        finally:
            self._residuals, self._rows = (), None

    @torch.no_grad()
    def advance(self, sigma: float, progress: float, upgraded_rows: Sequence[Row]) -> None:
        """Bring the base to the noise level of the coming model evaluation and map its features.

        Args:
            sigma: the noise level that the upgraded model is asked for, as in `trajectory`.
            progress: how much of the joint stage has gone, 0..1.
            upgraded_rows: the rows of the upgraded model's batch, in its order.
        """
        self._residuals, self._rows = (), None
        if progress > self._window.end:
            return
        latent = self._trajectory.latent_at(sigma)
        step = self._base(latent, sigma)
        self._trajectory.evaluated(sigma, latent, step.denoised)
        if self._window.holds(progress):
            sources = match_rows(upgraded_rows, step.rows)
            self._residuals = tuple(self._map(level, step.features, sources) for level in range(len(self._weights)))

    def select(self, rows: slice | None) -> None:
        """The rows of the upgraded batch that the next UNet call holds; None for a call that gets no residuals."""
        self._rows = rows

    def _residual(self, level: int) -> Tensor | None:
        if self._rows is None or not self._residuals:
            return None
        mapped = self._residuals[level]
        return None if mapped is None else mapped[self._rows]

    def _map(self, level: int, features: BaseFeatures, sources: Sequence[tuple[int, ...]]) -> Tensor | None:
        if not self._weights[level]:
            return None
        weight = next(self._adapter.parameters())
        feature = features.levels[level].to(weight)
        mapped = self._adapter.map_level(level, feature, features.time_embedding.to(weight))
        return _gather(mapped, sources)


def _gather(mapped: Tensor, sources: Sequence[tuple[int, ...]]) -> Tensor:
    if all(places == (row,) for row, places in enumerate(sources)) and len(sources) == len(mapped):
        return mapped
    return torch.stack([mapped[list(places)].mean(0) for places in sources])
