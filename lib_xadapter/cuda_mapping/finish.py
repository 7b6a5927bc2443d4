"""What follows a convolution, by one kernel: + bias, + residual, ReLU. Its source is `finish.cu`."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from .nvrtc import Kernel, compile_kernels

SOURCE = Path(__file__).with_name("finish.cu")

CHANNELS_PER_THREAD = 8
"""Of 16 bits each: the widest that a thread loads and stores at once."""

ALIGNMENT = 16
"""In bytes, of what is loaded and stored so."""

THREADS = 256


class Finish(Protocol):
    """Ends a convolution."""

    def __call__(self, x: Tensor, bias: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        """ReLU(x + bias + residual), channels-last.

        Args:
            x: what a convolution gave, (rows, channels, h, w), in half precision; it may be written into and returned.
            bias: (channels,).
            residual: of the size of `x`.
        """


class FinishKernel:
    """`finish.cu` on a device.

    Args:
        device: an NVIDIA GPU.
        dtype: torch.float16 or torch.bfloat16.

    Raises:
        NvrtcError: the kernel cannot be compiled or loaded here.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        definitions = ("BFLOAT16",) if dtype == torch.bfloat16 else ()
        code = compile_kernels(SOURCE.read_text(), torch.cuda.get_device_capability(device), definitions)
        self._kernel = Kernel(code, "finish", device)

    def __call__(self, x: Tensor, bias: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        out = x.contiguous(memory_format=torch.channels_last)
        if residual is not None:
            residual = residual.contiguous(memory_format=torch.channels_last)
        for operand in (out, bias, residual):
            # the GPU would stop for good at an address that is none of 16 bytes
            if operand is not None and operand.data_ptr() % ALIGNMENT:
                raise RuntimeError(f"A tensor of {tuple(operand.shape)} lies at {operand.data_ptr()}.")
        vectors = out.numel() // CHANNELS_PER_THREAD
        if vectors >= 2**31:
            raise RuntimeError(f"A feature of {tuple(out.shape)} is too large for one launch.")
        self._kernel.launch(
            -(-vectors // THREADS),
            THREADS,
            _pointer(out),
            _pointer(bias),
            _pointer(residual),
            ctypes.c_int(relu),
            ctypes.c_uint(vectors),
            ctypes.c_uint(out.shape[1] // CHANNELS_PER_THREAD),
        )
        return out


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())
