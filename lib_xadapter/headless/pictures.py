"""Between latents and 8-bit pictures."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from diffusers import (
    AutoencoderKL,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
)
from PIL import Image
from torch import Tensor

from .job import LATENT_PIXEL

Generators = list[torch.Generator] | torch.Generator | None


@dataclass(frozen=True)
class Painted:
    """A picture that takes the place of stage 1's, and how much of it is painted anew.

    Attributes:
        image: as diffusers' pipelines take one: a PIL image, an array, a tensor, or a list of those.
        strength: as theirs, 0 to 1.
        mask: white where something new is painted; None for everywhere.
    """

    image: Any
    strength: float
    mask: Any = None

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the picture, the first where there are several."""
        return _as_pictures(self.image)[0].size

    def pictures(self, images: int) -> list[Image.Image]:
        """In 8 bits, one an image of the batch."""
        return as_pictures(self.image, images)

    def mask_picture(self) -> Image.Image:
        """The mask in 8 bits, the first where there are several."""
        return _as_pictures(self.mask)[0].convert("L")

    def latent_mask(self, size: tuple[int, int], images: int) -> Tensor:
        """(images, 1, h, w), 1 where something new is painted; `size` is (width, height) of the picture.

        By the WebUI's rule: `processing.py`, `StableDiffusionProcessingImg2Img.init`.
        """
        small = (size[0] // LATENT_PIXEL, size[1] // LATENT_PIXEL)
        masks = []
        for picture in _as_pictures(self.mask):
            resized = picture.convert("L").resize(size, Image.Resampling.LANCZOS)
            grey = numpy.array(resized.resize(small, Image.Resampling.BICUBIC), dtype=numpy.float32)
            masks.append(torch.from_numpy(grey / 255).round())
        return torch.stack([mask for mask in masks for _ in range(images // len(masks))])[:, None]


def as_pictures(given: Any, images: int) -> list[Image.Image]:
    """What diffusers' pipelines take as an image, in 8 bits, one for each of so many images."""
    found = _as_pictures(given)
    return [picture.convert("RGB") for picture in found for _ in range(images // len(found))]


def _as_pictures(given: Any) -> list[Image.Image]:
    if isinstance(given, Image.Image):
        return [given]
    if isinstance(given, (list, tuple)):
        return [picture for one in given for picture in _as_pictures(one)]
    array = given.detach().cpu().float().numpy() if isinstance(given, Tensor) else numpy.asarray(given)
    batch = array if array.ndim == 4 else array[None]
    if batch.shape[1] in (1, 3) and batch.shape[-1] not in (1, 3):
        batch = batch.transpose(0, 2, 3, 1)
    if batch.dtype != numpy.uint8:
        batch = (batch * 255).round().clip(0, 255).astype(numpy.uint8)
    return [Image.fromarray(one.squeeze(-1) if one.shape[-1] == 1 else one) for one in batch]


@torch.no_grad()
def to_pictures(vae: AutoencoderKL, latents: Tensor, to_whole: Callable[[Tensor], Tensor]) -> list[Image.Image]:
    """Pictures of finished latents (images, 4, h, w), decoded one after the other.

    Args:
        to_whole: how values of 0..255 become whole ones.
    """
    return [_to_picture(_decoded(vae, latent), to_whole) for latent in latents]


@torch.no_grad()
def to_latents(
    vae: AutoencoderKL, pictures: Sequence[Image.Image], generators: Generators, device: torch.device | str
) -> Tensor:
    """Clean latents (images, 4, h, w) of pictures of one size, each drawn from its posterior by its own generator."""
    each = generators if isinstance(generators, list) else [generators] * len(pictures)
    return torch.cat(
        [_encoded(vae, picture, generator, device) for picture, generator in zip(pictures, each, strict=True)]
    )


def to_tensor(picture: Image.Image) -> Tensor:
    """(1, 3, height, width) with values 0..1."""
    pixels = numpy.array(picture.convert("RGB"), dtype=numpy.float32) / 255
    # strides as diffusers has them: torch chooses its kernels by them
    return torch.from_numpy(pixels[None]).permute(0, 3, 1, 2)


def _decoded(vae: AutoencoderKL, latent: Tensor) -> Tensor:
    return vae.decode((latent[None] / vae.config.scaling_factor).to(vae.dtype), return_dict=False)[0][0]


def _encoded(
    vae: AutoencoderKL, picture: Image.Image, generator: torch.Generator | None, device: torch.device | str
) -> Tensor:
    pixels = (2 * to_tensor(picture) - 1).to(device, vae.dtype)
    return vae.config.scaling_factor * vae.encode(pixels).latent_dist.sample(generator).float()


def _to_picture(image: Tensor, to_whole: Callable[[Tensor], Tensor]) -> Image.Image:
    pixels = to_whole((image.float() / 2 + 0.5).clamp(0, 1) * 255).byte()
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


@dataclass(frozen=True)
class Given:
    """A given picture as a model has it.

    Attributes:
        clean: its latents, (images, 4, h, w).
        noise: standard normal, (images, 4, h, w).
        mask: 1 where something new is painted, (images, 1, h, w); None for everywhere.
        channels: mask and masked picture, (images, 5, h, w), for UNets of inpainting models; None for others.
    """

    clean: Tensor
    noise: Tensor
    mask: Tensor | None = None
    channels: Tensor | None = None


# --- as diffusers' own image-to-image pipelines do it -----------------------------------------------------------------


def encoded(upgraded: Any, pictures: Any, generators: Generators, images: int, size: tuple[int, int]) -> Tensor:
    """Clean latents of pictures, as `StableDiffusionXLImg2ImgPipeline` makes them."""
    view = _beside(StableDiffusionXLImg2ImgPipeline, upgraded)
    pixels = view.image_processor.preprocess(pictures, width=size[0], height=size[1])
    dtype, device = upgraded.unet.dtype, upgraded._execution_device
    return view.prepare_latents(pixels, None, images, 1, dtype, device, generators, add_noise=False)


def given_to_inpaint(
    pipeline: Any,
    painted: Painted,
    generators: Generators,
    draw: Callable[[], Tensor],
    images: int,
    size: tuple[int, int],
) -> Given:
    """Picture and mask as diffusers' inpainting pipelines make them, random numbers drawn in their order."""
    is_sdxl = hasattr(pipeline, "text_encoder_2")
    view = _beside(StableDiffusionXLInpaintPipeline if is_sdxl else StableDiffusionInpaintPipeline, pipeline)
    (width, height), dtype, device = size, pipeline.unet.dtype, pipeline._execution_device
    picture = view.image_processor.preprocess(painted.image, height=height, width=width).float()
    mask = view.mask_processor.preprocess(painted.mask, height=height, width=width)
    clean = view._encode_vae_image(picture.to(device, dtype), generators)
    clean = clean.repeat(images // len(clean), 1, 1, 1)
    noise = draw().to(clean)
    latent_mask, masked = view.prepare_mask_latents(
        mask, picture * (mask < 0.5), images, height, width, dtype, device, generators, False
    )
    return Given(clean, noise, latent_mask, torch.cat([latent_mask, masked], dim=1))


def _beside(kind: type, pipeline: Any) -> Any:
    """A pipeline of another kind with the same parts."""
    known = inspect.signature(kind.__init__).parameters
    parts = {name: part for name, part in pipeline.components.items() if name in known}
    quiet = {"add_watermarker": False, "requires_safety_checker": False}
    return kind(**parts, **{name: value for name, value in quiet.items() if name in known})
