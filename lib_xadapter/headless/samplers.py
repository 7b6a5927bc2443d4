"""Which steps of a scheduler are taken: by the WebUI's rule, the released pipeline's, or diffusers' own."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor

from ..errors import DoesNotFit
from .noise_schedule import NoiseSchedule, trained_alphas
from .sampler_table import DEFAULT_SAMPLER, RELEASED_SPACING, sampler_named

LARGEST_STRENGTH = 0.999
"""The WebUI's img2img never gets a denoising strength of 1 (modules/sd_samplers_common.py, setup_img2img_steps)."""


@dataclass(frozen=True)
class Steps:
    """The steps of a scheduler that are taken, first of them first.

    Attributes:
        scheduler: set to all its steps and begun at the first one taken.
        timesteps: one a model evaluation.
        start: (1,), the timestep whose noise level a picture is brought to.
        noise_scale: what noise alone is multiplied by where there is no picture.
        noises: generators for samplers that add noise, one an image.
    """

    scheduler: Any
    timesteps: Tensor
    start: Tensor
    noise_scale: float
    noises: Sequence[torch.Generator] = ()

    def noised(self, clean: Tensor, noise: Tensor) -> Tensor:
        """Clean latents brought to the noise level of the first step."""
        return self.scheduler.add_noise(clean, noise, self.start.repeat(len(clean)))

    def from_noise(self, noise: Tensor) -> Tensor:
        """What the first step starts from where there is no picture."""
        return noise * self.noise_scale

    def scaled(self, latent: Tensor, timestep: Tensor) -> Tensor:
        """The latent as the UNet takes it."""
        return self.scheduler.scale_model_input(latent, timestep)

    def step(self, output: Tensor, timestep: Tensor, latent: Tensor, generator: Any = None, **more: Any) -> Tensor:
        """The latent after the step, from what the UNet gave; `generator` draws where there are no `noises`."""
        known = inspect.signature(self.scheduler.step).parameters
        given = {"generator": list(self.noises) or generator, **more}
        taken = {name: value for name, value in given.items() if name in known}
        return self.scheduler.step(output, timestep, latent, return_dict=False, **taken)[0]


StepRule = Callable[["str | None", Any, int, "float | None", "str | torch.device"], Steps]
"""(sampler, the pipeline's scheduler, all steps, denoising strength, device) → the steps taken; strength None: all."""


def diffusers_steps(
    sampler: str | None, scheduler: Any, steps: int, strength: float | None, device: str | torch.device
) -> Steps:
    """As diffusers' own pipelines take them, by a copy of the pipeline's own scheduler; one step at least.

    Source: diffusers, `StableDiffusionXLImg2ImgPipeline.get_timesteps`.

    Raises:
        DoesNotFit: the other model cannot follow this scheduler.
    """
    check_scheduler(scheduler)
    own = copy.deepcopy(scheduler)
    own.set_timesteps(steps, device=device)
    taken = steps if strength is None else max(min(int(steps * strength), steps), 1)
    begin = (steps - taken) * own.order
    timesteps = own.timesteps[begin:]
    if strength is not None and hasattr(own, "set_begin_index"):
        own.set_begin_index(begin)
    return Steps(own, timesteps, timesteps[:1], float(own.init_noise_sigma))


def check_scheduler(scheduler: Any) -> None:
    """Whether the other model can follow the noise levels of a scheduler.

    Raises:
        DoesNotFit: naming the scheduler and why it cannot.
    """
    config, kind = scheduler.config, type(scheduler).__name__
    reason = None
    if "Inverse" in kind:
        reason = "it goes from pictures to noise"
    elif config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction":
        reason = "its noise levels are those of flow matching, which SD1.5 and SDXL were not trained for"
    elif not hasattr(scheduler, "alphas_cumprod"):
        reason = "it has no noise level for each timestep of training, as SD1.5 and SDXL have"
    elif not torch.allclose(scheduler.alphas_cumprod.cpu().float(), trained_alphas(config), atol=1e-6):
        reason = "its noise levels are those of other models"
    elif not all(hasattr(scheduler, name) for name in ("add_noise", "init_noise_sigma", "scale_model_input")):
        reason = "it brings no picture to a noise level"
    elif not LATENT_STEP.issuperset(_required(scheduler.step)):
        reason = f"each of its steps needs {', '.join(sorted(_required(scheduler.step) - LATENT_STEP))}"
    if reason is not None:
        raise DoesNotFit(f"{kind} cannot be followed: {reason}.")


LATENT_STEP = {"model_output", "timestep", "sample"}


def _required(function: Callable[..., Any]) -> set[str]:
    parameters = inspect.signature(function).parameters.values()
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {given.name for given in parameters if given.default is given.empty and given.kind not in kinds}


def webui_steps(
    sampler: str | None, scheduler: Any, steps: int, strength: float | None, device: str | torch.device
) -> Steps:
    """As the WebUI's txt2img tab takes them, or its img2img tab where there is a strength.

    Source: modules/sd_samplers_common.py, `setup_img2img_steps`; modules/sd_samplers_kdiffusion.py.
    """
    row = sampler_named(sampler or DEFAULT_SAMPLER)
    scheduler = row.make(scheduler.config)
    scheduler.set_timesteps(steps, device=device)
    reached = None if strength is None else int(min(strength, LARGEST_STRENGTH) * steps)
    if not hasattr(scheduler, "set_begin_index"):
        return _webui_ladder(scheduler, steps, reached)
    left_out = 0
    if reached is not None:
        left_out = steps - (max(reached, 1) if row.on_timesteps else reached + 1)
    timesteps = _begun(scheduler, _unrounded(scheduler), left_out)
    return Steps(scheduler, timesteps, timesteps[:1], _webui_noise_scale(scheduler))


def _webui_ladder(scheduler: Any, steps: int, reached: int | None) -> Steps:
    """The steps of DDIM and PLMS, which find the next timestep by themselves.

    The WebUI's ladder of timesteps begins at 1 and can have one rung more than there are steps. A picture is noised to
    the rung that the strength reaches, the model is first evaluated one rung below, and the lowest rung is where
    sampling ends (modules/sd_samplers_timesteps.py, sd_samplers_timesteps_impl.py). Here there is one evaluation at
    least.
    """
    trained = scheduler.config.num_train_timesteps
    ladder = torch.arange(1, trained + 1, trained // steps).clamp(max=trained - 1)
    rungs = len(ladder) if reached is None else max(reached, 2)
    start = ladder[rungs : rungs + 1] if rungs < len(ladder) else ladder[-1:]
    descent = ladder[:rungs].flip(0)
    evaluated = _paired(scheduler, descent)[:-1] if len(descent) > 1 else descent
    return Steps(scheduler, evaluated.to(scheduler.timesteps.device), start, scheduler.init_noise_sigma)


def _unrounded(scheduler: Any) -> Tensor:
    """The timesteps of a scheduler's noise levels, where it rounds those that it gives the model."""
    levels = scheduler.sigmas
    if isinstance(scheduler, (diffusers.KDPM2DiscreteScheduler, diffusers.KDPM2AncestralDiscreteScheduler)):
        # every second evaluation is between two levels
        between = scheduler.sigmas_interpol.to(levels)
        if isinstance(scheduler, diffusers.KDPM2AncestralDiscreteScheduler):
            between = between.roll(1)
        levels = levels.clone()
        levels[1::2] = between[1::2]
    elif not isinstance(scheduler, diffusers.DPMSolverMultistepScheduler):
        return scheduler.timesteps
    schedule = NoiseSchedule(scheduler.alphas_cumprod)
    timesteps = [schedule.timestep_at(float(sigma)) for sigma in levels[: len(scheduler.timesteps)]]
    return torch.tensor(timesteps, device=scheduler.timesteps.device)


def _webui_noise_scale(scheduler: Any) -> float:
    """σ of the first step; where latents are kept as the UNet takes them, as they are with that σ."""
    if not isinstance(scheduler, diffusers.DPMSolverMultistepScheduler):
        return scheduler.init_noise_sigma
    sigma = float(scheduler.sigmas[0])
    return sigma / math.sqrt(1 + sigma**2)


def released_steps(
    sampler: str | None, scheduler: Any, steps: int, strength: float | None, device: str | torch.device
) -> Steps:
    """As the released pipeline takes them: by the rule of diffusers' img2img (`get_timesteps`)."""
    scheduler = sampler_named(sampler or DEFAULT_SAMPLER).make(scheduler.config, **RELEASED_SPACING)
    scheduler.set_timesteps(steps, device=device)
    taken = steps if strength is None else max(min(int(steps * strength), steps), 1)
    if hasattr(scheduler, "set_begin_index"):
        timesteps = _begun(scheduler, scheduler.timesteps, steps - taken)
    else:
        timesteps = _paired(scheduler, scheduler.timesteps.unique().flip(0)[steps - taken :])
    return Steps(scheduler, timesteps, timesteps[:1], scheduler.init_noise_sigma)


def _begun(scheduler: Any, timesteps: Tensor, left_out: int) -> Tensor:
    begin = left_out * scheduler.order
    if isinstance(scheduler, diffusers.LMSDiscreteScheduler):
        # it takes the steps before its first for a history, which is not there
        scheduler.sigmas, scheduler.timesteps = scheduler.sigmas[begin:], scheduler.timesteps[begin:]
        begin, timesteps = 0, timesteps[begin:]
    scheduler.set_begin_index(begin)
    return timesteps[begin:]


def _paired(scheduler: Any, descent: Tensor) -> Tensor:
    """PLMS evaluates its second timestep twice, wherever it begins."""
    if not isinstance(scheduler, diffusers.PNDMScheduler):
        return descent
    return torch.cat([descent[:2], descent[1:]])
