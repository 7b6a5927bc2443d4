"""The CUDA path computes what the mapping layers compute; its algorithm is run here on the CPU."""

from __future__ import annotations

import copy

import pytest
import torch

from lib_xadapter.cuda_mapping import CudaMapping
from lib_xadapter.cuda_mapping.graphs import Captures
from lib_xadapter.cuda_mapping.operations import TorchOperations
from lib_xadapter.mapping_paths import EagerMapping
from tests.cuda.mappings import (
    NO_TIME,
    SHAPES,
    CpuCapturer,
    OnTheCpu,
    base_feature,
    relative_error,
    released,
    upgraded_feature,
)
from tests.small_adapter import AdapterPlan

PLANS = {
    "released": AdapterPlan(),
    "one_block": AdapterPlan(blocks=1),
    "other_widths": AdapterPlan(in_channels=(24, 40, 16), out_channels=(24, 8, 16)),
}


def algorithm(adapter, device=None) -> CudaMapping:
    return CudaMapping(adapter, lambda dtype: TorchOperations(), device=device or OnTheCpu())


def both(plan=None, dtype=torch.float64) -> tuple[EagerMapping, CudaMapping]:
    """The reference, and the CUDA path's algorithm on the same weights."""
    adapter = released(dtype, plan)
    return EagerMapping(copy.deepcopy(adapter)), algorithm(adapter)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("level", [0, 1, 2])
def test_hidden_features_and_residuals_are_the_references(level, shape, plan):
    reference, path = both(PLANS[plan])
    feature = base_feature(level, shape, PLANS[plan])
    expected = reference.hidden(level, feature, NO_TIME)
    hidden = path.hidden(level, feature, NO_TIME)
    torch.testing.assert_close(hidden, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(path.residual(level, hidden), reference.residual(level, expected), rtol=0, atol=1e-10)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("level", [0, 1, 2])
def test_residuals_are_added_into_the_feature_itself(level, shape, channels_last):
    reference, path = both()
    base = base_feature(level, shape)
    expected_hidden = reference.hidden(level, base, NO_TIME)
    feature = upgraded_feature(expected_hidden, channels_last)
    expected = reference.add(level, feature.clone(), expected_hidden, 1.3)
    result = path.add(level, feature, path.hidden(level, base, NO_TIME), 1.3)
    assert result.data_ptr() == feature.data_ptr()
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "change",
    [
        lambda hidden: hidden[1:],
        lambda hidden: hidden[[1, 0]],
        lambda hidden: torch.stack([hidden.mean(0), hidden[0]]),
        lambda hidden: hidden.clone(),
        lambda hidden: hidden.contiguous(),
    ],
    ids=["some_rows", "rows_in_another_order", "averaged_rows", "copied", "not_channels_last"],
)
@pytest.mark.parametrize("channels_last", [False, True])
def test_hidden_features_may_be_rearranged_before_they_are_added(change, channels_last):
    reference, path = both()
    hidden = change(path.hidden(1, base_feature(1, (2, 3, 5)), NO_TIME))
    feature = upgraded_feature(hidden, channels_last)
    expected = reference.add(1, feature.clone(), hidden, 0.7)
    torch.testing.assert_close(path.add(1, feature, hidden, 0.7), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "change",
    [
        lambda feature: feature.half(),
        lambda feature: feature.transpose(2, 3).contiguous().transpose(2, 3),
        lambda feature: feature.clone().requires_grad_(),
    ],
    ids=["another_type", "other_strides", "with_gradients"],
)
def test_features_that_cannot_be_added_into_get_a_new_tensor(change):
    reference, path = both()
    hidden = path.hidden(0, base_feature(0, (1, 4, 4)), NO_TIME)
    feature = change(upgraded_feature(hidden))
    before = feature.detach().clone()
    result = path.add(0, feature, hidden, 0.7)
    assert result.data_ptr() != feature.data_ptr()
    assert torch.equal(feature, before)
    torch.testing.assert_close(result, reference.add(0, feature, hidden, 0.7))


def test_single_precision_is_as_near_as_rounding_allows():
    reference, path = both(dtype=torch.float32)
    feature = base_feature(2, (2, 3, 5))
    hidden = path.hidden(2, feature, NO_TIME)
    assert relative_error(hidden, reference.hidden(2, feature, NO_TIME)) < 1e-5


def test_no_second_copy_of_the_convolutions_is_made():
    adapter = released()
    path = algorithm(adapter)
    values = {name: value.clone() for name, value in adapter.state_dict().items()}
    path.hidden(0, base_feature(0, (1, 2, 2)), NO_TIME)
    blocks = [block for level in path._prepared.levels for block in level.blocks]
    prepared = {part.weight.data_ptr() for block in blocks for part in vars(block).values() if part is not None}
    assert prepared <= {parameter.data_ptr() for parameter in adapter.parameters()}
    assert all(torch.equal(value, values[name]) for name, value in adapter.state_dict().items())
    assert adapter.body[0].block1.weight.is_contiguous(memory_format=torch.channels_last)


def test_recordings_give_what_the_blocks_give():
    capturer = CpuCapturer()
    adapter = released(torch.float64)
    path = algorithm(adapter, OnTheCpu(lambda: Captures(capturer)))
    plain = algorithm(copy.deepcopy(adapter))
    for shape in SHAPES[:3] * 2:
        for level in range(3):
            feature = base_feature(level, shape) + shape[1]
            assert torch.equal(path.hidden(level, feature, NO_TIME), plain.hidden(level, feature, NO_TIME))
    assert capturer.captured == 9


def test_a_hidden_feature_stays_what_it_is_when_the_level_runs_again():
    path = algorithm(released(), OnTheCpu(lambda: Captures(CpuCapturer())))
    cond = path.hidden(2, base_feature(2, (1, 4, 4)), NO_TIME)
    before = cond.clone()
    uncond = path.hidden(2, base_feature(2, (1, 4, 4)) + 1, NO_TIME)
    assert torch.equal(cond, before)
    assert not torch.equal(cond, uncond)


def test_the_recording_that_was_unused_for_longest_is_forgotten():
    capturer = CpuCapturer()
    path = algorithm(released(), OnTheCpu(lambda: Captures(capturer, most=2)))
    square, wide, high = ((1, 4, 4), (1, 3, 5), (1, 5, 3))
    for shape in (square, wide, square, high, square):
        path.hidden(0, base_feature(0, shape), NO_TIME)
    assert capturer.captured == 3
    path.hidden(0, base_feature(0, wide), NO_TIME)
    assert capturer.captured == 4


def move(adapter) -> None:
    """As when the host takes the adapter off the GPU and brings it back: other memory, the same parameters."""
    for parameter in adapter.parameters():
        parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)


def test_weights_that_were_moved_are_prepared_anew():
    device = OnTheCpu(lambda: Captures(CpuCapturer()))
    adapter = released()
    path = algorithm(adapter, device)
    feature = base_feature(1, (2, 3, 5))
    before = path.hidden(1, feature, NO_TIME)
    path.hidden(1, feature, NO_TIME)
    assert device.runners_made == 1
    kept = [parameter.data for parameter in adapter.parameters()]
    move(adapter)
    for old in kept:
        old.fill_(float("nan"))
    assert torch.equal(path.hidden(1, feature, NO_TIME), before)
    assert device.runners_made == 2
    assert adapter.body[0].block1.weight.is_contiguous(memory_format=torch.channels_last)


def test_a_released_path_prepares_itself_again():
    device = OnTheCpu()
    path = algorithm(released(), device)
    feature = base_feature(0, (1, 4, 4))
    before = path.hidden(0, feature, NO_TIME)
    path.release()
    assert torch.equal(path.residual(0, before), path.residual(0, path.hidden(0, feature, NO_TIME)))
    assert device.runners_made == 2


@pytest.mark.parametrize("first", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("then", [torch.inference_mode, torch.no_grad])
def test_inference_mode_may_come_and_go(first, then):
    path = algorithm(released(), OnTheCpu(lambda: Captures(CpuCapturer())))
    results = []
    for mode in (first, then):
        with mode():
            hidden = path.hidden(0, base_feature(0, (1, 4, 4)), NO_TIME)
            results.append(path.add(0, upgraded_feature(hidden), hidden, 1.0))
    assert torch.equal(*results)
