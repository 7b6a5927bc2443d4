"""The models in miniature: SD1.5's and SDXL's own topologies, narrow enough to be learned on a CPU.

Each group of a GroupNorm needs several channels: alone, a channel loses its mean over the picture, and no colour comes
through. ldm and sgm norm in 32 groups, which these models are too narrow for, so for the WebUI each channel is written
several times, and groups have to fall where they were: all widths of a UNet are the same, as its decoder reads two
levels at once. At 64 pixels the base's latents are 8 x 8, so its four levels go down to 1 x 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, ControlNetModel, T2IAdapter, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from ..headless.model_configs import SCALING_FACTORS, SIZE_EMBEDDING
from .vocabulary import LENGTH, numbers

BASE_CHANNELS = (48, 48, 48, 48)
BASE_HEADS = 4
UPGRADED_CHANNELS = (48, 48, 48)
HEAD_WIDTH = 16
"""Of the upgraded model's attention."""
GROUPS = 16
"""Of both UNets' norms."""
VAE_CHANNELS = (16, 32, 48, 48)
VAE_GROUPS = 4
TEXT_WIDTH = 64
TEXT_LAYERS = 2
FACTOR = 8


def vae(family: str) -> AutoencoderKL:
    """A VAE of family "sd1" or "sdxl", which differ in the factor of their latents."""
    return AutoencoderKL(
        block_out_channels=VAE_CHANNELS,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=VAE_GROUPS,
        scaling_factor=SCALING_FACTORS[family],
    )


def base_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        block_out_channels=BASE_CHANNELS,
        norm_num_groups=GROUPS,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=BASE_HEADS,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    )


def upgraded_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        block_out_channels=UPGRADED_CHANNELS,
        norm_num_groups=GROUPS,
        cross_attention_dim=2 * TEXT_WIDTH,
        attention_head_dim=tuple(width // HEAD_WIDTH for width in UPGRADED_CHANNELS),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=SIZE_EMBEDDING,
        projection_class_embeddings_input_dim=TEXT_WIDTH + 6 * SIZE_EMBEDDING,
    )


def controlnet(unet: UNet2DConditionModel) -> ControlNetModel:
    """A ControlNet of the base that begins as its UNet's encoder."""
    return ControlNetModel.from_unet(unet)


def upgraded_controlnet(unet: UNet2DConditionModel) -> ControlNetModel:
    """One of the upgraded model without attention, as SDXL's "small" ones are, which begins as its encoder."""
    net = ControlNetModel(
        block_out_channels=UPGRADED_CHANNELS,
        norm_num_groups=GROUPS,
        down_block_types=("DownBlock2D",) * 3,
        mid_block_type="UNetMidBlock2D",
        cross_attention_dim=None,
        addition_embed_type="text_time",
        addition_time_embed_dim=SIZE_EMBEDDING,
        projection_class_embeddings_input_dim=TEXT_WIDTH + 6 * SIZE_EMBEDDING,
    )
    there = unet.state_dict()
    net.load_state_dict({name: there[name] for name in net.state_dict() if name in there}, strict=False)
    return net


def t2i_adapter() -> T2IAdapter:
    return T2IAdapter(3, list(BASE_CHANNELS), num_res_blocks=1, downscale_factor=FACTOR, adapter_type="full_adapter")


def base_text() -> CLIPTextModel:
    return CLIPTextModel(_text_config("quick_gelu"))


def second_text() -> CLIPTextModelWithProjection:
    """SDXL's second text encoder."""
    return CLIPTextModelWithProjection(_text_config("gelu"))


def _text_config(activation: str) -> CLIPTextConfig:
    size = len(numbers())
    return CLIPTextConfig(
        vocab_size=size,
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        num_hidden_layers=TEXT_LAYERS,
        num_attention_heads=1,
        max_position_embeddings=LENGTH,
        hidden_act=activation,
        projection_dim=TEXT_WIDTH,
        bos_token_id=size - 2,
        eos_token_id=size - 1,
        pad_token_id=size - 1,
    )


@dataclass(frozen=True)
class Prompt:
    """What a UNet is told.

    Attributes:
        tokens: (rows, 77, width).
        pooled: (rows, 64) for the upgraded model, None for the base.
    """

    tokens: Tensor
    pooled: Tensor | None = None


class BaseText(nn.Module):
    """The base's text encoder, its last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = base_text()

    def forward(self, tokens: Tensor) -> Prompt:
        """Tokens (rows, 77), filled up with the end."""
        return Prompt(self.encoder(tokens).last_hidden_state)


class UpgradedText(nn.Module):
    """Both text encoders of SDXL, their last layers but one; the second pools."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = base_text(), second_text()

    def forward(self, tokens: Tensor) -> Prompt:
        """Tokens (rows, 77), filled up with the end; the second encoder gets token 0 there."""
        first = self.first(tokens, output_hidden_states=True).hidden_states[-2]
        second = self.second(_filled_with_zero(tokens), output_hidden_states=True)
        return Prompt(torch.cat([first, second.hidden_states[-2]], -1), second.text_embeds)


def _filled_with_zero(tokens: Tensor) -> Tensor:
    ends = tokens == len(numbers()) - 1
    return tokens.masked_fill(ends & (ends.cumsum(-1) > 1), 0)
