"""The samplers by their WebUI names, each a scheduler of diffusers; and which steps of theirs are joint."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from torch import Tensor

from ..errors import WrongArgument

LARGEST_STRENGTH = 0.999
"""The WebUI's img2img never gets a denoising strength of 1 (modules/sd_samplers_common.py, setup_img2img_steps)."""


@dataclass(frozen=True)
class Sampler:
    """A row of the table.

    Attributes:
        name: the WebUI's name of the sampler.
        schedule_type: the WebUI's name of the noise levels it takes.
        scheduler: the class in diffusers.
        options: its options, apart from those of the model.
        order: 1 where a step looks at one evaluation, 2 where it looks at two.
        on_timesteps: whether it is one of those that the WebUI runs on timesteps instead of noise levels.
    """

    name: str
    schedule_type: str
    scheduler: str
    options: Mapping[str, Any] = field(default_factory=dict)
    order: int = 2
    on_timesteps: bool = False

    def make(self, model_config: Mapping[str, Any], **more: Any) -> Any:
        """The scheduler for a model, whose config gives ᾱ and the type of prediction."""
        scheduler = getattr(diffusers, self.scheduler)
        noise = {key: model_config[key] for key in MODEL_OPTIONS if key in model_config}
        wanted = {"timestep_spacing": "linspace", **noise, **self.options, **more}
        known = inspect.signature(scheduler).parameters
        return scheduler(**{key: value for key, value in wanted.items() if key in known})


MODEL_OPTIONS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "rescale_betas_zero_snr",
)
LEADING = {"timestep_spacing": "leading", "steps_offset": 1}
RELEASED_SPACING = LEADING | {"use_karras_sigmas": False, "use_exponential_sigmas": False}
DDIM = LEADING | {"set_alpha_to_one": False, "clip_sample": False}
DPM_SDE = {"algorithm_type": "sde-dpmsolver++", "use_exponential_sigmas": True}

SAMPLERS = {
    sampler.name: sampler
    for sampler in (
        Sampler("DPM++ 2M", "Karras", "DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
        Sampler("DPM++ 2M SDE", "Exponential", "DPMSolverMultistepScheduler", DPM_SDE),
        Sampler("Euler", "Automatic", "EulerDiscreteScheduler", order=1),
        Sampler("Euler a", "Automatic", "EulerAncestralDiscreteScheduler", order=1),
        Sampler("Heun", "Automatic", "HeunDiscreteScheduler"),
        Sampler("DPM2", "Karras", "KDPM2DiscreteScheduler", {"use_karras_sigmas": True}),
        Sampler("DPM2 a", "Karras", "KDPM2AncestralDiscreteScheduler", {"use_karras_sigmas": True}),
        Sampler("DDIM", "Automatic", "DDIMScheduler", DDIM, order=1, on_timesteps=True),
        Sampler("PLMS", "Automatic", "PNDMScheduler", LEADING | {"skip_prk_steps": True}, on_timesteps=True),
        Sampler("UniPC", "Automatic", "UniPCMultistepScheduler", LEADING, on_timesteps=True),
    )
}


def sampler_named(name: str) -> Sampler:
    """The sampler of a name, upper and lower case alike.

    Raises:
        WrongArgument: there is none.
    """
    for known, sampler in SAMPLERS.items():
        if known.lower() == name.lower():
            return sampler
    raise WrongArgument(f"'sampler' is '{name}', expected one of {', '.join(SAMPLERS)}.")


@dataclass(frozen=True)
class Steps:
    """The steps of a scheduler that are taken, first of them first.

    Attributes:
        scheduler: set to all its steps and begun at the first one taken.
        timesteps: one a model evaluation.
        noises: generators for samplers that add noise, one an image.
    """

    scheduler: Any
    timesteps: Tensor
    noises: Sequence[torch.Generator]

    def noised(self, clean: Tensor, noise: Tensor) -> Tensor:
        """Clean latents brought to the noise level of the first step."""
        return self.scheduler.add_noise(clean, noise, self.timesteps[:1].repeat(len(clean)))

    def scaled(self, latent: Tensor, timestep: Tensor) -> Tensor:
        """The latent as the UNet takes it."""
        return self.scheduler.scale_model_input(latent, timestep)

    def step(self, output: Tensor, timestep: Tensor, latent: Tensor) -> Tensor:
        """The latent after the step, from what the UNet gave."""
        noises = {"generator": list(self.noises)} if self._adds_noise else {}
        return self.scheduler.step(output, timestep, latent, return_dict=False, **noises)[0]

    @property
    def _adds_noise(self) -> bool:
        return "generator" in inspect.signature(self.scheduler.step).parameters


def take_steps(
    scheduler: Any, steps: int, taken: int, device: torch.device | str, noises: Sequence[torch.Generator] = ()
) -> Steps:
    """The last `taken` of all steps."""
    scheduler.set_timesteps(steps, device=device)
    begin = (steps - taken) * scheduler.order
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    return Steps(scheduler, scheduler.timesteps[begin:], noises)


def joint_steps(steps: int, switch_point: float, sampler: Sampler) -> int:
    """How many steps are joint, by the WebUI's img2img rule, so that a switch point means the same in both hosts."""
    strength = int(min(switch_point, LARGEST_STRENGTH) * steps)
    return max(strength, 1) if sampler.on_timesteps else strength + 1


def released_joint_steps(steps: int, switch_point: float, sampler: Sampler) -> int:
    """How many steps are joint in the released pipeline: diffusers' img2img rule (`get_timesteps`)."""
    return max(min(int(steps * switch_point), steps), 1)
