"""What inpainting models are told besides the latent: a mask and the picture outside of it, in five more channels."""

from __future__ import annotations

from typing import Any

import numpy
import torch
from PIL import Image
from torch import Tensor

from .pictures import Painted, to_tensor

LATENT_CHANNELS = 4
PIXELS = 8
"""Of a latent pixel."""


@torch.no_grad()
def inpainting_channels(
    pipeline: Any, painted: Painted | None, images: int, size: tuple[int, int], device: torch.device | str
) -> Tensor | None:
    """(images, 5, h, w): the mask, and the latent of the picture with grey in its place; None for other models.

    Where no picture is given, or no mask, all of it is painted: that is what the WebUI tells its inpainting models in
    text-to-image and image-to-image.

    Args:
        pipeline: its VAE is on the device.
        painted: the picture that is painted over.
        images: at once.
        size: (width, height) of the model's picture.
        device: where it runs.
    """
    if pipeline.unet.config.in_channels == LATENT_CHANNELS:
        return None
    width, height = size
    mask = torch.ones(1, 1, height, width)
    pixels = torch.zeros(1, 3, height, width)
    if painted is not None and painted.mask is not None:
        mask = _pixel_mask(painted, size)
        given = torch.cat([to_tensor(_sized(picture, size)) for picture in painted.pictures(images)])
        pixels = (2 * given - 1) * (1 - mask)
    vae = pipeline.vae
    # one after the other, as pictures are encoded elsewhere
    latents = [vae.encode(one[None].to(device, vae.dtype)).latent_dist.mode().float() for one in pixels]
    masked_latents = vae.config.scaling_factor * torch.cat(latents)
    small = mask[:, :, ::PIXELS, ::PIXELS].to(device).expand(len(masked_latents), -1, -1, -1)
    return torch.cat([small, masked_latents], dim=1).expand(images, -1, -1, -1)


def _pixel_mask(painted: Painted, size: tuple[int, int]) -> Tensor:
    """(1, 1, height, width), 1 where something new is painted."""
    grey = numpy.asarray(_sized(painted.mask_picture(), size).convert("L"), dtype=numpy.float32)
    return torch.from_numpy(grey / 255).round()[None, None]


def _sized(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    return picture if picture.size == size else picture.resize(size, Image.Resampling.LANCZOS)
