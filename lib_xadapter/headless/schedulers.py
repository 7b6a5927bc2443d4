"""What stands in a pipeline's place of a scheduler for one call, so that its own loop samples as it is asked to."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from ..evaluations import Evaluation
from ..feature_sources import BaseStep
from ..rows import Row, batch_rows
from ..taps import FeatureReader
from .mask_blending import MaskBlending
from .noise_schedule import NoiseSchedule
from .paused_call import PausedCall
from .samplers import Steps


@contextmanager
def scheduled(pipeline: Any, scheduler: Any) -> Iterator[None]:
    """While open, the pipeline samples by this scheduler."""
    attributes = vars(pipeline)
    own = attributes["scheduler"]
    # past the pipeline's own way to set a part, which would write into its config
    attributes["scheduler"] = scheduler
    try:
        yield
    finally:
        attributes["scheduler"] = own


class GivenSteps:
    """A scheduler whose steps are chosen, and whose first latent is at their noise level already.

    Args:
        steps: those taken.
        dtype: what the UNet takes.
        precise: keep latents in float32 between the steps, whatever the UNet takes.
        blending: for inpainting.
        channels: more channels for the UNet's input, (images, channels, h, w), for inpainting models.
        each_step: called with the place of the evaluation and the latents behind it.
    """

    order = 1
    init_noise_sigma = 1.0

    def __init__(
        self,
        steps: Steps,
        dtype: torch.dtype,
        precise: bool = False,
        blending: MaskBlending | None = None,
        channels: Tensor | None = None,
        each_step: Callable[[int, Tensor], None] = lambda place, latent: None,
    ) -> None:
        self.timesteps = steps.timesteps
        self.config = steps.scheduler.config
        self._steps = steps
        self._dtype = dtype
        self._precise = precise
        self._blending = blending
        self._channels = channels
        self._each_step = each_step
        self.place = 0

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """They are given."""

    def scale_model_input(self, sample: Tensor, timestep: Tensor) -> Tensor:
        scaled = self._steps.scaled(sample, timestep)
        if self._blending is not None:
            scaled = self._blending.seen(scaled)
        return with_channels(scaled.to(self._dtype), self._channels)

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor,
        sample: Tensor,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        output = model_output.float() if self._precise else model_output
        if self._blending is not None:
            output = self._blending.predicted(output, self._steps.scaled(sample, timestep), timestep)
        latent = self._steps.step(output, timestep, sample, generator, eta=eta)
        if self._blending is not None:
            latent = self._blending.stepped(latent, self._steps, self.place)
        self._each_step(self.place, latent)
        self.place += 1
        return _stepped_to(latent, return_dict)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return self._steps.scheduler.add_noise(original_samples, noise, timesteps)


Question = tuple[Tensor, Evaluation]


class FollowedLevels:
    """A scheduler of the base in the joint stage: it goes where it is asked to, and answers with what it found there.

    Args:
        paused: the call, which asks.
        first: the first question.
        levels: noise levels of the evaluations, in their order.
        schedule: the base's noise schedule.
        prediction_type: "epsilon", "v_prediction" or "sample".
        reader: collects the base's decoder features.
        config: of the scheduler that stood here.
        device: of the pipeline.
        dtype: what the UNet takes.
        channels: as in `GivenSteps`.
        blending: a picture that stays where a mask is black.
    """

    order = 1
    init_noise_sigma = 1.0

    def __init__(
        self,
        paused: PausedCall[Question, BaseStep],
        first: Question,
        levels: Sequence[float],
        schedule: NoiseSchedule,
        prediction_type: str,
        reader: FeatureReader,
        config: Any,
        device: torch.device | str,
        dtype: torch.dtype,
        channels: Tensor | None = None,
        blending: MaskBlending | None = None,
    ) -> None:
        self.config = config
        kind = torch.float32 if torch.device(device).type == "mps" else torch.float64
        self.timesteps = torch.tensor([schedule.timestep_at(sigma) for sigma in levels], dtype=kind, device=device)
        self._paused = paused
        self._latent, self._evaluation = first
        self._prediction_type = prediction_type
        self._reader = reader
        self._dtype = dtype
        self._channels = channels
        self._blending = blending

    @property
    def evaluation(self) -> Evaluation:
        """The one under way."""
        return self._evaluation

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """They are given."""

    def scale_model_input(self, sample: Tensor, timestep: Tensor) -> Tensor:
        self._reader.clear()
        copies = len(sample) // len(self._latent)
        scaled = (self._latent / math.sqrt(1 + self._evaluation.sigma**2)).repeat(copies, 1, 1, 1)
        return with_channels(scaled.to(self._dtype), self._channels)

    def step(
        self, model_output: Tensor, timestep: Tensor, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor]:
        denoised = denoised_from(model_output.float(), self._latent, self._evaluation.sigma, self._prediction_type)
        if self._blending is not None:
            denoised = self._blending.over(denoised)
        features = self._reader.take()
        rows = guidance_rows(len(features.levels[0]), len(self._latent))
        self._latent, self._evaluation = self._paused.answer(BaseStep(features, rows, denoised))
        return _stepped_to(self._latent, return_dict)


def _stepped_to(latent: Tensor, return_dict: bool) -> SchedulerOutput | tuple[Tensor]:
    return SchedulerOutput(prev_sample=latent) if return_dict else (latent,)


def with_channels(sample: Tensor, channels: Tensor | None) -> Tensor:
    """The UNet's input with more channels, the same for all copies of an image."""
    if channels is None:
        return sample
    return torch.cat([sample, channels.to(sample).repeat(len(sample) // len(channels), 1, 1, 1)], dim=1)


def denoised_from(output: Tensor, latent: Tensor, sigma: float, prediction_type: str) -> Tensor:
    """The clean latent that a model's output says, from a latent x₀ + σ·ε."""
    if prediction_type == "v_prediction":
        root = math.sqrt(1 + sigma**2)
        return (latent / root - sigma * output) / root
    return output if prediction_type == "sample" else latent - sigma * output


def guidance_rows(rows: int, images: int) -> tuple[Row, ...]:
    """The rows of diffusers' batches: the unconds, then a cond for each image, then whatever other guidance adds."""
    if rows == images:
        return batch_rows([1] * images, with_uncond=False)
    conds = [Row(image, cond) for cond in range(rows // images - 1) for image in range(images)]
    return (*(Row(image, None) for image in range(images)), *conds)
