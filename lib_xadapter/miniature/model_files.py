"""The miniature models as a user's files: folders of diffusers and single files, in half precision."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from torch import Tensor

from ..headless.model_configs import NOISE
from ..headless.tokenizers import OPEN_CLIP_PADDING, load_tokenizer
from ..saving import write_whole
from .architectures import BaseText, UpgradedText
from .denoising import Denoiser

BASE, UPGRADED = "miniature-base", "miniature-upgraded"


def save_model(folder: Path, denoiser: Denoiser, vae: AutoencoderKL, tokenizer: Path) -> None:
    """Base or upgraded model, whichever text encoders the denoiser has.

    Args:
        folder: of the pipeline.
        denoiser: UNet and text encoders, which become half precision.
        vae: which does as well.
        tokenizer: a folder with the vocabulary.
    """
    parts = {"unet": denoiser.unet, "vae": vae, "scheduler": DDIMScheduler(**NOISE)}
    text, first = denoiser.text, load_tokenizer(tokenizer)
    if isinstance(text, UpgradedText):
        second = load_tokenizer(tokenizer, OPEN_CLIP_PADDING)
        encoders = {"text_encoder": text.first, "text_encoder_2": text.second}
        pipeline = StableDiffusionXLPipeline(
            **parts, **encoders, tokenizer=first, tokenizer_2=second, add_watermarker=False
        )
    else:
        assert isinstance(text, BaseText)
        pipeline = StableDiffusionPipeline(
            **parts,
            text_encoder=text.encoder,
            tokenizer=first,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipeline.to(torch.float16).save_pretrained(folder)


def save_half(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors as fp16 safetensors."""
    save(path, {name: value.half() for name, value in tensors.items()}, metadata)


def save(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors as safetensors, whole or not at all."""
    contiguous = {name: value.detach().contiguous() for name, value in tensors.items()}
    written = safetensors.torch.save(contiguous, metadata=dict(metadata or {}))
    write_whole(path, lambda to: to.write_bytes(written))
