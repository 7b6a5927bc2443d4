"""Muon: the changes of matrices have one size in every direction; the rest is AdamW's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lib_xadapter.mapping import BlockLayout, MappingLayers
from lib_xadapter.training.muon import LIKE_ADAMW, Muon, is_matrix, orthogonal
from lib_xadapter.training.recipe import Recipe
from lib_xadapter.training.state import optimizers_of

WIDE, TALL, CONVOLUTION = (32, 64), (64, 32), (32, 16, 3, 3)


def singular_values(change: torch.Tensor) -> torch.Tensor:
    return torch.linalg.svdvals(change.flatten(1))


@pytest.mark.parametrize("shape", [WIDE, TALL])
def test_directions_stay_and_their_sizes_come_near_one(shape):
    matrix = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    found = orthogonal(matrix)
    assert (torch.linalg.svdvals(found) - 1).abs().max() < 0.35
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    among = left.mT @ found @ right.mT
    torch.testing.assert_close(among, torch.diag_embed(among.diagonal(dim1=1, dim2=2)), atol=1e-3, rtol=0)


@pytest.mark.parametrize("shape", [WIDE, TALL, CONVOLUTION])
def test_a_step_is_as_large_whatever_the_gradient(shape):
    changes = []
    for size in (1e-4, 1.0, 1e4):
        weight = nn.Parameter(torch.zeros(shape))
        weight.grad = size * torch.randn(shape, generator=torch.Generator().manual_seed(0))
        Muon([weight], lr=0.01, weight_decay=0).step()
        changes.append(weight.detach())
    assert singular_values(changes[0]).mean() == pytest.approx(
        0.01 * LIKE_ADAMW * max(changes[0].flatten(1).shape) ** 0.5, rel=0.2
    )
    for change in changes[1:]:
        torch.testing.assert_close(change, changes[0], atol=1e-5, rtol=1e-2)


def test_a_wide_adapter_learns_by_both_and_a_thin_one_by_adamw_alone():
    def taken(width: int) -> list[set[bool]]:
        layers = MappingLayers([[BlockLayout(width, width)]] * 3)
        found = optimizers_of(list(layers.parameters()), Recipe(optimizer="muon"))
        return [{is_matrix(weight) for weight in one.param_groups[0]["params"]} for one in found]

    assert taken(32) == [{False}, {True}]
    assert taken(1) == [{False}]
