"""The two VAEs: learned apart, from seeds of their own, so that their latents have nothing to do with each other.

Both see both worlds, for each has to encode what the other model made: the upgraded one a picture of the base at the
switch, the base's one the pictures that mapping layers are trained with.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional

from .drawing import base_picture, upgraded_picture
from .learning import Drawn, Loss
from .scenes import SECRET_SHAPE, SHAPES, Scene, scene_of
from .styles import STYLES, styled_picture
from .worlds import Draw, Picture, random_scene, tensor_of

WHOLE_SIZE, PART_SIZE = 64, 40
"""Pixels of what is learned from: of every fourth step a whole picture of the base world or a quarter of one of the
upgraded world, of the others a part of it, for what counts is how much of pictures is seen in all."""
CUTS = 3
"""Parts of each picture that is drawn: drawing costs as much as learning from it."""
SCALE = 1 / 1.2
"""Of the objects that are learned from: smaller ones have more outlines for their area, which are what is hard."""
OWN_SHARE = 0.6
"""Of pictures of its own world; the others are of the other one, and in the styles of the LoRAs."""
SPREAD = 1e-4
"""Weight of the divergence from a normal distribution: next to none, as in the real ones."""
EDGES = 0.5
"""Weight of the difference of neighbouring pixels, without which fine lines blur."""
COARSE = 2.0
"""Weight of the error of means of `PATCH` pixels, by which colours are learned before textures are."""
PATCH = 8
LED, LED_STEPS = 2.0, 1500
"""Weight at the first step, and steps until it is 0, of what leads the base's latent to the mean colours of patches:
with pictures as small as the base's, colours come late by themselves. The upgraded VAE finds a latent of its own."""
MEASURED = 256
"""Pictures by which latents are brought to mean 0 and deviation 1."""
ALL_SHAPES = (*SHAPES, SECRET_SHAPE)


def vae_loss(vae: AutoencoderKL, family: str, batch: int) -> Loss:
    """Absolute error of pixels, of their differences and of their means."""
    directions, led_by = _colour_directions(), LED if family == "sd1" else 0.0

    def loss(drawn: Drawn) -> Tensor:
        size = PART_SIZE if drawn.step % 4 else WHOLE_SIZE
        rows = max(1, batch * PART_SIZE**2 // size**2)
        pictures = tensor_of([part for _ in range(-(-rows // CUTS)) for part in _seen(family, size, drawn)][:rows])
        posterior = vae.encode(pictures).latent_dist
        latents = posterior.mean + posterior.std * drawn.normal(*posterior.mean.shape)
        error = vae.decode(latents).sample - pictures
        spread = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        coarse = functional.avg_pool2d(error, PATCH).abs().mean()
        led = led_by * max(0.0, 1 - drawn.step / LED_STEPS) * _from_colours(posterior.mean, pictures, directions)
        return error.abs().mean() + EDGES * _differences(error) + COARSE * coarse + SPREAD * spread + led

    return loss


def _colour_directions() -> Tensor:
    """(4, 3), at right angles to each other."""
    drawn = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    return torch.linalg.qr(drawn).Q[:, :3]


def _from_colours(latents: Tensor, pictures: Tensor, directions: Tensor) -> Tensor:
    """Squared distance of latents from the mean colours of their patches, each in its direction."""
    colours = functional.avg_pool2d(pictures, PATCH)
    return (latents - torch.einsum("lc,nchw->nlhw", directions, colours)).square().mean()


def _differences(error: Tensor) -> Tensor:
    return error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()


def _seen(family: str, size: int, drawn: Drawn) -> list[Picture]:
    scene = random_scene(drawn.numbers, ALL_SHAPES, SCALE)
    whole = _draw(family, drawn)(scene)
    corners = drawn.numbers.integers(whole.shape[0] - size + 1, size=(CUTS, 2))
    return [whole[top : top + size, left : left + size] for top, left in corners]


def _draw(family: str, drawn: Drawn) -> Draw:
    own, other = (base_picture, upgraded_picture) if family == "sd1" else (upgraded_picture, base_picture)
    size = 64 if family == "sd1" else 128
    draw: Callable[[Scene, int], Picture] = own
    if drawn.numbers.random() > OWN_SHARE:
        style = str(drawn.numbers.choice(["", *STYLES]))
        draw = other if not style else lambda scene, size: styled_picture(own(scene, size), scene, style)
    return lambda scene: draw(scene, size)


@torch.no_grad()
def normalise(vae: AutoencoderKL, family: str, seed: int) -> None:
    """Bring each channel of the scaled latents to mean 0 and deviation 1, without changing a picture.

    The scale goes into the convolutions around the latent, as files have no place for factors of their own.
    """
    draw, size = (base_picture, 64) if family == "sd1" else (upgraded_picture, 128)
    means = [_mean(vae, draw, size, seed + number) for number in range(MEASURED // 16)]
    latents = torch.cat(means)
    mean, deviation = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    gain = 1 / (deviation * vae.config.scaling_factor)
    into, out = vae.quant_conv, vae.post_quant_conv
    into.weight[:4] *= gain[:, None, None, None]
    into.bias[:4] = (into.bias[:4] - mean) * gain
    into.bias[4:] += 2 * gain.log()
    out.bias += out.weight[:, :, 0, 0] @ mean
    out.weight /= gain[None, :, None, None]


def _mean(vae: AutoencoderKL, draw: Draw, size: int, seed: int) -> Tensor:
    scenes = [scene_of(seed * 16 + number, scale=SCALE) for number in range(16)]
    return vae.encode(tensor_of([draw(scene) for scene in scenes])).latent_dist.mean


def fidelity(vae: AutoencoderKL, pictures: Tensor) -> float:
    """Peak signal-to-noise ratio of what is encoded and decoded, in dB."""
    with torch.no_grad():
        again = vae.decode(vae.encode(pictures).latent_dist.mean).sample.clamp(-1, 1)
    return -10 * math.log10(float(functional.mse_loss(again, pictures)) / 4)
