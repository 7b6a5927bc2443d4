"""The samplers by their WebUI names, each a scheduler of diffusers."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import WrongArgument

DEFAULT_SAMPLER = "DPM++ 2M"


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
        leaves_out_lowest: whether it goes from the lowest but one of its noise levels to none.
    """

    name: str
    schedule_type: str
    scheduler: str
    options: Mapping[str, Any] = field(default_factory=dict)
    order: int = 2
    on_timesteps: bool = False
    leaves_out_lowest: bool = False

    def make(self, model_config: Mapping[str, Any], **more: Any) -> Any:
        """The scheduler for a model, whose config gives ᾱ and the type of prediction."""
        # the table is read before anything heavy is imported
        import diffusers

        scheduler = getattr(diffusers, self.scheduler)
        if self.leaves_out_lowest:
            from .karras_levels import without_lowest

            scheduler = without_lowest(scheduler)
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
KARRAS = {"use_karras_sigmas": True}
DPM_SDE = {"algorithm_type": "sde-dpmsolver++", "use_exponential_sigmas": True}

SAMPLERS = {
    sampler.name: sampler
    for sampler in (
        Sampler("DPM++ 2M", "Karras", "DPMSolverMultistepScheduler", KARRAS),
        Sampler("DPM++ 2M SDE", "Exponential", "DPMSolverMultistepScheduler", DPM_SDE),
        Sampler("Euler", "Automatic", "EulerDiscreteScheduler", order=1),
        Sampler("Euler a", "Automatic", "EulerAncestralDiscreteScheduler", order=1),
        Sampler("LMS", "Automatic", "LMSDiscreteScheduler"),
        Sampler("Heun", "Automatic", "HeunDiscreteScheduler"),
        Sampler("DPM2", "Karras", "KDPM2DiscreteScheduler", KARRAS, leaves_out_lowest=True),
        Sampler("DPM2 a", "Karras", "KDPM2AncestralDiscreteScheduler", KARRAS, leaves_out_lowest=True),
        Sampler("DDIM", "Automatic", "DDIMScheduler", DDIM, order=1, on_timesteps=True),
        Sampler("PLMS", "Automatic", "PNDMScheduler", LEADING | {"skip_prk_steps": True}, on_timesteps=True),
        Sampler("UniPC", "Automatic", "UniPCMultistepScheduler", LEADING, on_timesteps=True),
    )
}
"""UniPC takes other noise levels than in the WebUI, and DPM++ 2M SDE draws its noise otherwise; the rest finish with
the WebUI's latents."""


def sampler_named(name: str) -> Sampler:
    """The sampler of a name, upper and lower case alike.

    Raises:
        WrongArgument: there is none.
    """
    for known, sampler in SAMPLERS.items():
        if known.lower() == name.lower():
            return sampler
    raise WrongArgument(f"'sampler' is '{name}', expected one of {', '.join(SAMPLERS)}.")


def evaluations_a_step(name: str) -> int:
    """Model evaluations that a step of a sampler makes."""
    return 2 if sampler_named(name).scheduler in TWO_EVALUATIONS else 1


TWO_EVALUATIONS = ("HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler")
