"""Which noise levels a sampler of the WebUI will ask for, known before it runs.

The levels of nearly every sampler depend on its schedule alone. A rehearsal with a model that predicts next to nothing
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

import k_diffusion.sampling
import torch
from modules import rng, sd_samplers, shared
from modules.processing import StableDiffusionProcessingTxt2Img
from modules.sd_samplers_cfg_denoiser import CFGDenoiser
from modules.sd_samplers_timesteps import CFGDenoiserTimesteps
from torch import Tensor

from ..joint_stage import Moment
from ..trajectory import same_level

logger = logging.getLogger(__name__)

EXTRA_NOISE = "img2img_extra_noise"
ONE_PIXEL = (4, 1, 1)

Prediction = Callable[[Tensor], Tensor]


def planned_moments(p: StableDiffusionProcessingTxt2Img, switch_point: float | None) -> tuple[Moment, ...] | None:
    """The model evaluations of the joint stage.

    None where they depend on what the model predicts (DPM adaptive), and for another extension's sampler that wants
    more of the model than there is in a rehearsal.

    Args:
        p: the processing object, with its sampler's name, steps and options.
        switch_point: where SDXL starts over a picture, None where it starts from noise.
    """
    # two models that have nothing in common but their size
    models = (torch.zeros_like, lambda x: torch.sin(7 * x))
    try:
        one, other = (_rehearsed(p, switch_point, predict) for predict in models)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:
        logger.warning("%s cannot be rehearsed: %s: %s", p.sampler_name, type(error).__name__, error)
        return None
    alike = len(one) == len(other) and all(same_level(a.sigma, b.sigma) for a, b in zip(one, other, strict=True))
    return one if alike else None


def _rehearsed(
    p: StableDiffusionProcessingTxt2Img, switch_point: float | None, predict: Prediction
) -> tuple[Moment, ...]:
    """What the sampler asks of a model that is not there, for a picture of one latent pixel."""
    understudy = copy.copy(p)
    understudy.rng = rng.ImageRNG(ONE_PIXEL, [0])
    # the first noise of an image seeds torch's own generator
    understudy.rng.is_first = False
    understudy.all_seeds, understudy.iteration, understudy.batch_size = [0], 0, 1
    understudy.denoising_strength, understudy.extra_generation_params = switch_point, {}
    sampler = sd_samplers.create_sampler(p.sampler_name, p.sd_model)
    denoiser, found = sampler.model_wrap_cfg, []

    def forward(x: Tensor, sigma: Tensor, **_: Any) -> Tensor:
        found.append(moment(denoiser, noise_levels(denoiser, [sigma[:1]])[0]))
        denoiser.step += 1
        # CFG++ looks at the prediction without the prompt
        denoiser.last_noise_uncond = predict(x)
        return predict(x)

    denoiser.forward, sampler.callback_state = forward, lambda _: None
    sampler.func = _without_bar(sampler.func)
    latent = torch.zeros((1, *ONE_PIXEL), device=shared.device)
    with _nothing_left_behind():
        if switch_point is None:
            sampler.sample(understudy, latent, None, None)
        else:
            sampler.sample_img2img(understudy, latent, latent, None, None)
    return tuple(found)


def _without_bar(sample: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(sample)
    def quiet(*args: Any, **kwargs: Any) -> Tensor:
        return sample(*args, **{**kwargs, "disable": True})

    return quiet


@contextmanager
def _nothing_left_behind() -> Iterator[None]:
    """A rehearsal moves neither the progress bar nor any random numbers, and calls no other extension."""
    state, options = shared.state, shared.opts.data
    with ExitStack() as scope:
        for owner, name in ((state, "sampling_step"), (state, "sampling_steps"), (k_diffusion.sampling, "torch")):
            scope.callback(setattr, owner, name, getattr(owner, name))
        if EXTRA_NOISE in options:
            scope.callback(options.__setitem__, EXTRA_NOISE, options[EXTRA_NOISE])
            options[EXTRA_NOISE] = 0
        yield


def moment(denoiser: CFGDenoiser, sigma: float) -> Moment:
    """Where the evaluation under way stands; samplers of second order make two of each step.

    An adaptive sampler can take more evaluations than it has steps.
    """
    total = max(denoiser.total_steps, 1)
    return Moment(sigma, denoiser.step * denoiser.steps // total, min(denoiser.step / total, 1.0))


def noise_levels(denoiser: CFGDenoiser, asked: Sequence[Tensor]) -> list[float]:
    """σ of what a sampler asked for: a σ already, or a timestep where it counts in those. Waits for the GPU.

    Args:
        denoiser: the sampler's.
        asked: (1,) each, one an evaluation.
    """
    told = torch.cat(list(asked)).tolist() if asked else []
    if not isinstance(denoiser, CFGDenoiserTimesteps):
        return told
    return [timestep_to_sigma(timestep, denoiser.alphas) for timestep in told]


def timestep_to_sigma(timestep: float, alphas_cumprod: Tensor) -> float:
    """σ = √((1 − ᾱ) / ᾱ) at a timestep, log σ linear between two of them (UniPC asks for fractions)."""
    place = min(max(timestep, 0.0), len(alphas_cumprod) - 1.0)
    low = math.floor(place)
    high = min(low + 1, len(alphas_cumprod) - 1)
    sigmas = [math.sqrt((1 - alpha) / alpha) for alpha in alphas_cumprod[[low, high]].double().tolist()]
    return sigmas[0] ** (1 - place + low) * sigmas[1] ** (place - low)


def first_that_differs(planned: Sequence[Moment], asked: Sequence[float]) -> int | None:
    """The place of the first noise level that was asked for and not planned; None where all were."""
    for place, (expected, sigma) in enumerate(zip(planned, asked, strict=False)):
        if not same_level(expected.sigma, sigma):
            return place
    return None
