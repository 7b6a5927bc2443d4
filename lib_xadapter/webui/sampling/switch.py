"""From the base's picture to SDXL's latent: decode, resize, encode, by the rules of the WebUI's img2img tab.

Source: paper, "Inference strategy": the latent is carried over as E_up(D_base(z)).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy
import torch
from modules import devices, images, processing, sd_samplers_common, shared
from modules.processing import StableDiffusionProcessing
from PIL import Image
from torch import Tensor

from .seeded import each_from_its_seed

JUST_RESIZE = 0


@dataclass(frozen=True)
class CarriedOver:
    """Pictures at a model's size: pixels in 0..1, (images, 3, height, width), and the model's latents of them."""

    pixels: Tensor
    latents: Tensor


def decode(
    model: torch.nn.Module, latents: Tensor, finish: Callable[[Tensor], Tensor] = lambda pixels: pixels
) -> list[Image.Image]:
    """Pictures of latents, in eight bits as the WebUI saves them.

    Args:
        finish: what plugins do to the decoded pictures, (images, 3, height, width) in 0..1.
    """
    decoded = processing.decode_latent_batch(model, latents, target_device=devices.cpu, check_for_nans=True)
    pixels = finish(torch.clamp((torch.stack(decoded).float() + 1.0) / 2.0, min=0.0, max=1.0))
    return [Image.fromarray((255.0 * numpy.moveaxis(picture.numpy(), 0, 2)).astype(numpy.uint8)) for picture in pixels]


def resized(pictures: Sequence[Image.Image], width: int, height: int, mode: int = JUST_RESIZE) -> Tensor:
    """Pictures at a size, (images, 3, height, width) in 0..1; `mode` is the img2img tab's resize mode."""
    arrays = [numpy.array(images.resize_image(mode, picture, width, height)) for picture in pictures]
    return torch.from_numpy(numpy.moveaxis(numpy.stack(arrays).astype(numpy.float32) / 255.0, 3, 1).copy())


def carry_over(
    pictures: Sequence[Image.Image], seeds: Sequence[int], width: int, height: int, mode: int = JUST_RESIZE
) -> CarriedOver:
    """Pictures in the latent space of the WebUI's current model.

    A VAE draws its latent from a narrow distribution. It is drawn here from each image's seed, so that the same seed
    gives the same picture, and SDXL's own noise is left where it was.
    """
    pixels = resized(pictures, width, height, mode).to(shared.device, dtype=devices.dtype_vae)
    method = sd_samplers_common.approximation_indexes.get(shared.opts.sd_vae_encode_method)

    def encode(place: int) -> Tensor:
        return sd_samplers_common.images_tensor_to_samples(pixels[place : place + 1], method, shared.sd_model)

    latents = each_from_its_seed(seeds, encode)
    devices.torch_gc()
    return CarriedOver(pixels, latents)


@contextmanager
def denoising_strength(p: StableDiffusionProcessing, strength: float) -> Iterator[None]:
    """While open, the processing object has an img2img tab's denoising strength."""
    own, p.denoising_strength = p.denoising_strength, strength
    try:
        yield
    finally:
        p.denoising_strength = own
