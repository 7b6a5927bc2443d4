"""A hash of values, by which what was made of equal values is found again."""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy
import torch
from PIL import Image


def fingerprint(value: Any) -> str | None:
    """A hash of what a value holds; None where it holds something that cannot be compared with a later value."""
    digest = hashlib.sha256()
    try:
        for part in _parts(value):
            # its length first, so that no two values are written alike
            digest.update(f"{len(part)} ".encode())
            digest.update(part)
    except _Incomparable:
        return None
    return digest.hexdigest()


class _Incomparable(Exception):
    """A value of a kind whose contents are not known here."""


def _parts(value: Any) -> Iterator[bytes]:
    yield type(value).__name__.encode()
    if isinstance(value, Mapping):
        yield str(len(value)).encode()
        for name in sorted(value, key=str):
            yield from _parts(name)
            yield from _parts(value[name])
    elif isinstance(value, (list, tuple)):
        yield str(len(value)).encode()
        for item in value:
            yield from _parts(item)
    elif isinstance(value, Image.Image):
        yield f"{value.mode} {value.size}".encode()
        yield bytes(value.getpalette() or ())
        yield value.tobytes()
    elif isinstance(value, torch.Tensor):
        yield f"{tuple(value.shape)} {value.dtype}".encode()
        yield value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(value, numpy.ndarray) and not value.dtype.hasobject:
        yield f"{value.shape} {value.dtype}".encode()
        yield value.tobytes()
    elif isinstance(value, enum.Enum):
        yield value.name.encode()
    elif isinstance(value, (str, bytes, bool, int, float, type(None))):
        yield repr(value).encode()
    else:
        raise _Incomparable(type(value).__name__)
