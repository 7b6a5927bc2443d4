"""The operations on an NVIDIA GPU: cuDNN's convolutions, and one kernel of our own for all that follows them."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from .nvrtc import Kernel, compile_kernels
from .operations import Unfinished, as_hidden, hidden_memory, is_channels_last
from .weights import Convolution

SOURCE = Path(__file__).with_name("finish.cu")

CHANNELS_PER_THREAD = 8
"""Of 16 bits each: the widest that a thread loads and stores at once."""

ALIGNMENT = 16
"""In bytes, of what is loaded and stored so."""

THREADS = 256


class CudaOperations:
    """cuDNN and `finish.cu`, in half precision, on the device that is current when they are made.

    Args:
        dtype: torch.float16 or torch.bfloat16.
        fuse_relu: let cuDNN add bias and ReLU after the inner convolutions instead of `finish.cu`.
        benchmark: let cuDNN time its algorithms once per shape; never done where torch is to be deterministic.

    Raises:
        NvrtcError: the kernel cannot be compiled or loaded here.
    """

    def __init__(self, dtype: torch.dtype, fuse_relu: bool = False, benchmark: bool = True) -> None:
        major, minor = torch.cuda.get_device_capability()
        definitions = ("BFLOAT16",) if dtype == torch.bfloat16 else ()
        self._finish = Kernel(compile_kernels(SOURCE.read_text(), f"sm_{major}{minor}", definitions), "finish")
        self._deterministic = torch.backends.cudnn.deterministic or torch.are_deterministic_algorithms_enabled()
        self._benchmark = benchmark and not self._deterministic
        # cuDNN's fused convolution takes no wish for determinism
        self._fuse_relu = fuse_relu and not self._deterministic

    def upsample(self, x: Tensor, convolution: Convolution) -> Tensor:
        result = torch.cudnn_convolution_transpose(
            x,
            convolution.weight,
            (1, 1),  # padding
            (1, 1),  # output padding
            (2, 2),  # stride
            (1, 1),  # dilation
            1,
            self._benchmark,
            self._deterministic,
            True,
        )
        return self._finish_in_place(Unfinished(result, convolution.bias))

    def convolve(
        self, x: Tensor, convolution: Convolution, relu: bool = False, residual: Tensor | None = None
    ) -> Tensor:
        if relu and residual is None and self._fuse_relu:
            return self._convolve_with_relu(x, convolution)
        return self._finish_in_place(Unfinished(self._convolve(x, convolution), convolution.bias, residual), relu)

    def begin(self, x: Tensor, convolution: Convolution, residual: Tensor) -> Unfinished:
        return Unfinished(self._convolve(x, convolution), convolution.bias, residual)

    def finish(self, unfinished: Unfinished) -> Tensor:
        memory = hidden_memory(unfinished.convolution)
        self._launch(memory, unfinished, relu=False, pitch=memory.shape[-1])
        return as_hidden(memory)

    def _convolve(self, x: Tensor, convolution: Convolution) -> Tensor:
        around = convolution.weight.shape[-1] // 2
        return torch.cudnn_convolution(
            x,
            convolution.weight,
            (around, around),  # padding
            (1, 1),  # stride
            (1, 1),  # dilation
            1,
            self._benchmark,
            self._deterministic,
            True,
        )

    def _convolve_with_relu(self, x: Tensor, convolution: Convolution) -> Tensor:
        around = convolution.weight.shape[-1] // 2
        with _cudnn_benchmark(self._benchmark):
            return torch.cudnn_convolution_relu(
                x,
                convolution.weight,
                convolution.bias,
                (1, 1),  # stride
                (around, around),  # padding
                (1, 1),  # dilation
                1,
            )

    def _finish_in_place(self, unfinished: Unfinished, relu: bool = False) -> Tensor:
        result = unfinished.convolution
        self._launch(result, unfinished, relu, pitch=result.shape[1])
        return result

    def _launch(self, out: Tensor, unfinished: Unfinished, relu: bool, pitch: int) -> None:
        rows, channels, height, width = unfinished.convolution.shape
        for operand in (unfinished.convolution, unfinished.residual):
            if operand is not None and not is_channels_last(operand):
                raise RuntimeError(f"A feature of {tuple(operand.shape)} has strides {operand.stride()}.")
        for operand in (out, unfinished.convolution, unfinished.bias, unfinished.residual):
            # the GPU would stop for good at an address that is none of 16 bytes
            if operand is not None and operand.data_ptr() % ALIGNMENT:
                raise RuntimeError(f"A tensor of {tuple(operand.shape)} lies at {operand.data_ptr()}.")
        pixels, vectors = rows * height * width, pitch // CHANNELS_PER_THREAD
        if pixels * vectors >= 2**31:
            raise RuntimeError(f"A feature of {tuple(unfinished.convolution.shape)} is too large for one launch.")
        self._finish.launch(
            -(-pixels * vectors // THREADS),
            THREADS,
            _pointer(out),
            _pointer(unfinished.convolution),
            _pointer(unfinished.bias),
            _pointer(unfinished.residual),
            ctypes.c_int(relu),
            ctypes.c_uint(pixels),
            ctypes.c_uint(channels // CHANNELS_PER_THREAD),
            ctypes.c_uint(vectors),
        )


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


@contextmanager
def _cudnn_benchmark(wished: bool) -> Iterator[None]:
    """torch takes this wish for the fused convolution from its global setting alone."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = wished
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
