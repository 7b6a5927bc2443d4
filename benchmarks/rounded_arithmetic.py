"""Bfloat16 on CPUs that cannot compute in it.

Without AVX-512, torch multiplies bfloat16 by loops that are a hundred times slower than float32. Here each linear layer
and convolution is computed in float32 from bfloat16 tensors, and its result rounded again. What is kept between layers
stays bfloat16; the float32 copies of one layer at a time come on top, so that a peak of memory can only be higher.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

ROUNDED = torch.bfloat16
LAYERS: tuple[Callable[..., Tensor], ...] = (nn.functional.linear, torch.conv2d, torch.conv_transpose2d)


def can_compute_in_bfloat16() -> bool:
    """Whether this CPU can."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


@contextmanager
def rounded_arithmetic() -> Iterator[None]:
    """Linear layers and convolutions of bfloat16 tensors, or under bfloat16 autocast, are computed in float32."""
    with _Rounded():
        yield


class _Rounded(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        if func in LAYERS and (args[0].dtype == ROUNDED or torch.is_autocast_enabled("cpu")):
            x, weight, bias, *more = (*args, named.pop("bias", None)) if len(args) == 2 else args
            return _Layer.apply(x.to(ROUNDED), weight.to(ROUNDED), _rounded(bias), func, tuple(more), named)
        return func(*args, **named)


def _rounded(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.to(ROUNDED)


class _Layer(torch.autograd.Function):
    """A layer whose tensors are kept as they are and whose arithmetic is float32's, both ways."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: Any, more: tuple, named: Any
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.computed = lambda *inputs: layer(*inputs, *more, **named)
        with torch.autocast("cpu", enabled=False):
            return ctx.computed(*_floats(x, weight, bias)).to(ROUNDED)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[:3]
        with torch.enable_grad(), torch.autocast("cpu", enabled=False):
            inputs = [
                value if value is None else value.detach().requires_grad_(want)
                for value, want in zip(_floats(*ctx.saved_tensors), wanted, strict=True)
            ]
            made = ctx.computed(*inputs)
        asked = [value for value, want in zip(inputs, wanted, strict=True) if want]
        found = iter(torch.autograd.grad(made, asked, gradient.float()))
        return *(next(found).to(ROUNDED) if want else None for want in wanted), None, None, None


def _floats(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.float() for tensor in tensors]
