"""Timesteps and noise levels of a diffusion model: σ = √((1 − ᾱ) / ᾱ), as in `lib_xadapter.trajectory`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy
from diffusers import DDIMScheduler
from torch import Tensor

SMALLEST_ALPHA = 5e-8
"""ᾱ of a zero-terminal-SNR model's last timestep, which would be σ = ∞."""

OF_THE_MODEL = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
)
"""In a scheduler's config, what comes from the model's training."""


def trained_alphas(config: Mapping[str, Any]) -> Tensor:
    """ᾱ of every training timestep of a model, from the config of whatever scheduler it has."""
    return DDIMScheduler(**{name: config[name] for name in OF_THE_MODEL if name in config}).alphas_cumprod


class NoiseSchedule:
    """The way between a model's timesteps and noise levels, interpolated in log σ.

    Args:
        alphas_cumprod: ᾱ of every training timestep, as diffusers' schedulers hold it.
    """

    def __init__(self, alphas_cumprod: Tensor) -> None:
        alphas = numpy.maximum(alphas_cumprod.double().cpu().numpy(), SMALLEST_ALPHA)
        self._log_sigmas = 0.5 * numpy.log((1 - alphas) / alphas)
        self._timesteps = numpy.arange(len(alphas))

    def sigma_at(self, timestep: float) -> float:
        return float(numpy.exp(numpy.interp(timestep, self._timesteps, self._log_sigmas)))

    def timestep_at(self, sigma: float) -> float:
        return float(numpy.interp(numpy.log(sigma), self._log_sigmas, self._timesteps))
