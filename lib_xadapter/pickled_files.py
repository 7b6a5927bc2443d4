"""What torch.save wrote, read without torch and without making any object of it.

A zip file with a pickle and the weights, or (before torch 1.6) pickles one after the other, then the weights. Instead
of torch.load: up to torch 2.5 that hands TorchScript archives to a loader that runs their code, whatever it is told
(CVE-2025-32434), and up to 2.9 its unpickler can be made to write outside of a tensor (CVE-2026-24747).
"""

from __future__ import annotations

import collections
import io
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

from .errors import WrongFile, first_line

ZIP_START = b"PK"
MAGIC_NUMBER_BEFORE_ZIP = 0x1950A86A20F9469CFC6C
LENGTH_BYTES = 8
"""Before the weights of each storage in files before the zip: how many numbers there are."""

BYTES = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint64": 8,
    "uint32": 4,
    "uint16": 2,
    "uint8": 1,
    "bool": 1,
}
"""Of a number, by torch's names of types."""

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
    "UntypedStorage": "uint8",
}

# modules whose objects stand beside the weights in old checkpoints (training state), and say nothing about them
BESIDE_THE_WEIGHTS = frozenset({"_codecs", "collections", "lightning", "numpy", "pytorch_lightning", "torch"})
BUILTINS_BESIDE_THE_WEIGHTS = frozenset({"float", "int", "long", "set"})


@dataclass(frozen=True)
class Storage:
    """Numbers in a file that tensors are parts of.

    Attributes:
        key: by which the file names them.
        dtype: torch's name of the type that they are saved as.
        numbers: how many.
        begin: at which of all that have this key they begin.
    """

    key: str
    dtype: str
    numbers: int
    begin: int = 0


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file.

    Attributes:
        storage: that it is a part of.
        dtype: torch's name of its type.
        offset, shape, stride: of its numbers in the storage, counted in numbers of its own type.
    """

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class Ignored:
    """Stands for an object that is neither made nor looked at; takes whatever a pickle gives it."""

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


class Named(Ignored):
    """A `torch.nn.ParameterDict`, which the first trainer of textual inversions kept its vectors in."""

    def __init__(self, *arguments: Any) -> None:
        self.content: Mapping[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, Mapping):
            self.content = state.get("_parameters") or {}


@dataclass(frozen=True)
class PickledFile:
    """A file of torch.save, open.

    Attributes:
        content: with a `StoredTensor` in the place of each tensor, and `Ignored` for what is none of the plain types.
        weights: storage keys → their bytes, read when they are asked for.
    """

    content: Any
    weights: Callable[[str], bytes]


@contextmanager
def opened(file: BinaryIO, name: str) -> Iterator[PickledFile]:
    """A file's content.

    Args:
        file: at its beginning.
        name: for errors.

    Raises:
        WrongFile: it is cut off, not from torch.save, or asks for objects that no file of tensors needs.
    """
    start = file.read(len(ZIP_START))
    file.seek(0)
    with ExitStack() as scope:
        with _as_wrong_file(name):
            whole = _zipped(scope.enter_context(zipfile.ZipFile(file))) if start == ZIP_START else _before_zip(file)

        def weights(key: str) -> bytes:
            with _as_wrong_file(name, but=MemoryError):
                return whole.weights(key)

        yield PickledFile(whole.content, weights)


@contextmanager
def _as_wrong_file(name: str, but: type[Exception] = WrongFile) -> Iterator[None]:
    try:
        yield
    except (OSError, WrongFile, but):
        raise
    except Exception as error:  # a broken pickle can raise anything
        raise WrongFile(f"{name} is cut off or is no PyTorch file of tensors: {first_line(error)}") from error


def _zipped(archive: zipfile.ZipFile) -> PickledFile:
    pickles = [member for member in archive.namelist() if member.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise pickle.UnpicklingError(f"the zip file holds {len(pickles)} 'data.pkl', expected one")
    folder = pickles[0].removesuffix("data.pkl")
    order = f"{folder}byteorder"
    if order in archive.namelist() and _member(archive, order) != b"little":
        raise pickle.UnpicklingError("its weights are not little-endian")
    content = _Unpickler(io.BytesIO(_member(archive, pickles[0]))).load()
    return PickledFile(content, lambda key: _member(archive, f"{folder}data/{key}"))


def _member(archive: zipfile.ZipFile, name: str) -> bytes:
    """Of as many bytes as the file itself has for it: torch.save compresses nothing."""
    if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
        raise pickle.UnpicklingError(f"'{name}' is compressed, which torch.save never does")
    return archive.read(name)


def _before_zip(file: BinaryIO) -> PickledFile:
    """Magic number, protocol, system, content, names of the storages, weights."""
    if _Unpickler(file).load() != MAGIC_NUMBER_BEFORE_ZIP:
        raise pickle.UnpicklingError("it was not written by torch.save")
    for _ in ("protocol", "system"):
        _Unpickler(file).load()
    reader = _Unpickler(file)
    content = reader.load()
    begins, size = file.tell(), file.seek(0, io.SEEK_END)

    def weights(wanted: str) -> bytes:
        file.seek(begins)
        for key in map(str, _Unpickler(file).load()):
            length = int.from_bytes(file.read(LENGTH_BYTES), "little") * BYTES[reader.dtypes[key]]
            if length > size - file.tell():
                raise EOFError(f"the weights '{key}' are longer than what is left of the file")
            if key == wanted:
                return file.read(length)
            file.seek(length, io.SEEK_CUR)
        raise KeyError(f"there are no weights '{wanted}'")

    return PickledFile(content, weights)


class _Unpickler(pickle.Unpickler):
    """Reads tensors as `StoredTensor`; whatever else a training run left beside them becomes `Ignored`.

    Attributes:
        dtypes: of the storages that were met, by key.
    """

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, encoding="utf-8")
        self.dtypes: dict[str, str] = {}

    def persistent_load(self, saved_id: Sequence[Any]) -> Any:
        """ "storage", its type, its key, its device, its length, and before the zip the part of it that is meant; or
        "module", its class, and the class's source."""
        if saved_id[0] == "module":
            return saved_id[1]
        dtype, key, numbers = saved_id[1], str(saved_id[2]), int(saved_id[4])
        if not isinstance(dtype, str):
            raise pickle.UnpicklingError("a storage's type is none")
        self.dtypes[key] = dtype
        if len(saved_id) > 5 and saved_id[5] is not None:
            _, begin, numbers = saved_id[5]
            return Storage(key, dtype, int(numbers), int(begin))
        return Storage(key, dtype, numbers)

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module == "torch._utils" and name in REBUILDERS:
            return REBUILDERS[name]
        if module in ("torch", "torch.storage") and name.endswith("Storage"):
            return STORAGE_DTYPES.get(name, name)
        if module == "torch" and name in BYTES:
            return name
        if (module, name) == ("torch.nn.modules.container", "ParameterDict"):
            return Named
        if module.split(".")[0] in BESIDE_THE_WEIGHTS:
            return Ignored
        if module in ("builtins", "__builtin__") and name in BUILTINS_BESIDE_THE_WEIGHTS:
            return Ignored
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no file of tensors needs")


def _rebuild_tensor(
    storage: Storage, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *rest: Any
) -> StoredTensor:
    return _stored(storage, storage.dtype, offset, shape, stride)


def _rebuild_tensor_of_dtype(
    storage: Storage, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *rest: Any
) -> StoredTensor:
    _requires_grad, _hooks, dtype = rest[:3]
    return _stored(storage, dtype, offset, shape, stride)


def _stored(storage: Storage, dtype: str, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> StoredTensor:
    """Raises: pickle.UnpicklingError: an argument is of another type than torch.save writes."""
    whole = all(isinstance(number, int) for number in (offset, *shape, *stride))
    if not isinstance(storage, Storage) or not isinstance(dtype, str) or not whole or len(shape) != len(stride):
        raise pickle.UnpicklingError("a tensor's storage, type or shape is none")
    return StoredTensor(storage, dtype, offset, tuple(shape), tuple(stride))


def _rebuild_parameter(tensor: StoredTensor, *rest: Any) -> StoredTensor:
    return tensor


# the functions of torch._utils that torch.save names to rebuild a tensor → what is made of their arguments here
REBUILDERS: Mapping[str, Callable[..., StoredTensor]] = {
    "_rebuild_tensor": _rebuild_tensor,
    "_rebuild_tensor_v2": _rebuild_tensor,
    "_rebuild_tensor_v3": _rebuild_tensor_of_dtype,
    "_rebuild_parameter": _rebuild_parameter,
    "_rebuild_parameter_with_state": _rebuild_parameter,
}
