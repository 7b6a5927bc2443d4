"""SD1.5, SDXL and mapping layers at their full size with random weights: nothing is fetched, and time is the same."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor

from lib_xadapter.headless.model_configs import NOISE, SIZE_EMBEDDING
from lib_xadapter.headless.models import Models, Placement
from lib_xadapter.headless.pipeline import Noise, NoisePerImage, Request
from lib_xadapter.settings import Settings, half
from tests import small_models
from tests.guided_unets import Prompts

from .random_adapter import filled, random_adapter

LATENT_PIXEL = 8
TOKENS = 77
GUIDANCE = 7.0

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


def _unet_alone(kind: type, unet: UNet2DConditionModel) -> Any:
    """A pipeline with what a joint stage between latents needs of it, and nothing else."""
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
    if kind is StableDiffusionXLPipeline:
        parts |= {**dict.fromkeys(("text_encoder_2", "tokenizer_2")), "add_watermarker": False}
    else:
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipeline = kind(**parts, unet=unet, scheduler=DDIMScheduler(**NOISE))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def random_models(dtype: torch.dtype, placement: Placement, small: bool = False) -> Models:
    """UNets and mapping layers on the CPU; on "meta", where they are to be there.

    Args:
        dtype: of all weights.
        placement: where they will run.
        small: at a tenth of their width.
    """
    with torch.device("meta"):
        base = small_models.base_unet() if small else UNet2DConditionModel(**SD15)
        upgraded = small_models.upgraded_unet() if small else UNet2DConditionModel(**SDXL)
    device = "meta" if placement.device == "meta" else "cpu"
    return Models(
        _unet_alone(StableDiffusionPipeline, filled(base, dtype, device)),
        _unet_alone(StableDiffusionXLPipeline, filled(upgraded, dtype, device)),
        random_adapter(dtype, small, device),
        placement=placement,
    )


def random_prompts(models: Models, size: tuple[int, int], seed: int = 0, images: int = 1) -> tuple[Prompts, Prompts]:
    """Of the base and the upgraded model, for one picture of a size (width, height) in pixels."""
    (width, height), device = size, models.placement.device
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, models.upgraded.unet.dtype)

    base, upgraded = models.base.unet.config, models.upgraded.unet.config
    pooled = upgraded.projection_class_embeddings_input_dim - 6 * upgraded.addition_time_embed_dim
    return (
        Prompts(noise(images, TOKENS, base.cross_attention_dim), noise(images, TOKENS, base.cross_attention_dim)),
        Prompts(
            noise(images, TOKENS, upgraded.cross_attention_dim),
            noise(images, TOKENS, upgraded.cross_attention_dim),
            noise(images, pooled),
            noise(images, pooled),
            torch.tensor([[height, width, 0, 0, height, width]] * images, device=device),
        ),
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
    (width, height), (base_width, base_height) = size, map(half, size)
    base, upgraded = random_prompts(models, size, seed, images)
    sizes = latent_size(base_width, base_height), latent_size(width, height)
    return Request(
        base={**base.arguments(), "guidance_scale": GUIDANCE, "width": base_width, "height": base_height},
        upgraded={**upgraded.arguments(), "guidance_scale": GUIDANCE, "width": width, "height": height},
        settings=settings,
        steps=steps,
        noise=NoisePerImage([Noise.seeded(seed + image, seed + image, *sizes) for image in range(images)]),
        images=images,
        size=size,
        base_size=(base_width, base_height),
        sampler=sampler,
    )


def latent_size(width: int, height: int) -> tuple[int, int]:
    """Height and width in latent pixels."""
    return height // LATENT_PIXEL, width // LATENT_PIXEL
