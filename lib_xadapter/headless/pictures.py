"""Between latents and 8-bit pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor


@torch.no_grad()
def to_pictures(vae: AutoencoderKL, latents: Tensor, to_whole: Callable[[Tensor], Tensor]) -> list[Image.Image]:
    """Pictures of finished latents (images, 4, h, w), decoded one after the other.

    Args:
        to_whole: how values of 0..255 become whole ones.
    """
    return [_to_picture(_decoded(vae, latent), to_whole) for latent in latents]


@torch.no_grad()
def to_latents(vae: AutoencoderKL, pictures: Sequence[Image.Image], generators: Sequence[torch.Generator]) -> Tensor:
    """Clean latents (images, 4, h, w) of pictures of one size, each drawn from its posterior by its own generator."""
    return torch.cat(
        [_encoded(vae, picture, generator) for picture, generator in zip(pictures, generators, strict=True)]
    )


def to_tensor(picture: Image.Image) -> Tensor:
    """(1, 3, height, width) with values 0..1."""
    pixels = numpy.array(picture.convert("RGB"), dtype=numpy.float32) / 255
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]


def _decoded(vae: AutoencoderKL, latent: Tensor) -> Tensor:
    return vae.decode((latent[None] / vae.config.scaling_factor).to(vae.dtype), return_dict=False)[0][0]


def _encoded(vae: AutoencoderKL, picture: Image.Image, generator: torch.Generator) -> Tensor:
    pixels = (2 * to_tensor(picture) - 1).to(vae.device, vae.dtype)
    return vae.config.scaling_factor * vae.encode(pixels).latent_dist.sample(generator).float()


def _to_picture(image: Tensor, to_whole: Callable[[Tensor], Tensor]) -> Image.Image:
    pixels = to_whole((image.float() / 2 + 0.5).clamp(0, 1) * 255).byte()
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())
