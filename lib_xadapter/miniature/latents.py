"""Banks of encoded pictures, so that a UNet's step needs neither drawing nor VAE. Filled part by part, and resumed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from ..saving import write_whole
from .captions import caption_of, facts_of
from .learning import Drawn, batches
from .scenes import SHAPES, Scene, scene_of
from .vocabulary import token_rows
from .worlds import Draw, tensor_of

PART = 512
"""Pictures a file."""
AT_ONCE = 16


@dataclass(frozen=True)
class Rows:
    """Some rows of a bank.

    Attributes:
        seeds: of the scenes.
        latents: (rows, 4, h, w), scaled, drawn from what the VAE gives.
        tokens: (rows, 77) of the captions.
    """

    seeds: Sequence[int]
    latents: Tensor
    tokens: Tensor


@dataclass(frozen=True)
class Source:
    """What a bank is made from.

    Attributes:
        draw: scene → picture.
        first: seed of the first scene; the others follow.
        pictures: how many, whole files of `PART`.
        shapes: that can be in a scene.
        names: other words for shapes in the captions.
        tokens: of words that the vocabulary has not.
    """

    draw: Draw
    first: int
    pictures: int
    shapes: tuple[str, ...] = SHAPES
    names: Mapping[str, str] = field(default_factory=dict)
    tokens: Mapping[str, Sequence[int]] = field(default_factory=dict)

    def scene(self, row: int) -> Scene:
        return scene_of(self.first + row, self.shapes)


class Bank:
    """The latents and captions of a source's pictures.

    Args:
        means, deviations: (pictures, 4, h, w), scaled, float16.
        tokens: (pictures, 77).
    """

    def __init__(self, source: Source, means: NDArray, deviations: NDArray, tokens: NDArray) -> None:
        self.source, self._means, self._deviations, self._tokens = source, means, deviations, tokens

    def __len__(self) -> int:
        return len(self._tokens)

    def rows(self, batch: int, drawn: Drawn) -> Rows:
        """Those of one step."""
        numbers = batches(len(self), batch, drawn)
        means = torch.from_numpy(self._means[numbers].astype(numpy.float32))
        deviations = torch.from_numpy(self._deviations[numbers].astype(numpy.float32))
        latents = means + deviations * drawn.normal(*means.shape)
        tokens = torch.from_numpy(self._tokens[numbers].astype(numpy.int64))
        return Rows([self.source.first + number for number in numbers], latents, tokens)


def fill(source: Source, vae: AutoencoderKL, folder: Path, name: str) -> Bank:
    """The bank in a folder, of which the files that are missing are made."""
    parts = [folder / f"{number:04}.npz" for number in range(max(1, source.pictures // PART))]
    per_part = min(PART, source.pictures)
    for number, path in enumerate(tqdm(parts, desc=name, dynamic_ncols=True, mininterval=5)):
        if not path.is_file():
            arrays = _encoded(source, vae, range(number * per_part, (number + 1) * per_part))
            write_whole(path, lambda to, arrays=arrays: numpy.savez(to, **arrays))
    return open_bank(source, folder)


def open_bank(source: Source, folder: Path) -> Bank:
    """A bank that was filled."""
    loaded = [numpy.load(path) for path in sorted(folder.glob("????.npz"))]
    means, deviations, tokens = (
        numpy.concatenate([part[name] for part in loaded]) for name in ("means", "deviations", "tokens")
    )
    return Bank(source, means, deviations, tokens)


@torch.no_grad()
def _encoded(source: Source, vae: AutoencoderKL, rows: range) -> dict[str, NDArray]:
    scenes = [source.scene(row) for row in rows]
    means, deviations = [], []
    for first in range(0, len(scenes), AT_ONCE):
        pictures = tensor_of([source.draw(scene) for scene in scenes[first : first + AT_ONCE]])
        posterior = vae.encode(pictures).latent_dist
        factor = vae.config.scaling_factor
        means.append((factor * posterior.mean).half().numpy())
        deviations.append((factor * posterior.std).half().numpy())
    tokens = numpy.array(
        [token_rows(caption_of(facts_of(scene), source.names), replaced=source.tokens) for scene in scenes], numpy.int16
    )
    return {"means": numpy.concatenate(means), "deviations": numpy.concatenate(deviations), "tokens": tokens}
