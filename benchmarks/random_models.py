"""SD1.5, SDXL and mapping layers at their full size with random weights: nothing is fetched, and time is the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor

from lib_xadapter.headless import small_models
from lib_xadapter.headless.denoisers import Prompts
from lib_xadapter.headless.model_configs import NOISE, SIZE_EMBEDDING
from lib_xadapter.headless.models import Models, Placement
from lib_xadapter.headless.pipeline import Noise, Request
from lib_xadapter.settings import Settings, half

from .random_adapter import filled, random_adapter

LATENT_PIXEL = 8
TOKENS = 77

# unet/config.json of runwayml/stable-diffusion-v1-5 and stabilityai/stable-diffusion-xl-base-1.0, as far as they differ
# from diffusers' defaults
SD15: Mapping[str, Any] = MappingProxyType({"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8})
SDXL: Mapping[str, Any] = MappingProxyType(
    {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": SIZE_EMBEDDING,
        "projection_class_embeddings_input_dim": 2816,
    }
)


@dataclass(frozen=True)
class UnetOnly:
    """What of a pipeline a joint stage between latents needs."""

    unet: UNet2DConditionModel
    scheduler: DDIMScheduler
    vae: None = None


def random_models(dtype: torch.dtype, placement: Placement, small: bool = False) -> Models:
    """UNets and mapping layers on the CPU.

    Args:
        dtype: of all weights.
        placement: where they will run.
        small: at a tenth of their width.
    """
    with torch.device("meta"):
        base = small_models.base_unet() if small else UNet2DConditionModel(**SD15)
        upgraded = small_models.upgraded_unet() if small else UNet2DConditionModel(**SDXL)
    return Models(
        UnetOnly(filled(base, dtype), DDIMScheduler(**NOISE)),
        UnetOnly(filled(upgraded, dtype), DDIMScheduler(**NOISE)),
        random_adapter(dtype, small),
        placement=placement,
    )


def random_request(
    models: Models,
    size: tuple[int, int],
    settings: Settings,
    steps: int,
    sampler: str = "Euler",
    seed: int = 0,
    images: int = 1,
) -> Request:
    """A batch of pictures with classifier-free guidance, their prompts random.

    Args:
        models: those that are asked.
        size: width and height of the picture in pixels.
    """
    (width, height), device = size, models.placement.device
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    base, upgraded = models.base.unet.config, models.upgraded.unet.config
    pooled = upgraded.projection_class_embeddings_input_dim - 6 * upgraded.addition_time_embed_dim
    return Request(
        Prompts(noise(images, TOKENS, base.cross_attention_dim), noise(images, TOKENS, base.cross_attention_dim)),
        Prompts(
            noise(images, TOKENS, upgraded.cross_attention_dim),
            noise(images, TOKENS, upgraded.cross_attention_dim),
            noise(images, pooled),
            noise(images, pooled),
            torch.tensor([[height, width, 0, 0, height, width]] * images, device=device),
        ),
        settings,
        steps,
        7.0,
        sampler,
        [
            Noise.seeded(seed + image, seed + image, latent_size(half(width), half(height)), latent_size(width, height))
            for image in range(images)
        ],
    )


def latent_size(width: int, height: int) -> tuple[int, int]:
    """Height and width in latent pixels."""
    return height // LATENT_PIXEL, width // LATENT_PIXEL
