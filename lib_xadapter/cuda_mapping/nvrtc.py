"""CUDA C++ compiled while the program runs, by the compiler library that torch brings along.

Bound with ctypes, for torch 2.1 has nothing public that compiles more than elementwise expressions, and nobody who
installs this is to need a compiler. Sources: NVRTC and CUDA driver API references.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch


class NvrtcError(RuntimeError):
    """A kernel cannot be compiled, loaded or launched."""


def compile_kernels(source: str, capability: tuple[int, int], definitions: Sequence[str] = ()) -> bytes:
    """Code for cards of a compute capability, out of CUDA C++.

    Machine code, which no driver of such a card is too old for. Where NVRTC is older than the card, PTX of the newest
    architecture that it knows, which the driver translates.

    Args:
        source: self-contained, with kernels declared `extern "C"`.
        capability: (8, 6), …
        definitions: macros that are defined.

    Raises:
        NvrtcError: there is no NVRTC, it has given the card up, or the source is wrong.
    """
    library = _nvrtc()
    card = 10 * capability[0] + capability[1]
    known = [architecture for architecture in _architectures(library) if architecture <= card]
    if not known:
        raise NvrtcError(f"This NVRTC compiles no more for compute capability {capability[0]}.{capability[1]}.")
    if max(known) == card:
        return _compile(library, source, f"sm_{card}", definitions, "CUBIN")
    return _compile(library, source, f"compute_{max(known)}", definitions, "PTX")


def _architectures(library: ctypes.CDLL) -> Sequence[int]:
    count = ctypes.c_int()
    _check(library, library.nvrtcGetNumSupportedArchs(ctypes.byref(count)))
    architectures = (ctypes.c_int * count.value)()
    _check(library, library.nvrtcGetSupportedArchs(architectures))
    return list(architectures)


def _compile(library: ctypes.CDLL, source: str, architecture: str, definitions: Sequence[str], kind: str) -> bytes:
    program = ctypes.c_void_p()
    _check(library, library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None))
    try:
        options = [f"--gpu-architecture={architecture}", *(f"-D{name}" for name in definitions)]
        encoded = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        if library.nvrtcCompileProgram(program, len(options), encoded):
            raise NvrtcError(f"NVRTC does not compile for {architecture}: {_log(library, program)}")
        size = ctypes.c_size_t()
        _check(library, getattr(library, f"nvrtcGet{kind}Size")(program, ctypes.byref(size)))
        code = ctypes.create_string_buffer(size.value)
        _check(library, getattr(library, f"nvrtcGet{kind}")(program, code))
        return code.raw
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


class Kernel:
    """A kernel on a device, out of code for it.

    Raises:
        NvrtcError: the driver does not take the code.
    """

    def __init__(self, code: bytes, name: str, device: torch.device) -> None:
        self._driver = _driver()
        self._device = device
        module = ctypes.c_void_p()
        self._function = ctypes.c_void_p()
        with _context_of(device):
            self._check(self._driver.cuModuleLoadData(ctypes.byref(module), code))
            self._check(self._driver.cuModuleGetFunction(ctypes.byref(self._function), module, name.encode()))

    def launch(self, blocks: int, threads: int, *arguments: ctypes._SimpleCData) -> None:
        """Start the kernel on the device's current stream, in one dimension, with ctypes values as its arguments."""
        addresses = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(argument) for argument in arguments))
        with torch.cuda.device(self._device):
            stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
            self._check(
                self._driver.cuLaunchKernel(self._function, blocks, 1, 1, threads, 1, 1, 0, stream, addresses, None)
            )

    def _check(self, result: int) -> None:
        if not result:
            return
        name = ctypes.c_char_p()
        self._driver.cuGetErrorName(result, ctypes.byref(name))
        raise NvrtcError(f"The CUDA driver answers {(name.value or str(result).encode()).decode()}.")


def nvrtc_libraries() -> Iterator[str]:
    """Where NVRTC may be: the one of torch's own CUDA version first."""
    windows = sys.platform == "win32"
    pattern = "nvrtc64_*.dll" if windows else "libnvrtc*.so*"
    folders = [Path(torch.__file__).parent / "lib"]
    packages = importlib.util.find_spec("nvidia")
    for place in packages.submodule_search_locations or () if packages else ():
        folders += sorted(Path(place).glob("*/bin*" if windows else "*/lib"), reverse=True)
        folders += sorted(Path(place).glob("*/bin/*")) if windows else []
    folders.append(Path(sys.prefix) / ("Library/bin" if windows else "lib"))
    found = [file for folder in folders for file in sorted(folder.glob(pattern)) if _is_compiler(file.name)]
    yield from sorted(map(str, found), key=lambda path: not _fits_torch(Path(path).name))
    if (installed := ctypes.util.find_library("nvrtc")) is not None:
        yield installed


def _is_compiler(name: str) -> bool:
    return "builtins" not in name and ".alt." not in name


def _fits_torch(name: str) -> bool:
    major = (torch.version.cuda or "").partition(".")[0]
    return f".so.{major}" in name or f"64_{major}" in name


def _nvrtc() -> ctypes.CDLL:
    for path in nvrtc_libraries():
        try:
            return ctypes.CDLL(path)
        except OSError:
            continue  # the next one may load; that none did is told below
    raise NvrtcError("There is no NVRTC library beside torch.")


@contextmanager
def _context_of(device: torch.device) -> Iterator[None]:
    with torch.cuda.device(device):
        # a thread that has not used CUDA yet has no context that code could be loaded into
        torch.zeros(1, device=device)
        yield


def _driver() -> ctypes.CDLL:
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        return ctypes.CDLL(name)
    except OSError as error:
        raise NvrtcError(f"There is no CUDA driver: {error}.") from error


def _check(library: ctypes.CDLL, result: int) -> None:
    if result:
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise NvrtcError(f"NVRTC answers {library.nvrtcGetErrorString(result).decode()}.")


def _log(library: ctypes.CDLL, program: ctypes.c_void_p) -> str:
    size = ctypes.c_size_t()
    _check(library, library.nvrtcGetProgramLogSize(program, ctypes.byref(size)))
    log = ctypes.create_string_buffer(size.value)
    _check(library, library.nvrtcGetProgramLog(program, log))
    return " ".join(log.value.decode(errors="replace").split())
