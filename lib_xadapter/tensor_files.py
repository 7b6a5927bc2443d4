"""What a model file holds, read without loading it: the names, shapes and types of its tensors."""

from __future__ import annotations

import collections
import io
import json
import math
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from .errors import WrongFile, first_line

PICKLED_SUFFIXES = frozenset({".bin", ".ckpt", ".pt", ".pth"})


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
    if path.suffix.lower() in PICKLED_SUFFIXES:
        return _read(path, _pickled_tensors)
    return _read(path, _safetensors_tensors)


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The metadata of a safetensors file; pickles have none.

    Raises:
        WrongFile: the file is missing, cut off, or no safetensors file.
    """
    path = Path(path)
    if path.suffix.lower() in PICKLED_SUFFIXES:
        return {}
    return _read(path, _safetensors_metadata)


def _read(path: Path, reader: Callable[[BinaryIO, str], Any]) -> Any:
    try:
        with path.open("rb") as file:
            return reader(file, path.name)
    except FileNotFoundError as error:
        raise WrongFile(f"There is no file {path}.") from error
    except OSError as error:
        raise WrongFile(f"{path} cannot be read: {error.strerror}.") from error


# --- safetensors: 8 bytes with the header's length, the header as JSON, the weights -----------------------------------

LENGTH_BYTES = 8
METADATA_KEY = "__metadata__"

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


# --- PyTorch pickles: a zip file with a pickle and the weights, or (before torch 1.6) pickles one after the other -----

ZIP_START = b"PK"
MAGIC_NUMBER_BEFORE_ZIP = 0x1950A86A20F9469CFC6C

STORAGE_DTYPES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}

DTYPES = frozenset(STORAGE_DTYPES.values()) | {torch_name for torch_name, _ in SAFETENSORS_DTYPES.values()}

# modules whose objects stand beside the weights in old checkpoints (training state), and say nothing about them
BESIDE_THE_WEIGHTS = frozenset({"_codecs", "collections", "lightning", "numpy", "pytorch_lightning", "torch"})
BUILTINS_BESIDE_THE_WEIGHTS = frozenset({"float", "int", "long", "set"})


def _pickled_tensors(file: BinaryIO, name: str) -> dict[str, TensorInfo]:
    start = file.read(len(ZIP_START))
    file.seek(0)
    try:
        content = _unpickle_zip(file) if start == ZIP_START else _unpickle_before_zip(file)
    except OSError:
        raise
    except Exception as error:  # a broken pickle can raise anything
        raise WrongFile(f"{name} is cut off or is no PyTorch file of tensors: {first_line(error)}") from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping):
        raise WrongFile(f"{name} holds one {type(content).__name__}, expected tensors by name.")
    return dict(_named_tensors(content))


def _named_tensors(content: Mapping[Any, Any]) -> Iterator[tuple[str, TensorInfo]]:
    """The tensors at the top, and those one level below as "group.name" (IP-Adapter files hold two groups)."""
    for key, value in content.items():
        if isinstance(key, str) and isinstance(value, TensorInfo):
            yield key, value
        elif isinstance(key, str) and isinstance(value, Mapping):
            yield from (
                (f"{key}.{name}", inner)
                for name, inner in value.items()
                if isinstance(name, str) and isinstance(inner, TensorInfo)
            )


def _unpickle_zip(file: BinaryIO) -> Any:
    with zipfile.ZipFile(file) as archive:
        pickles = [member for member in archive.namelist() if member.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise pickle.UnpicklingError(f"the zip file holds {len(pickles)} 'data.pkl', expected one")
        return _ShapeUnpickler(io.BytesIO(archive.read(pickles[0]))).load()


def _unpickle_before_zip(file: BinaryIO) -> Any:
    """The fourth of the pickles that torch.save wrote: magic number, protocol, system, content, storages, weights."""
    if _ShapeUnpickler(file).load() != MAGIC_NUMBER_BEFORE_ZIP:
        raise pickle.UnpicklingError("it was not written by torch.save")
    for _ in ("protocol", "system"):
        _ShapeUnpickler(file).load()
    return _ShapeUnpickler(file).load()


class _ShapeUnpickler(pickle.Unpickler):
    """Reads tensors as `TensorInfo`; whatever else a training run left beside them becomes `_Ignored`."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, encoding="utf-8")

    def persistent_load(self, saved_id: tuple) -> _Storage:
        return saved_id[1]

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module == "torch._utils" and name in REBUILDERS:
            return REBUILDERS[name]
        if module in ("torch", "torch.storage") and name.endswith("Storage"):
            return _Storage(STORAGE_DTYPES.get(name, name))
        if module == "torch" and name in DTYPES:
            return name
        if module.split(".")[0] in BESIDE_THE_WEIGHTS:
            return _Ignored
        if module in ("builtins", "__builtin__") and name in BUILTINS_BESIDE_THE_WEIGHTS:
            return _Ignored
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no file of tensors needs")


@dataclass(frozen=True)
class _Storage:
    dtype: str


class _Ignored:
    """Stands for an object that is neither made nor looked at; takes whatever a pickle gives it."""

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


def _rebuild_tensor(storage: _Storage, offset: int, size: tuple[int, ...], *rest: Any) -> TensorInfo:
    return TensorInfo(tuple(size), storage.dtype)


def _rebuild_tensor_of_dtype(storage: _Storage, offset: int, size: tuple[int, ...], *rest: Any) -> TensorInfo:
    _stride, _requires_grad, _hooks, dtype = rest[:4]
    return TensorInfo(tuple(size), dtype)


def _rebuild_parameter(tensor: TensorInfo, *rest: Any) -> TensorInfo:
    return tensor


# the functions of torch._utils that torch.save names to rebuild a tensor → what is made of their arguments here
REBUILDERS = {
    "_rebuild_tensor": _rebuild_tensor,
    "_rebuild_tensor_v2": _rebuild_tensor,
    "_rebuild_tensor_v3": _rebuild_tensor_of_dtype,
    "_rebuild_parameter": _rebuild_parameter,
    "_rebuild_parameter_with_state": _rebuild_parameter,
}
