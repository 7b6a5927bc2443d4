"""Which noise levels a sampler of the WebUI will ask for, known before it runs.

The levels of nearly every sampler depend on its schedule alone. A dry run with a model that predicts next to nothing
tells them, so that the base can run ahead, and the GPU need not be waited for to learn a level it was sent.
"""

from __future__ import annotations

import copy
import functools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import k_diffusion.sampling
import torch
from modules import rng, sd_samplers, sd_samplers_kdiffusion, sd_samplers_timesteps, shared
from modules.processing import StableDiffusionProcessing
from modules.sd_samplers_cfg_denoiser import CFGDenoiser
from modules.sd_samplers_timesteps import CFGDenoiserTimesteps
from torch import Tensor

from ...evaluations import Evaluation, same_level
from .samplings import Sampling, Start

logger = logging.getLogger(__name__)

ONE_PIXEL = (4, 1, 1)

Prediction = Callable[[Tensor], Tensor]


def planned_evaluations(p: StableDiffusionProcessing, sampling: Sampling) -> tuple[Evaluation, ...] | None:
    """The model evaluations of the joint stage.

    None where they depend on what the model predicts (DPM adaptive), and for another extension's sampler that wants
    more of the model than there is in a dry run.

    Args:
        p: the processing object, with its options.
        sampling: where SDXL starts, its sampler and its steps.
    """
    # two models that have nothing in common but their size
    models = (torch.zeros_like, lambda x: torch.sin(7 * x))
    try:
        one, other = (_dry_run(p, sampling, predict) for predict in models)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:
        logger.warning("%s cannot be run dry: %s: %s", sampling.sampler_name, type(error).__name__, error)
        return None
    alike = len(one) == len(other) and all(same_level(a.sigma, b.sigma) for a, b in zip(one, other, strict=True))
    return one if alike else None


def _dry_run(p: StableDiffusionProcessing, sampling: Sampling, predict: Prediction) -> tuple[Evaluation, ...]:
    """What the sampler asks of a model that is not there, for a picture of one latent pixel."""
    dry = copy.copy(p)
    dry.rng = rng.ImageRNG(ONE_PIXEL, [0])
    # the first noise of an image seeds torch's own generator
    dry.rng.is_first = False
    dry.all_seeds, dry.iteration, dry.batch_size = [0], 0, 1
    dry.denoising_strength, dry.extra_generation_params = sampling.denoising_strength, {}
    if sampling.is_hires:
        dry.is_hr_pass, dry.hr_scheduler = True, p.hr_scheduler or p.scheduler
    sampler = sd_samplers.create_sampler(sampling.sampler_name, p.sd_model)
    denoiser, found = sampler.model_wrap_cfg, []

    def forward(x: Tensor, sigma: Tensor, **_: Any) -> Tensor:
        found.append(evaluation_at(denoiser, noise_levels(denoiser, [sigma[:1]])[0]))
        denoiser.step += 1
        # CFG++ looks at the prediction without the prompt
        denoiser.last_noise_uncond = predict(x)
        return predict(x)

    denoiser.forward, sampler.callback_state = forward, lambda _: None
    sampler.func = _without_bar(sampler.func)
    latent = torch.zeros((1, *ONE_PIXEL), device=shared.device)
    with _nothing_left_behind():
        if sampling.start is Start.NOISE:
            sampler.sample(dry, latent, None, None)
        else:
            sampler.sample_img2img(dry, latent, latent, None, None, steps=sampling.fixed_steps)
    return tuple(found)


def _without_bar(sample: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(sample)
    def quiet(*args: Any, **kwargs: Any) -> Tensor:
        return sample(*args, **{**kwargs, "disable": True})

    return quiet


@contextmanager
def _nothing_left_behind() -> Iterator[None]:
    """A dry run moves neither the progress bar nor any random numbers, and calls no other extension."""
    state = shared.state
    with ExitStack() as scope:
        for owner, name in ((state, "sampling_step"), (state, "sampling_steps"), (k_diffusion.sampling, "torch")):
            scope.callback(setattr, owner, name, getattr(owner, name))
        for samplers in (sd_samplers_kdiffusion, sd_samplers_timesteps):
            scope.enter_context(patch.object(samplers, "extra_noise_callback", lambda _: None))
        yield


def evaluation_at(denoiser: CFGDenoiser, sigma: float) -> Evaluation:
    """Where the evaluation under way stands; samplers of second order make two of each step.

    An adaptive sampler can take more evaluations than it has steps.
    """
    total = max(denoiser.total_steps, 1)
    return Evaluation(sigma, denoiser.step * denoiser.steps // total, min(denoiser.step / total, 1.0))


def noise_levels(denoiser: CFGDenoiser, asked: Sequence[Tensor]) -> list[float]:
    """σ of what a sampler asked for: a σ already, or a timestep where it counts in those. Waits for the GPU.

    Args:
        denoiser: the sampler's.
        asked: (1,) each, one an evaluation.
    """
    values = torch.cat(list(asked)).tolist() if asked else []
    if not isinstance(denoiser, CFGDenoiserTimesteps):
        return values
    return [timestep_to_sigma(timestep, denoiser.alphas) for timestep in values]


def timestep_to_sigma(timestep: float, alphas_cumprod: Tensor) -> float:
    """σ = √((1 − ᾱ) / ᾱ) at a timestep, log σ linear between two of them (UniPC asks for fractions)."""
    place = min(max(timestep, 0.0), len(alphas_cumprod) - 1.0)
    low = math.floor(place)
    high = min(low + 1, len(alphas_cumprod) - 1)
    sigmas = [math.sqrt((1 - alpha) / alpha) for alpha in alphas_cumprod[[low, high]].double().tolist()]
    return sigmas[0] ** (1 - place + low) * sigmas[1] ** (place - low)
