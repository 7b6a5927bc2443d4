"""UNets of diffusers with their prompts and guidance, called without a pipeline."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lib_xadapter.evaluations import Evaluation
from lib_xadapter.feature_sources import BaseStep
from lib_xadapter.headless.noise_schedule import NoiseSchedule
from lib_xadapter.headless.schedulers import denoised_from
from lib_xadapter.rows import Row, batch_rows
from lib_xadapter.taps import FeatureReader


@dataclass(frozen=True)
class Prompts:
    """The prompts of each image: `cond` for the prompt, `uncond` for the negative prompt.

    Attributes:
        cond, uncond: (images, tokens, channels); `uncond` is None without CFG.
        pooled_cond, pooled_uncond: (images, channels), for SDXL.
        time_ids: (images, 6), for SDXL: original height and width, crop top and left, target height and width.
    """

    cond: Tensor
    uncond: Tensor | None = None
    pooled_cond: Tensor | None = None
    pooled_uncond: Tensor | None = None
    time_ids: Tensor | None = None

    @property
    def rows(self) -> tuple[Row, ...]:
        return batch_rows([1] * len(self.cond), with_uncond=self.uncond is not None)

    def tokens(self) -> Tensor:
        """(rows, tokens, channels), in the order of `rows`."""
        return self.cond if self.uncond is None else torch.cat([self.cond, self.uncond])

    def arguments(self) -> dict[str, Tensor]:
        """As a pipeline of diffusers takes them."""
        given = {
            "prompt_embeds": self.cond,
            "negative_prompt_embeds": self.uncond,
            "pooled_prompt_embeds": self.pooled_cond,
            "negative_pooled_prompt_embeds": self.pooled_uncond,
        }
        return {name: value for name, value in given.items() if value is not None}

    def added(self) -> dict[str, Tensor] | None:
        """What SDXL's UNet is given beside its tokens."""
        if self.pooled_cond is None or self.time_ids is None:
            return None
        if self.uncond is None:
            return {"text_embeds": self.pooled_cond, "time_ids": self.time_ids}
        pooled = torch.cat([self.pooled_cond, self.pooled_uncond])
        return {"text_embeds": pooled, "time_ids": torch.cat([self.time_ids, self.time_ids])}


class GuidedUnet:
    """A UNet with its prompts: one call for all conds and unconds, then CFG.

    Args:
        unet: of diffusers, base or upgraded.
        prompts: of each image.
        cfg_scale: uncond + cfg_scale · (cond − uncond).
    """

    def __init__(self, unet: nn.Module, prompts: Prompts, cfg_scale: float) -> None:
        self._unet = unet
        self._prompts = prompts
        self._cfg_scale = cfg_scale

    @property
    def rows(self) -> tuple[Row, ...]:
        return self._prompts.rows

    @torch.no_grad()
    def predict(self, latent: Tensor, timestep: float | Tensor) -> Tensor:
        """The guided prediction, of the type that the model was trained for, in float32.

        Args:
            latent: (images, 4, h, w), scaled as the UNet takes it.
            timestep: whole or not.
        """
        weight = next(self._unet.parameters())
        rows = latent.repeat(len(self.rows) // len(latent), 1, 1, 1).to(weight)
        tokens = self._prompts.tokens().to(weight)
        added = self._prompts.added()
        if not isinstance(timestep, Tensor) or timestep.device != rows.device:
            # diffusers would copy it to the GPU, and wait for that
            timestep = torch.full((), float(timestep), dtype=torch.float32, device=rows.device)
        output = self._unet(
            rows,
            timestep,
            encoder_hidden_states=tokens,
            added_cond_kwargs=added and {name: value.to(weight) for name, value in added.items()},
            return_dict=False,
        )[0].float()
        if self._prompts.uncond is None:
            return output
        cond, uncond = output.chunk(2)
        return uncond + self._cfg_scale * (cond - uncond)


class LockstepBase:
    """The base as the joint stage asks for it: latent and noise level in, denoised latent and features out.

    Args:
        model: the base's UNet with its prompts.
        schedule: its noise schedule.
        prediction_type: "epsilon" or "v_prediction".
        reader: collects its decoder features.
    """

    def __init__(self, model: GuidedUnet, schedule: NoiseSchedule, prediction_type: str, reader: FeatureReader) -> None:
        self._model = model
        self._schedule = schedule
        self._prediction_type = prediction_type
        self._reader = reader

    def __call__(self, latent: Tensor, evaluation: Evaluation) -> BaseStep:
        sigma = evaluation.sigma
        scaled = latent / math.sqrt(1 + sigma**2)
        self._reader.clear()
        output = self._model.predict(scaled, self._schedule.timestep_at(sigma))
        denoised = denoised_from(output, latent, sigma, self._prediction_type)
        return BaseStep(self._reader.take(), self._model.rows, denoised)
