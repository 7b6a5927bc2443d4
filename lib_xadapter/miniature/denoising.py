"""The losses that the UNets, their text encoders and their plugins are learned by: the error of the predicted noise.

SD1.5's noise schedule, weighted by Min-SNR, without which the few steps that there are go to the finest noise. The
base is told nothing by the empty prompt. SDXL is told nothing by zeros (as both hosts do where the negative prompt is
empty) or by the empty prompt (as X-Adapter's training does), so both occur.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from ..headless.model_configs import NOISE
from ..training.step import Diffusion
from .architectures import BaseText, Prompt, UpgradedText
from .drawing import UPGRADED_SIZE
from .latents import Bank, Rows
from .learning import Drawn, Loss
from .worlds import tokens_of

GAMMA = 5.0
"""Of Min-SNR."""
EMPTY_PROMPTS = 0.1
"""Share of rows with an empty prompt, of the base and of both kinds together of the upgraded model."""

Controls = Callable[[Rows], Tensor]
"""Rows → control maps (rows, 3, height, width), 0 to 1."""


@dataclass(frozen=True)
class Denoiser:
    """A UNet and its text encoders.

    Attributes:
        unet: as diffusers has it.
        text: tokens → prompt.
    """

    unet: UNet2DConditionModel
    text: BaseText | UpgradedText

    def parts(self) -> nn.ModuleDict:
        return nn.ModuleDict({"unet": self.unet, "text": self.text})


def diffusion() -> Diffusion:
    return Diffusion(DDIMScheduler(**NOISE).alphas_cumprod)


def denoising_loss(
    denoiser: Denoiser,
    bank: Bank,
    batch: int,
    features: Callable[[Tensor, Tensor, dict[str, Any], Rows], dict[str, Any]] | None = None,
) -> Loss:
    """The weighted error of the predicted noise.

    Args:
        denoiser: whose parameters get gradients where they want them.
        bank: of latents and captions.
        batch: rows a step.
        features: what a plugin adds to the UNet's arguments, from its inputs, its arguments and the rows.
    """
    noising = diffusion()

    def loss(drawn: Drawn) -> Tensor:
        rows = bank.rows(batch, drawn)
        timesteps = drawn.whole(len(noising.alphas_cumprod), batch)
        noise = drawn.normal(*rows.latents.shape)
        noised = noising.noised(rows.latents, noise, timesteps)
        conditions = arguments(denoiser, rows.tokens, drawn)
        if features is not None:
            conditions |= features(noised, timesteps, conditions, rows)
        predicted = denoiser.unet(noised, timesteps, **conditions, return_dict=False)[0]
        errors = (predicted - noising.target(rows.latents, noise, timesteps)).square().mean((1, 2, 3))
        return (noising.weights(timesteps, GAMMA) * errors).mean()

    return loss


def arguments(denoiser: Denoiser, tokens: Tensor, drawn: Drawn) -> dict[str, Any]:
    """A UNet's arguments for captions, some of which are left out."""
    rows = len(tokens)
    empty = drawn.chance(EMPTY_PROMPTS, rows)
    prompt = denoiser.text(torch.where(empty[:, None], tokens_of([""]), tokens))
    if prompt.pooled is None:
        return {"encoder_hidden_states": prompt.tokens}
    kept = (~(empty & drawn.chance(0.5, rows))).float()
    return upgraded_arguments(Prompt(kept[:, None, None] * prompt.tokens, kept[:, None] * prompt.pooled))


def upgraded_arguments(prompt: Prompt) -> dict[str, Any]:
    """The upgraded UNet's arguments for pictures of its own size."""
    size = float(UPGRADED_SIZE)
    sizes = torch.tensor([[size, size, 0.0, 0.0, size, size]]).repeat(len(prompt.tokens), 1)
    return {
        "encoder_hidden_states": prompt.tokens,
        "added_cond_kwargs": {"text_embeds": prompt.pooled, "time_ids": sizes},
    }


def by_controlnet(net: nn.Module, controls: Controls):
    """What a ControlNet adds."""

    def features(noised: Tensor, timesteps: Tensor, conditions: dict[str, Any], rows: Rows) -> dict[str, Any]:
        down, middle = net(noised, timesteps, controlnet_cond=controls(rows), **conditions, return_dict=False)
        return {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}

    return features


def by_t2i_adapter(adapter: nn.Module, controls: Controls):
    """What a T2I-Adapter adds."""

    def features(noised: Tensor, timesteps: Tensor, conditions: dict[str, Any], rows: Rows) -> dict[str, Any]:
        return {"down_intrablock_additional_residuals": adapter(controls(rows))}

    return features
