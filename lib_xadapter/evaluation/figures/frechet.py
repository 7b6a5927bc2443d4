"""Fréchet distance between two sets of features, as FID is (Heusel et al., 2017).

FID's features are those of InceptionV3 as `torch-fidelity` carries it; any other network's do as well.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ...errors import WrongFile, first_line
from ...headless.pictures import to_tensor
from ...tensor_files import read_tensor_infos

INCEPTION_SIZE = 299
MOST_RESAMPLES = 200
"""Each takes seconds where there are thousands of pictures."""


class FrechetDistance:
    """Between features of one way and of a reference with the same captions, as Gaussians.

    |m₁ − m₂|² + tr C₁ + tr C₂ − 2 tr (C₁ C₂)^½. With centred features A and B, C₁ = AᵀA and C₂ = BᵀB, and the last
    trace is the sum of the singular values of A Bᵀ, which needs no root of a matrix.

    Args:
        features, reference: (captions, channels) or (captions, seeds, channels).
        device: where it is computed.
    """

    most_resamples = MOST_RESAMPLES

    def __init__(self, features: NDArray, reference: NDArray, device: torch.device | str = "cpu") -> None:
        # Apple's GPUs have no float64
        able = "cpu" if torch.device(device).type == "mps" else device
        self._sets = [_by_caption(one, able) for one in (features, reference)]

    def __call__(self, counts: NDArray[numpy.int64]) -> NDArray[numpy.float64]:
        return numpy.array([self._distance(row) for row in counts])

    def _distance(self, counts: NDArray[numpy.int64]) -> float:
        ours, theirs = (_Gaussian.of(features, counts) for features in self._sets)
        together = torch.linalg.svdvals(ours.root @ theirs.root.T).sum()
        apart = (ours.mean - theirs.mean).square().sum()
        return max(float(apart + ours.root.square().sum() + theirs.root.square().sum() - 2 * together), 0.0)


class _Gaussian:
    """A mean (channels,) and a matrix whose product with itself, rootᵀ root, is the covariance."""

    def __init__(self, mean: Tensor, root: Tensor) -> None:
        self.mean, self.root = mean, root

    @classmethod
    def of(cls, features: Tensor, counts: NDArray[numpy.int64]) -> _Gaussian:
        """Of features (captions, seeds, channels) whose captions count so often."""
        drawn = counts.nonzero()[0]
        rows = features[torch.from_numpy(drawn).to(features.device)]
        seeds = rows.shape[1]
        weights = torch.from_numpy(counts[drawn]).to(rows).repeat_interleave(seeds)[:, None]
        rows, total = rows.flatten(0, 1), weights.sum()
        mean = (weights * rows).sum(dim=0) / total
        root = (weights / (total - 1)).sqrt() * (rows - mean)
        if root.shape[0] > root.shape[1]:
            root = torch.linalg.qr(root, mode="r").R
        return cls(mean, root)


def _by_caption(features: NDArray, device: torch.device | str) -> Tensor:
    tensor = torch.from_numpy(numpy.array(features, dtype=numpy.float64))
    return (tensor[:, None] if tensor.ndim == 2 else tensor).to(device)


class Inception:
    """The features of FID: 2048 numbers a picture.

    Pictures are brought to 299 px by Pillow, which filters before it samples; the network's own resize does not, and
    would alias pictures of other sizes differently (Parmar et al., 2022).

    Args:
        weights: the file that torch-fidelity calls `weights-inception-2015-12-05-6726825d.pth`.
        device: where it runs.

    Raises:
        WrongFile: it is missing or holds other weights.
    """

    def __init__(self, weights: Path, device: torch.device | str = "cpu") -> None:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        if not weights.is_file():
            raise WrongFile(f"--inception: there is no file {weights}.")
        try:
            # torch-fidelity unpickles whatever it is given
            read_tensor_infos(weights)
            network = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(weights))
        except Exception as error:
            raise WrongFile(
                f"--inception: {weights.name} holds no weights of torch-fidelity's InceptionV3 ({first_line(error)})."
            ) from error
        self._network, self._device = network.to(device), device

    @torch.no_grad()
    def features(self, pictures: Iterable[Image.Image]) -> NDArray[numpy.float32]:
        """(pictures, 2048)."""
        resized = [
            picture.convert("RGB").resize((INCEPTION_SIZE,) * 2, Image.Resampling.LANCZOS) for picture in pictures
        ]
        levels = torch.cat([to_tensor(picture) for picture in resized]).mul(255).round().byte()
        return self._network(levels.to(self._device))[0].cpu().numpy()
