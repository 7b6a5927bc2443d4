"""What CLIP sees: how well a picture fits its caption, and how alike two pictures look.

Radford et al., 2021; the score is that of Hessel et al., 2021, without their factor 2.5, as the paper's tables have it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ...errors import WrongFile, first_line


class Clip:
    """A CLIP model of transformers.

    Args:
        folder: with config.json, the weights, the tokenizer's files and preprocessor_config.json.
        device: where it runs.

    Raises:
        WrongFile: the folder is missing or holds something else.
    """

    def __init__(self, folder: Path, device: torch.device | str = "cpu") -> None:
        from transformers import CLIPModel, CLIPProcessor

        if not folder.is_dir():
            raise WrongFile(f"--clip: there is no folder {folder}.")
        try:
            self._model = CLIPModel.from_pretrained(folder, local_files_only=True).float().to(device).eval()
            self._processor = CLIPProcessor.from_pretrained(folder, local_files_only=True)
        except Exception as error:
            raise WrongFile(f"--clip: {folder} holds no CLIP model of transformers ({first_line(error)}).") from error
        self._device = device

    @torch.no_grad()
    def of_pictures(self, pictures: Sequence[Image.Image]) -> NDArray[numpy.float32]:
        """Embeddings of length 1, (pictures, channels)."""
        inputs = self._processor(images=[picture.convert("RGB") for picture in pictures], return_tensors="pt")
        return _unit(self._model.get_image_features(**inputs.to(self._device)).pooler_output)

    @torch.no_grad()
    def of_texts(self, texts: Sequence[str]) -> NDArray[numpy.float32]:
        """Embeddings of length 1, (texts, channels); what is longer than the model takes is cut off."""
        inputs = self._processor(text=list(texts), return_tensors="pt", padding=True, truncation=True)
        return _unit(self._model.get_text_features(**inputs.to(self._device)).pooler_output)


def similarity(one: NDArray, other: NDArray) -> NDArray[numpy.float64]:
    """The cosine of each pair of embeddings of length 1, (…, channels) → (…)."""
    return (one.astype(numpy.float64) * other).sum(axis=-1)


def _unit(embeddings: Tensor) -> NDArray[numpy.float32]:
    return torch.nn.functional.normalize(embeddings.float(), dim=-1).cpu().numpy()
