"""Muon (Jordan et al., 2024, kellerjordan.github.io/posts/muon): momentum whose matrices are made orthogonal.

A VAE of these learned as much in a third of AdamW's steps. torch.optim.Muon takes no convolutions and one matrix at
a time, which costs more than the step itself where all layers are small: here all of one shape go together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the Newton-Schulz iteration: they bring singular values from 0 up near 1 in a few rounds."""
ROUNDS = 5
LIKE_ADAMW = 0.2
"""Size of a change by which rates of AdamW fit (Liu et al., 2025, arXiv 2502.16982, section 2.2)."""
SMALLEST = 16
"""Rows and columns from which a weight counts as a matrix."""


def is_matrix(weight: Tensor) -> bool:
    """Whether Muon is for this weight; convolutions count with all their inputs in a row."""
    return weight.ndim > 1 and min(weight.flatten(1).shape) >= SMALLEST


class Muon(Optimizer):
    """Of weights that `is_matrix` is true for.

    Args:
        weights: of any such shapes.
        lr: as AdamW would have it.
        momentum: Nesterov's.
        weight_decay: as AdamW's.
    """

    def __init__(
        self, weights: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.01
    ) -> None:
        super().__init__(weights, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """One step. Raises: ValueError: there is a closure."""
        if closure is not None:
            raise ValueError("Muon takes no closure.")
        for group in self.param_groups:
            self._step(group["params"], group["lr"], group["momentum"], group["weight_decay"])

    def _step(self, weights: list[nn.Parameter], rate: float, momentum: float, decay: float) -> None:
        weights = [weight for weight in weights if weight.grad is not None]
        gradients = [weight.grad for weight in weights]
        averages = [self.state[weight].setdefault("average", torch.zeros_like(weight)) for weight in weights]
        torch._foreach_lerp_(averages, gradients, 1 - momentum)
        ahead = torch._foreach_lerp(gradients, averages, momentum)
        torch._foreach_mul_(weights, 1 - rate * decay)
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for number, change in enumerate(ahead):
            by_shape.setdefault(tuple(change.flatten(1).shape), []).append(number)
        for shape, numbers in by_shape.items():
            changes = orthogonal(torch.stack([ahead[number].flatten(1) for number in numbers]))
            size = rate * LIKE_ADAMW * max(shape) ** 0.5
            for number, change in zip(numbers, changes, strict=True):
                weights[number].add_(change.view_as(weights[number]), alpha=-size)


def orthogonal(matrices: Tensor) -> Tensor:
    """Matrices (n, rows, columns) with about the same singular vectors and singular values near 1.

    The iteration X ← aX + b(XXᵀ)X + c(XXᵀ)²X only multiplies X from the left by what commutes with XXᵀ, so it is run
    on the smaller XXᵀ, and X is multiplied once.
    """
    if matrices.shape[1] > matrices.shape[2]:
        return orthogonal(matrices.mT).mT
    scaled = matrices / (torch.linalg.matrix_norm(matrices)[:, None, None] + 1e-7)
    gram = scaled @ scaled.mT
    first, second, third = COEFFICIENTS
    one = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    whole = one.expand_as(gram)
    for _ in range(ROUNDS):
        factor = first * one + second * gram + third * (gram @ gram)
        whole = factor @ whole
        gram = factor @ gram @ factor
    return whole @ scaled
