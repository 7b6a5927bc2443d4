"""A base and an upgraded UNet as the taps see them, of nothing but torch, for machines that have nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

TIME_CHANNELS = 16

BASE_WIDTHS = (128, 128, 64, 32)
UPGRADED_WIDTHS = (128, 64, 32)
"""What the decoder blocks give, for the small mapping layers in between."""


class Unet(nn.Module):
    """Convolutions down to the middle block and up again; no skips, no attention.

    Args:
        widths: channels that each decoder block gives, coarsest first; all but the last double the size.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        middle, *_, last = widths
        self.time_embedding = nn.Linear(1, TIME_CHANNELS)
        self.encoder = nn.Sequential(nn.Conv2d(4, middle, 3, padding=1))
        for _ in widths[1:]:
            self.encoder.append(nn.Conv2d(middle, middle, 3, stride=2, padding=1))
        self.mid_block = nn.Sequential(nn.Conv2d(middle, middle, 3, padding=1), nn.SiLU())
        self.up_blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(inner, outer, 3, padding=1),
                nn.SiLU(),
                nn.Upsample(scale_factor=2) if place < len(widths) - 1 else nn.Identity(),
            )
            for place, (inner, outer) in enumerate(zip((middle, *widths), widths, strict=False))
        )
        self.out = nn.Conv2d(last, 4, 3, padding=1)

    def forward(self, latent: Tensor, timestep: float) -> Tensor:
        time = self.time_embedding(latent.new_full((len(latent), 1), timestep / 1000))
        x = self.mid_block(self.encoder(latent) + time.mean(1)[:, None, None, None])
        for block in self.up_blocks:
            x = block(x)
        return self.out(x)


def base_unet(device: torch.device | str, dtype: torch.dtype) -> Unet:
    return _made(BASE_WIDTHS, device, dtype)


def upgraded_unet(device: torch.device | str, dtype: torch.dtype) -> Unet:
    return _made(UPGRADED_WIDTHS, device, dtype)


def _made(widths: Sequence[int], device: torch.device | str, dtype: torch.dtype) -> Unet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(len(widths))
        return Unet(widths).to(device, dtype).eval().requires_grad_(False)
