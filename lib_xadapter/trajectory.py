"""The base's latent in the joint stage: it follows the noise levels that the upgraded model's sampler asks for.

Latents and noise levels are those of k-diffusion: x = x₀ + σ·ε, σ = √((1 − ᾱ) / ᾱ), whatever the sampler calls its own.
The solver is DPM-Solver++(2M) (Lu et al., arXiv 2211.01095, Algorithm 2) in λ = −log σ; of first order it is DDIM.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

SAME_LEVEL = 1e-6
"""Relative difference under which two noise levels are one."""

SHORTEST_HISTORY = 0.1
"""An earlier point nearer than this fraction of the step tells no slope: it would be magnified by its inverse."""


def same_level(sigma: float, other: float) -> bool:
    """Whether two noise levels are one, rounding apart."""
    return abs(sigma - other) <= SAME_LEVEL * max(sigma, other)


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
        """The base's latent at a noise level, (images, 4, h, w); what was known below that level is forgotten."""
        while self._points and self._points[-1].sigma < sigma * (1 - SAME_LEVEL):
            self._points.pop()
        if not self._points:
            return self._start(sigma)
        last = self._points[-1]
        if last.sigma <= sigma * (1 + SAME_LEVEL):
            return last.latent
        return self._step(last, sigma)

    def evaluated(self, sigma: float, latent: Tensor, denoised: Tensor) -> None:
        """Take note of what the base predicts at the level it was just brought to."""
        if self._points and self._points[-1].sigma <= sigma * (1 + SAME_LEVEL):
            self._points.pop()
        self._points.append(Point(sigma, latent, denoised))

    def _start(self, sigma: float) -> Tensor:
        noised = sigma * self._noise
        return noised if self._clean is None else self._clean + noised

    def _step(self, last: Point, sigma: float) -> Tensor:
        if sigma == 0:
            return last.denoised
        ratio = sigma / last.sigma
        return ratio * last.latent + (1 - ratio) * self._extrapolated(last, sigma)

    def _extrapolated(self, last: Point, sigma: float) -> Tensor:
        """The denoised latent half a step on, from the last two points; the last one where there is no other."""
        step = math.log(last.sigma / sigma)
        for earlier in reversed(self._points[:-1]):
            history = math.log(earlier.sigma / last.sigma)
            if self._order == 2 and history >= SHORTEST_HISTORY * step:
                slope = step / (2 * history)
                return (1 + slope) * last.denoised - slope * earlier.denoised
        return last.denoised
