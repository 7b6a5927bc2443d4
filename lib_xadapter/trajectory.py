"""The base's latent in the joint stage: it follows the noise levels that the upgraded model's sampler asks for.

Latents and noise levels are those of k-diffusion: x = x₀ + σ·ε, σ = √((1 − ᾱ) / ᾱ), whatever the sampler calls its own.
The solver is DPM-Solver++(2M) (Lu et al., arXiv 2211.01095, Algorithm 2) in λ = −log σ; of first order it is DDIM.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .evaluations import SAME_LEVEL

SHORTEST_HISTORY = 0.1
"""An earlier point nearer than this fraction of the step tells no slope: it would be magnified by its inverse."""


@dataclass(frozen=True)
class Point:
    """A noise level that the base has been evaluated at: latent and denoised latent, (images, 4, h, w)."""

    sigma: float
    latent: Tensor
    denoised: Tensor


class Trajectory:
    """One deterministic path from the noised start down to any level that is asked for.

    The path is the same however the sampler walks it: a level between two others is solved for from the one above, and
    a sampler that rises (Restart, churn, a rejected step of DPM adaptive) finds the base where it was at that level.

    Args:
        noise: (images, 4, h, w), standard normal.
        clean: the base's finished latent, (images, 4, h, w), or None to start from noise alone.
        order: 2, or 1 for DDIM.
    """

    def __init__(self, noise: Tensor, clean: Tensor | None = None, order: int = 2) -> None:
        self._noise = noise
        self._clean = clean
        self._order = order
        self._points: list[Point] = []

    def latent_at(self, sigma: float) -> Tensor:
        """The base's latent at a noise level, (images, 4, h, w), from the points at and above it."""
        above = [point for point in self._points if point.sigma >= sigma * (1 - SAME_LEVEL)]
        if not above:
            return self._start(sigma)
        last = above[-1]
        if last.sigma <= sigma * (1 + SAME_LEVEL):
            return last.latent
        return _step(above, sigma, self._order)

    def add(self, point: Point) -> None:
        """Take note of an evaluation of the base; what was known at its noise level and below is forgotten."""
        self._points = [other for other in self._points if other.sigma > point.sigma * (1 + SAME_LEVEL)]
        self._points.append(point)

    def _start(self, sigma: float) -> Tensor:
        noised = sigma * self._noise
        return noised if self._clean is None else self._clean + noised


def _step(points: Sequence[Point], sigma: float, order: int) -> Tensor:
    """The latent at a level below the last point."""
    last = points[-1]
    if sigma == 0:
        return last.denoised
    ratio = sigma / last.sigma
    denoised = _extrapolated(points, sigma) if order == 2 else last.denoised
    return ratio * last.latent + (1 - ratio) * denoised


def _extrapolated(points: Sequence[Point], sigma: float) -> Tensor:
    """The denoised latent half a step on, from the last two points; the last one where there is no other."""
    last = points[-1]
    step = math.log(last.sigma / sigma)
    for earlier in reversed(points[:-1]):
        history = math.log(earlier.sigma / last.sigma)
        if history >= SHORTEST_HISTORY * step:
            slope = step / (2 * history)
            return (1 + slope) * last.denoised - slope * earlier.denoised
    return last.denoised
