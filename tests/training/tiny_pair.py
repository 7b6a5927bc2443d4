"""A pair of UNets as small as UNets of SD1.5 and SDXL can be, for what takes many evaluations."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel

from tests.seeded import fill

TOKENS, BASE_WIDTH, UPGRADED_WIDTH, POOLED = 3, 8, 12, 8


def tiny_base() -> UNet2DConditionModel:
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16, 24, 24),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=BASE_WIDTH,
        attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    )
    return fill(unet, "tiny.base.")


def tiny_upgraded() -> UNet2DConditionModel:
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16, 24),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=UPGRADED_WIDTH,
        attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=POOLED + 24,
    )
    return fill(unet, "tiny.upgraded.")


def sizes(rows: int) -> torch.Tensor:
    return torch.tensor([[64.0, 64, 0, 0, 64, 64]] * rows)
