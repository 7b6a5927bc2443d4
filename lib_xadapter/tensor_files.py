"""What a model file holds, read without loading it: the names, shapes and types of its tensors."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from .errors import WrongFile
from .pickled_files import StoredTensor, opened

PICKLED_SUFFIXES = frozenset({".bin", ".ckpt", ".pt", ".pth"})


def is_pickled(path: str | os.PathLike[str]) -> bool:
    """Whether a file is one of torch.save, by its name."""
    return Path(path).suffix.lower() in PICKLED_SUFFIXES


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file; `dtype` is torch's name without "torch.", such as "float16"."""

    shape: tuple[int, ...]
    dtype: str


def read_tensor_infos(path: str | os.PathLike[str]) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file or of a PyTorch pickle (`.pt`, `.pth`, `.bin`, `.ckpt`), by name.

    Of a safetensors file only the header is read, of a pickle only the part before the weights. What lies under
    "state_dict" in a pickle counts as its top; tensors in other groups below the top are named "group.name". No object
    of a pickle is ever made, so no code of it can run.

    Raises:
        WrongFile: the file is missing, cut off, or neither of the two.
    """
    path = Path(path)
    if is_pickled(path):
        return _read(path, _pickled_tensors)
    return _read(path, _safetensors_tensors)


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The metadata of a safetensors file; pickles have none.

    Raises:
        WrongFile: the file is missing, cut off, or no safetensors file.
    """
    path = Path(path)
    if is_pickled(path):
        return {}
    return _read(path, _safetensors_metadata)


def _read(path: Path, reader: Callable[[BinaryIO, str], Any]) -> Any:
    try:
        with path.open("rb") as file:
            return reader(file, path.name)
    except FileNotFoundError as error:
        raise WrongFile(f"There is no file {path.name}.") from error
    except OSError as error:
        raise WrongFile(f"{path.name} cannot be read: {error.strerror}.") from error


# --- safetensors: 8 bytes with the header's length, the header as JSON, the weights -----------------------------------

LENGTH_BYTES = 8
METADATA_KEY = "__metadata__"
LONGEST_HEADER = 100_000_000
"""Bytes: what safetensors itself reads."""

# name in the file → torch's name, bytes of one number
SAFETENSORS_DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U64": ("uint64", 8),
    "U32": ("uint32", 4),
    "U16": ("uint16", 2),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}


def _safetensors_tensors(file: BinaryIO, name: str) -> dict[str, TensorInfo]:
    header, weight_bytes = _safetensors_header(file, name)
    return {
        key: _safetensors_tensor(entry, weight_bytes, key, name) for key, entry in header.items() if key != METADATA_KEY
    }


def _safetensors_metadata(file: BinaryIO, name: str) -> dict[str, str]:
    header, _ = _safetensors_header(file, name)
    metadata = header.get(METADATA_KEY) or {}
    if not isinstance(metadata, dict):
        raise WrongFile(f"{name} is no safetensors file: its '{METADATA_KEY}' is not an object.")
    return {str(key): str(value) for key, value in metadata.items()}


def _safetensors_header(file: BinaryIO, name: str) -> tuple[dict[str, Any], int]:
    """The header, and how many bytes of weights follow it."""
    file_bytes = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(LENGTH_BYTES), "little")
    weight_bytes = file_bytes - LENGTH_BYTES - length
    if file_bytes <= LENGTH_BYTES or weight_bytes < 0:
        if file.read(1) not in (b"{", b""):
            raise WrongFile(f"{name} is no safetensors file: no header begins at its byte {LENGTH_BYTES}.")
        raise WrongFile(
            f"{name} is cut off or is no safetensors file: it has {file_bytes} bytes, "
            f"expected a header of {length} bytes after the first {LENGTH_BYTES}."
        )
    if length > LONGEST_HEADER:
        raise WrongFile(f"{name}: its header claims {length} bytes, expected {LONGEST_HEADER} at most.")
    try:
        header = json.loads(file.read(length))
    except (ValueError, RecursionError) as error:
        raise WrongFile(f"{name} is no safetensors file: its header is not JSON.") from error
    if not isinstance(header, dict):
        raise WrongFile(f"{name} is no safetensors file: its header is not a JSON object.")
    return header, weight_bytes


def _safetensors_tensor(entry: Any, weight_bytes: int, key: str, name: str) -> TensorInfo:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise WrongFile(f"{name}: '{key}' needs dtype, shape and two data offsets in the header.") from error
    if not all(isinstance(number, int) and number >= 0 for number in (*shape, begin, end)):
        raise WrongFile(f"{name}: shape and data offsets of '{key}' must be whole numbers from 0.")
    if end > weight_bytes:
        raise WrongFile(f"{name} is cut off: '{key}' ends at byte {end} of the weights, there are {weight_bytes}.")
    torch_name, bytes_per_number = SAFETENSORS_DTYPES.get(dtype, (str(dtype).lower(), None))
    if bytes_per_number and end - begin != math.prod(shape) * bytes_per_number:
        raise WrongFile(
            f"{name}: '{key}' of shape {shape} in {torch_name} needs {math.prod(shape) * bytes_per_number} bytes, "
            f"its data offsets give {end - begin}."
        )
    return TensorInfo(shape, torch_name)


# --- PyTorch pickles --------------------------------------------------------------------------------------------------


def _pickled_tensors(file: BinaryIO, name: str) -> dict[str, TensorInfo]:
    with opened(file, name) as pickled:
        content = pickled.content
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping):
        raise WrongFile(f"{name} holds one {type(content).__name__}, expected tensors by name.")
    return {key: TensorInfo(tensor.shape, tensor.dtype) for key, tensor in _named_tensors(content)}


def _named_tensors(content: Mapping[Any, Any]) -> Iterator[tuple[str, StoredTensor]]:
    """The tensors at the top, and those one level below as "group.name" (IP-Adapter files hold two groups)."""
    for key, value in content.items():
        if isinstance(key, str) and isinstance(value, StoredTensor):
            yield key, value
        elif isinstance(key, str) and isinstance(value, Mapping):
            yield from (
                (f"{key}.{name}", inner)
                for name, inner in value.items()
                if isinstance(name, str) and isinstance(inner, StoredTensor)
            )
