"""A pair of models as folders of diffusers, as small as can be, and pictures for them."""

from __future__ import annotations

from pathlib import Path

import numpy
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from lib_xadapter.headless.model_configs import NOISE
from tests.seeded import fill
from tests.small_models import LETTERS

from .tiny_pair import BASE_WIDTH, POOLED, tiny_base, tiny_upgraded

SECOND_WIDTH = 4
"""Of the upgraded model's second text encoder; the first is as wide as the base's."""


def tiny_vae(name: str) -> AutoencoderKL:
    vae = AutoencoderKL(
        block_out_channels=(4,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
    )
    fill(vae, name)
    # a random encoder's posterior is wide: let it be narrow
    vae.quant_conv.weight[4:] = 0
    vae.quant_conv.bias[4:] = -6
    return vae


def tiny_encoder(kind: type, width: int, name: str) -> nn.Module:
    config = CLIPTextConfig(
        vocab_size=len(LETTERS),
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=2,
        num_attention_heads=1,
        projection_dim=POOLED,
        bos_token_id=len(LETTERS) - 2,
        eos_token_id=len(LETTERS) - 1,
        pad_token_id=len(LETTERS) - 1,
    )
    return fill(kind(config), name)


def tiny_tokenizer() -> CLIPTokenizer:
    end = "<|endoftext|>"
    return CLIPTokenizer(vocab=LETTERS, merges=[], model_max_length=77, pad_token=end)


def save_base(folder: Path, **scheduler: object) -> Path:
    StableDiffusionPipeline(
        vae=tiny_vae("tiny.base.vae."),
        text_encoder=tiny_encoder(CLIPTextModel, BASE_WIDTH, "tiny.base.text."),
        tokenizer=tiny_tokenizer(),
        unet=tiny_base(),
        scheduler=DDIMScheduler(**NOISE, **scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def save_upgraded(folder: Path, **scheduler: object) -> Path:
    StableDiffusionXLPipeline(
        vae=tiny_vae("tiny.upgraded.vae."),
        text_encoder=tiny_encoder(CLIPTextModel, BASE_WIDTH, "tiny.upgraded.text."),
        text_encoder_2=tiny_encoder(CLIPTextModelWithProjection, SECOND_WIDTH, "tiny.upgraded.text_2."),
        tokenizer=tiny_tokenizer(),
        tokenizer_2=tiny_tokenizer(),
        unet=tiny_upgraded(),
        scheduler=DDIMScheduler(**NOISE, **scheduler),
        add_watermarker=False,
    ).save_pretrained(folder)
    return folder


def save_pictures(folder: Path, count: int) -> Path:
    """Blots of colour of several sizes, each with a caption."""
    folder.mkdir(parents=True)
    draw = numpy.random.default_rng(0)
    for number in range(count):
        blots = draw.integers(0, 256, (3, 3, 3), dtype=numpy.uint8)
        picture = Image.fromarray(blots).resize((64 + number % 4 * 8, 64 + number % 3 * 8), Image.Resampling.BICUBIC)
        picture.save(folder / f"{number:03d}.png")
        (folder / f"{number:03d}.txt").write_text(f"blot {number}", encoding="utf-8")
    return folder
