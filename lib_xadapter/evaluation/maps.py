"""Control maps of pictures, as the ControlNets of SD1.5 know them from their training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy
import torch
from PIL import Image

from ..errors import WrongFile, XAdapterError, first_line
from .evaluate_command import DEPTH

try:
    import cv2
except ImportError as error:
    raise XAdapterError('Control maps need the package opencv-python-headless (pip install ".[evaluate]").') from error

LOW, HIGH = 100, 200
"""Thresholds of the edges that the canny ControlNet is used with (its authors' demo)."""

Extractor = Callable[[Image.Image], Image.Image]
"""Picture → map of its size, "L"."""


def canny(picture: Image.Image) -> Image.Image:
    """Edges (Canny, 1986), white on black, one pixel wide."""
    return Image.fromarray(cv2.Canny(numpy.asarray(picture.convert("RGB")), LOW, HIGH))


class DepthEstimator:
    """Depth of one picture, near bright and far dark, stretched to all grey levels.

    Args:
        folder: a depth estimator of transformers for relative depth, such as DPT or Depth Anything.
        device: where it runs.

    Raises:
        WrongFile: the folder is missing or holds something else.
    """

    def __init__(self, folder: Path, device: torch.device | str = "cpu") -> None:
        from transformers import AutoImageProcessor, AutoModelForDepthEstimation

        if not folder.is_dir():
            raise WrongFile(f"--depth: there is no folder {folder}.")
        try:
            self._model = (
                AutoModelForDepthEstimation.from_pretrained(folder, local_files_only=True).float().to(device).eval()
            )
            self._processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
        except Exception as error:
            raise WrongFile(
                f"--depth: {folder} holds no depth estimator of transformers ({first_line(error)})."
            ) from error
        self._device = device

    @torch.no_grad()
    def __call__(self, picture: Image.Image) -> Image.Image:
        inputs = self._processor(images=picture.convert("RGB"), return_tensors="pt").to(self._device)
        size = [(picture.height, picture.width)]
        (found,) = self._processor.post_process_depth_estimation(self._model(**inputs), target_sizes=size)
        depth = found["predicted_depth"].float().cpu()
        depth = depth - depth.min()
        # what is flat everywhere is all far
        levels = 255 * depth / depth.max().clamp(min=torch.finfo(depth.dtype).tiny)
        return Image.fromarray(levels.round().byte().numpy())


def extractor(kind: str, depth: Path | None = None, device: torch.device | str = "cpu") -> Extractor:
    """What makes maps of a kind.

    Args:
        kind: "canny" or "depth".
        depth: the estimator's folder.
        device: where it runs.
    """
    return DepthEstimator(depth, device) if kind == DEPTH else canny


def fitted(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The middle of a picture, as much of it as has the shape of (width, height), at that size."""
    width, height = size
    scale = max(width / picture.width, height / picture.height)
    cut = width / scale, height / scale
    left, top = (picture.width - cut[0]) / 2, (picture.height - cut[1]) / 2
    return picture.convert("RGB").resize(size, Image.Resampling.LANCZOS, (left, top, left + cut[0], top + cut[1]))
