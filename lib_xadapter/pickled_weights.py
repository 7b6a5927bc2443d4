"""The tensors of a file of torch.save, as tensors of torch."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import WrongFile
from .pickled_files import BYTES, Ignored, Named, PickledFile, StoredTensor, opened


def read_pickle(path: str | os.PathLike[str]) -> Any:
    """What a file of torch.save holds: tensors on the CPU, and mappings, lists, texts and numbers around them.

    Objects of all other kinds are left out of mappings; none is ever made, so no code of the file can run.

    Raises:
        WrongFile: the file is missing, cut off, or holds something that no file of tensors needs.
    """
    path = Path(path)
    try:
        with path.open("rb") as file, opened(file, path.name) as pickled:
            return _Weights(pickled, path.stat().st_size, path.name).of(pickled.content)
    except FileNotFoundError as error:
        raise WrongFile(f"There is no file {path.name}.") from error
    except OSError as error:
        raise WrongFile(f"{path.name} cannot be read: {error.strerror}.") from error
    except RecursionError as error:
        raise WrongFile(f"{path.name} is no PyTorch file of tensors: it holds a list or mapping in itself.") from error


class _Weights:
    """Makes tensors; each storage is read once."""

    def __init__(self, pickled: PickledFile, file_bytes: int, name: str) -> None:
        self._pickled, self._left, self._name = pickled, file_bytes, name
        self._storages: dict[str, Tensor] = {}

    def of(self, content: Any) -> Any:
        if isinstance(content, StoredTensor):
            return self._tensor(content)
        if isinstance(content, Named):
            return self.of(content.content)
        if isinstance(content, Mapping):
            return {key: self.of(value) for key, value in content.items() if type(value) is not Ignored}
        if isinstance(content, list | tuple):
            return [self.of(value) for value in content]
        return content

    def _tensor(self, stored: StoredTensor) -> Tensor:
        numbers = self._numbers(stored)
        reach = stored.offset + sum((size - 1) * step for size, step in zip(stored.shape, stored.stride, strict=True))
        negative = min((stored.offset, *stored.shape, *stored.stride)) < 0
        # with a stride of 0 one number could stand for any number of them
        more = math.prod(stored.shape) > len(numbers)
        if negative or more or (0 not in stored.shape and reach >= len(numbers)):
            raise WrongFile(f"{self._name} is cut off: a tensor of shape {stored.shape} goes beyond its weights.")
        return torch.as_strided(numbers, stored.shape, stored.stride, stored.offset)

    def _numbers(self, stored: StoredTensor) -> Tensor:
        """All of the storage, in the tensor's own type."""
        storage, dtype = stored.storage, getattr(torch, stored.dtype, None)
        if stored.dtype not in BYTES or storage.dtype not in BYTES or dtype is None:
            raise WrongFile(f"{self._name} holds weights of the type {stored.dtype}, which this torch does not know.")
        if storage.key not in self._storages:
            self._storages[storage.key] = self._read(storage.key)
        size = BYTES[storage.dtype]
        part = self._storages[storage.key][storage.begin * size : (storage.begin + storage.numbers) * size]
        if storage.begin:
            # torch takes no view of another type from a place that it does not divide
            part = part.clone()
        whole = len(part) // BYTES[stored.dtype] * BYTES[stored.dtype]
        return part[:whole].view(dtype)

    def _read(self, key: str) -> Tensor:
        weights = self._pickled.weights(key)
        # several names for the same bytes would let a small file fill all memory
        self._left -= len(weights)
        if self._left < 0:
            raise WrongFile(f"{self._name} has more weights than bytes.")
        return torch.frombuffer(bytearray(weights), dtype=torch.uint8) if weights else torch.empty(0, dtype=torch.uint8)
