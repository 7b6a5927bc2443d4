"""What inpainting keeps of a picture, by the rule of diffusers and by those of the WebUI."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .noise_schedule import NoiseSchedule
from .samplers import Steps


@dataclass(frozen=True)
class MaskBlending:
    """Blends a given picture into the latent where a mask is black; this one at the end alone.

    Attributes:
        clean: latents of the picture, (images, 4, h, w).
        mask: 1 where something new is painted, (images or 1, 1, h, w).
    """

    clean: Tensor
    mask: Tensor

    def over(self, latent: Tensor) -> Tensor:
        """A clean latent with the picture where it is kept; rows are the images, as often as they come."""
        copies = len(latent) // len(self.clean)
        clean, mask = self.clean.repeat(copies, 1, 1, 1), self.mask.expand(len(self.clean), -1, -1, -1)
        return _blended(clean, latent, mask.repeat(copies, 1, 1, 1))

    def seen(self, sample: Tensor) -> Tensor:
        """What the UNet is given of a latent that is scaled for it."""
        return sample

    def predicted(self, output: Tensor, scaled: Tensor, timestep: Tensor) -> Tensor:
        """What the scheduler is given of a UNet's guided output for such a latent."""
        return output

    def stepped(self, latent: Tensor, steps: Steps, place: int) -> Tensor:
        """The latent after the step of a place."""
        return self.over(latent) if _is_last(steps, place) else latent


@dataclass(frozen=True)
class BlendNoised(MaskBlending):
    """Put back after each step, noised to its level: the rule of diffusers' inpainting pipelines.

    Attributes:
        noise: of the picture at every level.
    """

    noise: Tensor

    def stepped(self, latent: Tensor, steps: Steps, place: int) -> Tensor:
        proper = self.clean
        if not _is_last(steps, place):
            proper = steps.scheduler.add_noise(proper, self.noise, torch.tensor([steps.timesteps[place + 1]]))
        return _blended(proper, latent, self.mask)


@dataclass(frozen=True)
class BlendPrediction(MaskBlending):
    """Predicted by the model: the rule of the WebUI's samplers on noise levels.

    Source: `sd_samplers_cfg_denoiser.py`, `apply_blend` on the denoised latent.

    Attributes:
        schedule: the model's noise levels.
        prediction_type: what its UNet predicts.
    """

    schedule: NoiseSchedule
    prediction_type: str

    def predicted(self, output: Tensor, scaled: Tensor, timestep: Tensor) -> Tensor:
        sigma = self.schedule.sigma_at(float(timestep))
        alpha = 1 / math.sqrt(1 + sigma**2)
        noise = (scaled - alpha * self.clean) / (sigma * alpha)
        proper = {
            "epsilon": noise,
            "v_prediction": alpha * (noise - sigma * self.clean),
            "sample": self.clean,
        }[self.prediction_type]
        return _blended(proper, output, self.mask)


@dataclass(frozen=True)
class BlendBeforeUNet(MaskBlending):
    """Shown to the model as it is, and put back at the end: the rule of the WebUI's samplers on timesteps.

    Source: `sd_samplers_cfg_denoiser.py`, `mask_before_denoising`.
    """

    def seen(self, sample: Tensor) -> Tensor:
        return self.over(sample)


def _blended(kept: Tensor, latent: Tensor, mask: Tensor) -> Tensor:
    return (1 - mask) * kept + mask * latent


def _is_last(steps: Steps, place: int) -> bool:
    return place == len(steps.timesteps) - 1
