"""Bfloat16 on CPUs that cannot compute in it.

Without AVX-512, torch multiplies bfloat16 by loops that are a hundred times slower than float32. Here each linear layer
and convolution is computed in float32 from bfloat16 tensors, and its result rounded again. What is kept between layers
stays bfloat16; the float32 copies of one layer at a time come on top, so that a peak of memory can only be higher.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

ROUNDED = torch.bfloat16
LAYERS = ("linear", "conv2d", "conv_transpose2d")
"""By their names in torch.nn.functional, under which modules call them."""


def can_compute_in_bfloat16() -> bool:
    """Whether this CPU can."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


@contextmanager
def rounded_arithmetic() -> Iterator[None]:
    """Linear layers and convolutions of bfloat16 tensors, or under bfloat16 autocast, are computed in float32."""
    own = {name: getattr(functional, name) for name in LAYERS}
    try:
        for name, layer in own.items():
            setattr(functional, name, functools.partial(_computed, layer))
        yield
    finally:
        for name, layer in own.items():
            setattr(functional, name, layer)


def _computed(
    layer: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None = None, *more: Any, **named: Any
) -> Tensor:
    if x.dtype != ROUNDED and not torch.is_autocast_enabled("cpu"):
        return layer(x, weight, bias, *more, **named)
    rounded = (None if tensor is None else tensor.to(ROUNDED) for tensor in (x, weight, bias))
    return _Layer.apply(*rounded, lambda *inputs: layer(*inputs, *more, **named))


class _Layer(torch.autograd.Function):
    """A layer whose tensors are kept as they are and whose arithmetic is float32's, both ways."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: Callable[..., Tensor]) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.layer = layer
        with torch.autocast("cpu", enabled=False):
            return layer(*_floats(x, weight, bias)).to(ROUNDED)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[:3]
        with torch.enable_grad(), torch.autocast("cpu", enabled=False):
            inputs = [
                tensor if tensor is None else tensor.detach().requires_grad_(want)
                for tensor, want in zip(_floats(*ctx.saved_tensors), wanted, strict=True)
            ]
            made = ctx.layer(*inputs)
        asked = [tensor for tensor, want in zip(inputs, wanted, strict=True) if want]
        found = iter(torch.autograd.grad(made, asked, gradient.float()))
        return *(next(found).to(ROUNDED) if want else None for want in wanted), None


def _floats(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.float() for tensor in tensors]
