"""The CUDA path computes what the mapping layers compute; its algorithm is run here on the CPU."""

from __future__ import annotations

import copy

import pytest
import torch

from lib_xadapter.cuda_mapping import ChannelsLastMapping, CudaMapping
from lib_xadapter.mapping_paths import EagerMapping
from tests.cuda.mappings import SHAPES, base_feature, finish_by_torch, relative_error, released, upgraded_feature
from tests.small_adapter import AdapterPlan

PLANS = {
    "released": AdapterPlan(),
    "one_block": AdapterPlan(blocks=1),
    "other_widths": AdapterPlan(in_channels=(24, 40, 16), out_channels=(24, 8, 16)),
}

PATHS = {"channels_last": ChannelsLastMapping, "cuda": lambda adapter: CudaMapping(adapter, finish_by_torch)}


@pytest.fixture(params=PATHS)
def make_path(request):
    return PATHS[request.param]


def both(make_path, plan=None, dtype=torch.float64) -> tuple[EagerMapping, ChannelsLastMapping]:
    """The reference, and a path's algorithm on the same weights."""
    adapter = released(dtype, plan)
    return EagerMapping(copy.deepcopy(adapter)), make_path(adapter)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("level", [0, 1, 2])
def test_hidden_features_and_residuals_are_the_references(level, shape, plan, make_path):
    reference, path = both(make_path, PLANS[plan])
    feature = base_feature(level, shape, PLANS[plan])
    expected = reference.hidden(level, feature, None)
    hidden = path.hidden(level, feature, None)
    torch.testing.assert_close(hidden, expected, rtol=0, atol=1e-10)
    assert hidden.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(path.residual(level, hidden), reference.residual(level, expected), rtol=0, atol=1e-10)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("level", [0, 1, 2])
def test_residuals_are_added_into_the_feature_itself(level, shape, channels_last, make_path):
    reference, path = both(make_path)
    base = base_feature(level, shape)
    expected_hidden = reference.hidden(level, base, None)
    feature = upgraded_feature(expected_hidden, channels_last)
    expected = reference.add(level, feature.clone(), expected_hidden, 1.3)
    result = path.add(level, feature, path.hidden(level, base, None), 1.3)
    assert result.data_ptr() == feature.data_ptr()
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "change",
    [
        lambda hidden: hidden[1:],
        lambda hidden: hidden[[1, 0]],
        lambda hidden: torch.stack([hidden.mean(0), hidden[0]]),
        lambda hidden: hidden.contiguous(),
    ],
    ids=["some_rows", "rows_in_another_order", "averaged_rows", "not_channels_last"],
)
@pytest.mark.parametrize("channels_last", [False, True])
def test_hidden_features_may_be_rearranged_before_they_are_added(change, channels_last, make_path):
    reference, path = both(make_path)
    hidden = change(path.hidden(1, base_feature(1, (2, 3, 5)), None))
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
def test_features_that_cannot_be_added_into_get_a_new_tensor(change, make_path):
    reference, path = both(make_path)
    hidden = path.hidden(0, base_feature(0, (1, 4, 4)), None)
    feature = change(upgraded_feature(hidden))
    before = feature.detach().clone()
    result = path.add(0, feature, hidden, 0.7)
    assert result.data_ptr() != feature.data_ptr()
    assert torch.equal(feature, before)
    torch.testing.assert_close(result, reference.add(0, feature, hidden, 0.7))


def test_single_precision_is_as_near_as_rounding_allows(make_path):
    reference, path = both(make_path, dtype=torch.float32)
    feature = base_feature(2, (2, 3, 5))
    assert relative_error(path.hidden(2, feature, None), reference.hidden(2, feature, None)) < 1e-5


def test_the_base_feature_stays_what_it_is(make_path):
    _, path = both(make_path)
    feature = base_feature(0, (2, 3, 5)).double().contiguous(memory_format=torch.channels_last)
    before = feature.clone()
    path.hidden(0, feature, None)
    assert torch.equal(feature, before)


def test_the_adapters_own_weights_become_channels_last_and_no_copy_is_made(make_path):
    adapter = released()
    values = {name: value.clone() for name, value in adapter.state_dict().items()}
    path = make_path(adapter)
    assert path.adapter is adapter
    assert all(torch.equal(value, values[name]) for name, value in adapter.state_dict().items())
    assert adapter.body[0].block1.weight.is_contiguous(memory_format=torch.channels_last)


def test_weights_may_leave_and_come_back(make_path):
    """Nothing of theirs is kept elsewhere, and their layout comes back with them."""
    adapter = released()
    path = make_path(adapter)
    feature = base_feature(1, (2, 3, 5))
    before = path.hidden(1, feature, None)
    there = [parameter.data for parameter in adapter.parameters()]
    for parameter in adapter.parameters():
        parameter.data = parameter.data.clone()
    for old in there:
        old.fill_(float("nan"))
    assert torch.equal(path.hidden(1, feature, None), before)
    assert adapter.body[0].block1.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("first", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("then", [torch.inference_mode, torch.no_grad])
def test_inference_mode_may_come_and_go(first, then, make_path):
    path = make_path(released())
    results = []
    for mode in (first, then):
        with mode():
            hidden = path.hidden(0, base_feature(0, (1, 4, 4)), None)
            results.append(path.add(0, upgraded_feature(hidden), hidden, 1.0))
    assert torch.equal(*results)
