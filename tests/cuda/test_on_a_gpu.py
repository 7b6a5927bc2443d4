"""The CUDA path on a GPU: as exact as it has to be, on any stream, wherever its weights are moved, whatever fails."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from lib_xadapter.cuda_mapping.cuda_operations import CudaOperations
from lib_xadapter.cuda_mapping.eight_bits import eight_bit_obstacle, eight_bit_operations, triton_version

from lib_xadapter.cuda_mapping import CudaMapping, obstacle
from lib_xadapter.mapping_choice import FallbackMapping, choose_mapping_path
from lib_xadapter.mapping_paths import EagerMapping
from tests.cuda.mappings import NO_TIME, SHAPES, base_feature, relative_error, released, upgraded_feature
from tests.small_adapter import AdapterPlan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no NVIDIA GPU here"),
]

BOUNDS = {torch.float16: 5e-3, torch.bfloat16: 2e-2}
EIGHT_BIT_BOUND = 5e-2

RELEASED_WIDTHS = AdapterPlan(in_channels=(1280, 640, 320), out_channels=(1280, 1280, 640))


def triton_operations(dtype):
    from lib_xadapter.cuda_mapping.triton_operations import TritonOperations

    return TritonOperations(CudaOperations(dtype))


CANDIDATES = {
    "own_relu": CudaOperations,
    "cudnn_relu": lambda dtype: CudaOperations(dtype, fuse_relu=True),
    "heuristics": lambda dtype: CudaOperations(dtype, benchmark=False),
    "triton": triton_operations,
}


@pytest.fixture(params=BOUNDS, ids=str)
def dtype(request):
    return request.param


@pytest.fixture
def adapter(dtype):
    """Small mapping layers on the GPU."""
    layers = released(dtype).to("cuda")
    if (reason := obstacle(layers)) is not None:
        pytest.skip(f"this GPU cannot do it: {reason}")
    return layers


def needs(operations: str) -> None:
    if operations == "triton" and triton_version() is None:
        pytest.skip("Triton is not installed")


def exactly(adapter):
    """The same weights in double precision."""
    return EagerMapping(copy.deepcopy(adapter).double())


def on_the_gpu(level, shape, dtype, plan=None):
    return base_feature(level, shape, plan).to("cuda", dtype)


@pytest.mark.parametrize("operations", CANDIDATES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("level", [0, 1, 2])
def test_residuals_are_near_double_precision(level, shape, operations, adapter, dtype):
    needs(operations)
    exact = exactly(adapter)
    path = CudaMapping(adapter, CANDIDATES[operations])
    for step in range(3):
        feature = on_the_gpu(level, shape, dtype) * (1 + step)
        expected = exact.residual(level, exact.hidden(level, feature, NO_TIME))
        hidden = path.hidden(level, feature, NO_TIME)
        assert relative_error(path.residual(level, hidden), expected) < BOUNDS[dtype]
        for channels_last in (False, True):
            upgraded = upgraded_feature(hidden, channels_last)
            total = upgraded.double() + 1.2 * expected
            result = path.add(level, upgraded, hidden, 1.2)
            assert result.data_ptr() == upgraded.data_ptr()
            assert relative_error(result, total) < BOUNDS[dtype]


@pytest.mark.parametrize("level", [0, 1, 2])
def test_the_released_widths_are_near_double_precision(level, dtype):
    adapter = released(dtype, RELEASED_WIDTHS).to("cuda")
    if (reason := obstacle(adapter)) is not None:
        pytest.skip(f"this GPU cannot do it: {reason}")
    feature = on_the_gpu(level, (2, 13, 19), dtype, RELEASED_WIDTHS)
    exact = exactly(adapter)
    path = CudaMapping(adapter)
    result = path.residual(level, path.hidden(level, feature, NO_TIME))
    assert relative_error(result, exact.residual(level, exact.hidden(level, feature, NO_TIME))) < BOUNDS[dtype]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("level", [0, 1, 2])
def test_eight_bits_stay_within_their_bound(level, shape, adapter, dtype):
    if (reason := eight_bit_obstacle(adapter)) is not None:
        pytest.skip(reason)
    feature = on_the_gpu(level, shape, dtype)
    exact = exactly(adapter)
    path = CudaMapping(adapter, eight_bit_operations)
    result = path.residual(level, path.hidden(level, feature, NO_TIME))
    error = relative_error(result, exact.residual(level, exact.hidden(level, feature, NO_TIME)))
    assert error < EIGHT_BIT_BOUND


def test_quantising_rounds_to_the_nearest_number(adapter, dtype):
    if (reason := eight_bit_obstacle(adapter)) is not None:
        pytest.skip(reason)
    from lib_xadapter.cuda_mapping.triton_convolution import quantize

    feature = on_the_gpu(1, (3, 3, 5), dtype)
    eight_bits = quantize(feature)
    expected = (feature.float() / eight_bits.scale[:, None, None, None]).to(torch.float8_e4m3fn)
    assert torch.equal(eight_bits.values.float(), expected.float())


def test_graphs_compute_what_single_launches_compute(adapter, dtype):
    captured = CudaMapping(adapter, lambda dtype: CudaOperations(dtype, benchmark=False))
    launched = CudaMapping(adapter, lambda dtype: CudaOperations(dtype, benchmark=False), graphs=False)
    for shape in SHAPES[:3] * 2:
        for level in range(3):
            feature = on_the_gpu(level, shape, dtype)
            assert torch.equal(captured.hidden(level, feature, NO_TIME), launched.hidden(level, feature, NO_TIME))


def test_hidden_features_stay_what_they_are_while_other_levels_and_shapes_run(adapter, dtype):
    path = CudaMapping(adapter)
    kept = []
    for shape in SHAPES[:3] * 2:
        for level in range(3):
            hidden = path.hidden(level, on_the_gpu(level, shape, dtype), NO_TIME)
            kept.append((hidden, hidden.clone()))
    assert all(torch.equal(hidden, copied) for hidden, copied in kept)


def test_features_may_come_on_changing_streams(adapter, dtype):
    path = CudaMapping(adapter)
    features = [on_the_gpu(2, (2, 32, 32), dtype) * (1 + step) for step in range(8)]
    expected = [path.hidden(2, feature, NO_TIME) for feature in features]
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    results = []
    for step, feature in enumerate(features):
        with torch.cuda.stream(streams[step % 2]):
            results.append(path.hidden(2, feature, NO_TIME))
    torch.cuda.synchronize()
    assert all(torch.equal(result, one) for result, one in zip(results, expected, strict=True))


def test_weights_may_leave_and_come_back(adapter, dtype):
    path = CudaMapping(adapter, lambda dtype: CudaOperations(dtype, benchmark=False))
    feature = on_the_gpu(1, (2, 3, 5), dtype)
    before = path.hidden(1, feature, NO_TIME)
    adapter.to("cpu")
    path.release()
    occupied = torch.full((64, 1024, 1024), float("nan"), device="cuda")
    adapter.to("cuda")
    assert torch.equal(path.hidden(1, feature, NO_TIME), before)
    del occupied


@pytest.mark.parametrize("channels_last", [False, True])
def test_adding_makes_no_tensor(channels_last, adapter, dtype):
    path = CudaMapping(adapter)
    hidden = path.hidden(2, on_the_gpu(2, (8, 32, 32), dtype), NO_TIME)
    upgraded = upgraded_feature(hidden, channels_last)
    path.add(2, upgraded, hidden, 1.0)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    path.add(2, upgraded, hidden, 1.0)
    assert torch.cuda.max_memory_allocated() - before < upgraded.numel() * upgraded.element_size()


def test_nothing_waits_for_the_gpu(adapter, dtype):
    path = CudaMapping(adapter)
    features = [on_the_gpu(level, (2, 4, 4), dtype) for level in range(3)]

    def step():
        for level, feature in enumerate(features):
            hidden = path.hidden(level, feature, NO_TIME)
            path.add(level, hidden.clone(), hidden, 1.0)

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_autocast_and_inference_mode_change_nothing(adapter, dtype):
    path = CudaMapping(adapter, lambda dtype: CudaOperations(dtype, benchmark=False))
    feature = on_the_gpu(0, (2, 3, 5), dtype)
    other = torch.bfloat16 if dtype == torch.float16 else torch.float16
    with torch.inference_mode(), torch.autocast("cuda", other):
        first = path.hidden(0, feature, NO_TIME)
        added = path.add(0, upgraded_feature(first), first, 1.0)
    again = path.hidden(0, feature, NO_TIME)
    assert torch.equal(again, first)
    assert torch.equal(path.add(0, upgraded_feature(again), again, 1.0), added)


def test_cudnns_own_relu_reads_nothing_of_what_lies_in_its_results_memory(adapter, dtype):
    """torch hands cuDNN the result itself as the tensor to add, times zero: NaN there must not come through."""
    operations = CudaOperations(dtype, fuse_relu=True)
    path = CudaMapping(adapter, lambda dtype: operations, graphs=False)
    feature = on_the_gpu(1, (2, 16, 16), dtype)
    path.hidden(1, feature, NO_TIME)
    rubbish = [torch.full((2, 128, 32, 32), float("nan"), device="cuda", dtype=dtype) for _ in range(8)]
    del rubbish
    assert torch.isfinite(path.hidden(1, feature, NO_TIME)).all()


class OutOfMemoryWhileCapturing(CudaOperations):
    """Has no memory left for a level's last convolution, once that is captured."""

    def begin(self, *arguments):
        if torch.cuda.is_current_stream_capturing():
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return super().begin(*arguments)


def test_a_capture_without_memory_leaves_the_eager_layers_to_work(adapter, dtype, caplog):
    caplog.set_level(logging.INFO)
    path = FallbackMapping(CudaMapping(adapter, OutOfMemoryWhileCapturing), EagerMapping(adapter))
    stream = torch.cuda.current_stream()
    feature = on_the_gpu(2, (2, 3, 5), dtype)
    expected = EagerMapping(adapter).hidden(2, feature, NO_TIME)
    for _ in range(2):
        assert relative_error(path.hidden(2, feature, NO_TIME), expected) < BOUNDS[dtype]
    assert torch.cuda.current_stream() == stream
    assert len(caplog.records) == 1
    another = CudaMapping(adapter)
    assert relative_error(another.hidden(2, feature, NO_TIME), expected) < BOUNDS[dtype]


@pytest.mark.parametrize("fp8", [False, True])
def test_the_path_that_is_chosen_does_not_fail(fp8, adapter, dtype, caplog):
    if fp8 and (reason := eight_bit_obstacle(adapter)) is not None:
        pytest.skip(reason)
    caplog.set_level(logging.INFO)
    path = choose_mapping_path(adapter, fp8=fp8)
    assert isinstance(path, FallbackMapping)
    for level in range(3):
        hidden = path.hidden(level, on_the_gpu(level, (2, 4, 4), dtype), NO_TIME)
        path.add(level, upgraded_feature(hidden), hidden, 1.0)
    assert not caplog.records
