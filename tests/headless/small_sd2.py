"""A small SD2 checkpoint with seeded random weights, beside those of `tests.small_models`."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModelWithProjection

from lib_xadapter.headless.compvis_layout import SD2_TEXT_PREFIX, VAE_PREFIX, open_clip_origin, write_compvis
from tests import small_models


def sd2_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        block_out_channels=small_models.BASE_CHANNELS,
        cross_attention_dim=small_models.TEXT_WIDTH,
        attention_head_dim=(1, 1, 2, 2),
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        use_linear_projection=True,
    )


def sd2_text_encoder() -> CLIPTextModelWithProjection:
    """With the last layer, that is in the file and is not used."""
    config = small_models.text_config("gelu")
    config.num_hidden_layers = 3
    return small_models.seeded(CLIPTextModelWithProjection(config), "sd2.text", gain=1.5)


def sd2_weights(base: Path) -> dict[str, Tensor]:
    """All tensors of the checkpoint, with the VAE of an SD1.5 one."""
    vae = {key: value for key, value in safetensors.torch.load_file(base).items() if key.startswith(VAE_PREFIX)}
    text = {key: value for key, value in sd2_text_encoder().state_dict().items() if value.dtype.is_floating_point}
    return {
        **vae,
        **small_models.unet_tensors(small_models.seeded(sd2_unet(), "sd2.unet")),
        **write_compvis(text, SD2_TEXT_PREFIX, open_clip_origin),
    }


def saved(weights: dict[str, Tensor], path: Path) -> Path:
    safetensors.torch.save_file({key: value.contiguous() for key, value in weights.items()}, path)
    return path
