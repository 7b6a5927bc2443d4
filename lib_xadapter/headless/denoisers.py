"""The UNets with their inputs: prompts, classifier-free guidance (CFG) and ControlNets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..evaluations import Evaluation
from ..feature_sources import BaseStep
from ..rows import Row, batch_rows
from ..taps import FeatureReader
from .noise_schedule import NoiseSchedule


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


@dataclass(frozen=True)
class Control:
    """A ControlNet at work: its map (1, 3, height, width) with values 0..1, and how strongly it acts."""

    net: nn.Module
    image: Tensor
    scale: float = 1.0


class GuidedUnet:
    """A UNet with its prompts: one call for all conds and unconds, then CFG.

    Args:
        unet: of diffusers, base or upgraded.
        prompts: of each image.
        cfg_scale: uncond + cfg_scale · (cond − uncond).
        controls: ControlNets at work on it.
    """

    def __init__(self, unet: nn.Module, prompts: Prompts, cfg_scale: float, controls: Sequence[Control] = ()) -> None:
        self._unet = unet
        self._prompts = prompts
        self._cfg_scale = cfg_scale
        self._controls = tuple(controls)

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
            **self._control_residuals(rows, timestep, tokens),
        )[0].float()
        if self._prompts.uncond is None:
            return output
        cond, uncond = output.chunk(2)
        return uncond + self._cfg_scale * (cond - uncond)

    def _control_residuals(self, rows: Tensor, timestep: Tensor, tokens: Tensor) -> dict[str, object]:
        if not self._controls:
            return {}
        down, middle = zip(*(_lead(control, rows, timestep, tokens) for control in self._controls), strict=True)
        return {
            "down_block_additional_residuals": [sum(level) for level in zip(*down, strict=True)],
            "mid_block_additional_residual": sum(middle),
        }


def _lead(control: Control, rows: Tensor, timestep: Tensor, tokens: Tensor) -> tuple[list[Tensor], Tensor]:
    return control.net(
        rows,
        timestep,
        encoder_hidden_states=tokens,
        controlnet_cond=control.image.to(rows).expand(len(rows), -1, -1, -1),
        conditioning_scale=control.scale,
        return_dict=False,
    )


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
        if self._prediction_type == "v_prediction":
            denoised = (scaled - sigma * output) / math.sqrt(1 + sigma**2)
        else:
            denoised = latent - sigma * output
        return BaseStep(self._reader.take(), self._model.rows, denoised)
