"""Between latents and 8-bit pictures."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from diffusers import AutoencoderKL, StableDiffusionXLImg2ImgPipeline, StableDiffusionXLInpaintPipeline
from PIL import Image
from torch import Tensor

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

    def pictures(self, images: int) -> list[Image.Image]:
        """In 8 bits, one an image of the batch."""
        found = _as_pictures(self.image)
        return [picture.convert("RGB") for picture in found for _ in range(images // len(found))]

    def mask_picture(self) -> Image.Image:
        """The mask in 8 bits."""
        return _as_pictures(self.mask)[0].convert("L")

    def latent_mask(self, size: tuple[int, int]) -> Tensor:
        """(1, 1, h, w), 1 where something new is painted; `size` is (width, height) of the picture."""
        width, height = size
        small = _as_pictures(self.mask)[0].convert("L").resize((width // 8, height // 8), Image.Resampling.LANCZOS)
        return (torch.from_numpy(numpy.array(small, dtype=numpy.float32)) >= 128).float()[None, None]


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
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]


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


# --- as diffusers' own image-to-image pipelines do it -----------------------------------------------------------------


@dataclass(frozen=True)
class DiffusersStart:
    """What diffusers' image-to-image and inpainting pipelines begin with.

    Attributes:
        latents: at the noise level of the first step.
        kept: clean latents, noise and mask of what is kept; None where nothing is, or the UNet is told by `channels`.
        channels: mask and masked picture for UNets that take them.
    """

    latents: Tensor
    kept: tuple[Tensor, Tensor, Tensor] | None = None
    channels: Tensor | None = None


def encoded(upgraded: Any, pictures: Any, generators: Generators, images: int, dtype: torch.dtype) -> Tensor:
    """Clean latents of pictures, as `StableDiffusionXLImg2ImgPipeline` makes them."""
    view = _beside(StableDiffusionXLImg2ImgPipeline, upgraded)
    pixels = view.image_processor.preprocess(pictures)
    return view.prepare_latents(pixels, None, images, 1, dtype, upgraded._execution_device, generators, add_noise=False)


def start_of(
    upgraded: Any, painted: Painted, steps: Any, noise: Any, images: int, size: tuple[int, int], dtype: torch.dtype
) -> DiffusersStart:
    """Random numbers are drawn in the order in which diffusers' pipelines draw them."""
    if painted.mask is None:
        clean = encoded(upgraded, painted.image, noise.encoding, images, dtype)
        return DiffusersStart(steps.noised(clean, noise.upgraded().to(clean)))
    view, (width, height), device = (
        _beside(StableDiffusionXLInpaintPipeline, upgraded),
        size,
        upgraded._execution_device,
    )
    picture = view.image_processor.preprocess(painted.image, height=height, width=width).float()
    mask = view.mask_processor.preprocess(painted.mask, height=height, width=width)
    clean = view._encode_vae_image(picture.to(device, dtype), noise.encoding)
    clean = clean.repeat(images // len(clean), 1, 1, 1)
    drawn = noise.upgraded().to(clean)
    latents = steps.from_noise(drawn) if painted.strength == 1 else steps.noised(clean, drawn)
    latent_mask, masked = view.prepare_mask_latents(
        mask, picture * (mask < 0.5), images, height, width, dtype, device, noise.encoding, False
    )
    if upgraded.unet.config.in_channels == 4:
        return DiffusersStart(latents, (clean, drawn, latent_mask))
    return DiffusersStart(latents, channels=torch.cat([latent_mask, masked], dim=1))


def _beside(kind: type, upgraded: Any) -> Any:
    """A pipeline of another kind with the same parts."""
    known = inspect.signature(kind.__init__).parameters
    parts = {name: part for name, part in upgraded.components.items() if name in known}
    return kind(**parts, add_watermarker=False)
