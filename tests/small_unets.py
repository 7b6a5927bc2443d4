"""The small diffusers UNets that the golden figures were made with (tests/golden)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tests.seeded import fill, seeded


@dataclass(frozen=True)
class JointInputs:
    """Latents of one golden joint step; the upgraded model's are twice the base's size."""

    size: str

    @property
    def base(self) -> Tensor:
        return seeded(f"joint.{self.size}.base", (2, 4, 8, 8 if self.size == "square" else 16))

    @property
    def upgraded(self) -> Tensor:
        height, width = self.base.shape[-2:]
        return seeded(f"joint.{self.size}.upgraded", (2, 4, 2 * height, 2 * width))


def base_unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64, 128, 128),
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=48,
        attention_head_dim=4,
    )
    return fill(unet, "base.unet.")


def upgraded_unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64, 128),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=80,
        attention_head_dim=(2, 4, 8),
        transformer_layers_per_block=(1, 1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=136,
    )
    return fill(unet, "upgraded.unet.")


def call_base(unet: nn.Module, latent: Tensor, timestep: int = 700) -> Tensor:
    prompt = seeded("joint.base.prompt", (2, 77, 48))[: len(latent)]
    return unet(latent, timestep, encoder_hidden_states=prompt).sample


def call_upgraded(unet: nn.Module, latent: Tensor, timestep: int = 700) -> Tensor:
    conditions = {
        "text_embeds": seeded("joint.upgraded.pooled", (2, 40)),
        "time_ids": torch.tensor([[256.0, 256, 0, 0, 256, 256]] * 2),
    }
    prompt = seeded("joint.upgraded.prompt", (2, 77, 80))
    return unet(latent, timestep, encoder_hidden_states=prompt, added_cond_kwargs=conditions).sample
