"""The CUDA path on a GPU: as exact as it has to be, on any stream, wherever its weights are moved, whatever fails."""

from __future__ import annotations

import copy
import logging
import threading

import pytest
import torch
from torch.nn import functional

from lib_xadapter.cuda_mapping import ChannelsLastMapping, CudaMapping, nvrtc, obstacle
from lib_xadapter.mapping_choice import ACCURACY, CheckedMapping, choose_mapping_path
from lib_xadapter.mapping_paths import EagerMapping
from lib_xadapter.pinned_transfer import PinnedTransfer
from tests.cuda.mappings import SHAPES, base_feature, relative_error, released, upgraded_feature
from tests.small_adapter import AdapterPlan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no NVIDIA GPU here"),
]

RELEASED_WIDTHS = AdapterPlan(in_channels=(1280, 640, 320), out_channels=(1280, 1280, 640))

PATHS = {"cuda": CudaMapping, "channels_last": ChannelsLastMapping}


@pytest.fixture(params=ACCURACY, ids=str)
def dtype(request):
    return request.param


@pytest.fixture
def adapter(dtype):
    """Small mapping layers on the GPU."""
    return on_a_fitting_gpu(released(dtype))


def on_a_fitting_gpu(layers):
    layers = layers.to("cuda")
    if (reason := obstacle(layers)) is not None:
        pytest.skip(f"this GPU cannot do it: {reason}")
    return layers


def exactly(adapter):
    """The same weights in double precision."""
    return EagerMapping(copy.deepcopy(adapter).double())


def on_the_gpu(level, shape, dtype, plan=None):
    return base_feature(level, shape, plan).to("cuda", dtype)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("level", [0, 1, 2])
def test_residuals_are_near_double_precision(level, shape, name, adapter, dtype):
    exact = exactly(adapter)
    path = PATHS[name](adapter)
    feature = on_the_gpu(level, shape, dtype)
    expected = exact.residual(level, exact.hidden(level, feature, None))
    hidden = path.hidden(level, feature, None)
    assert relative_error(path.residual(level, hidden), expected) < ACCURACY[dtype]
    for channels_last in (False, True):
        upgraded = upgraded_feature(hidden, channels_last)
        total = upgraded.double() + 1.2 * expected
        result = path.add(level, upgraded, hidden, 1.2)
        assert result.data_ptr() == upgraded.data_ptr()
        assert relative_error(result, total) < ACCURACY[dtype]


@pytest.mark.parametrize("level", [0, 1, 2])
def test_the_released_widths_are_near_double_precision(level, dtype):
    adapter = on_a_fitting_gpu(released(dtype, RELEASED_WIDTHS))
    feature = on_the_gpu(level, (2, 13, 19), dtype, RELEASED_WIDTHS)
    exact = exactly(adapter)
    path = CudaMapping(adapter)
    result = path.residual(level, path.hidden(level, feature, None))
    assert relative_error(result, exact.residual(level, exact.hidden(level, feature, None))) < ACCURACY[dtype]


def test_the_path_that_is_chosen_agrees_with_the_eager_one(adapter, dtype, caplog):
    caplog.set_level(logging.INFO)
    path = choose_mapping_path(adapter)
    assert isinstance(path, CheckedMapping)
    for shape in SHAPES:
        for level in range(3):
            hidden = path.hidden(level, on_the_gpu(level, shape, dtype), None)
            path.add(level, upgraded_feature(hidden), hidden, 1.0)
    assert not caplog.records
    assert isinstance(path._faster[0], CudaMapping)


def test_a_card_newer_than_the_compiler_runs_what_its_driver_translates(adapter, dtype, monkeypatch):
    major, minor = torch.cuda.get_device_capability()
    older = [known for known in nvrtc._architectures(nvrtc._nvrtc()) if known < 10 * major + minor]
    if not older:
        pytest.skip("this NVRTC knows nothing older than this GPU")
    monkeypatch.setattr(nvrtc, "_architectures", lambda library: older)
    path, feature = CudaMapping(adapter), on_the_gpu(1, (2, 3, 5), dtype)
    expected = EagerMapping(adapter).hidden(1, feature, None)
    assert relative_error(path.hidden(1, feature, None), expected) < ACCURACY[dtype]


def test_hidden_features_stay_what_they_are_while_other_levels_and_shapes_run(adapter, dtype):
    path = CudaMapping(adapter)
    kept = []
    for shape in SHAPES[:3] * 2:
        for level in range(3):
            hidden = path.hidden(level, on_the_gpu(level, shape, dtype), None)
            kept.append((hidden, hidden.clone()))
    assert all(torch.equal(hidden, copied) for hidden, copied in kept)


def test_features_may_come_on_changing_streams(adapter, dtype):
    path = CudaMapping(adapter)
    features = [on_the_gpu(2, (2, 32, 32), dtype) * (1 + step) for step in range(8)]
    expected = [path.hidden(2, feature, None) for feature in features]
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    results = []
    for step, feature in enumerate(features):
        with torch.cuda.stream(streams[step % 2]):
            results.append(path.hidden(2, feature, None))
    torch.cuda.synchronize()
    assert all(torch.equal(result, one) for result, one in zip(results, expected, strict=True))


def test_a_second_thread_that_decodes_disturbs_nothing(adapter, dtype):
    """As the WebUI's live preview does."""
    path = CudaMapping(adapter)
    feature = on_the_gpu(2, (2, 32, 32), dtype)
    expected = path.hidden(2, feature, None)
    weight = torch.randn(64, 64, 3, 3, device="cuda", dtype=dtype)
    stop, failures = threading.Event(), []

    def decode() -> None:
        try:
            while not stop.is_set():
                picture = functional.conv2d(torch.randn(1, 64, 96, 96, device="cuda", dtype=dtype), weight, padding=1)
                picture.cpu()
        except Exception as error:
            failures.append(error)

    decoder = threading.Thread(target=decode)
    decoder.start()
    try:
        results = [CudaMapping(adapter).hidden(2, feature, None) for _ in range(20)]
        torch.cuda.synchronize()
    finally:
        stop.set()
        decoder.join()
    assert not failures
    assert all(torch.equal(result, expected) for result in results)


def test_weights_may_leave_and_come_back(adapter, dtype):
    path = CudaMapping(adapter)
    feature = on_the_gpu(1, (2, 3, 5), dtype)
    before = path.hidden(1, feature, None)
    adapter.to("cpu")
    occupied = torch.full((64, 1024, 1024), float("nan"), device="cuda")
    adapter.to("cuda")
    assert torch.equal(path.hidden(1, feature, None), before)
    del occupied


@pytest.mark.parametrize("channels_last", [False, True])
def test_adding_makes_no_tensor(channels_last, adapter, dtype):
    path = CudaMapping(adapter)
    hidden = path.hidden(2, on_the_gpu(2, (8, 32, 32), dtype), None)
    upgraded = upgraded_feature(hidden, channels_last)
    path.add(2, upgraded, hidden, 1.0)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    path.add(2, upgraded, hidden, 1.0)
    assert torch.cuda.max_memory_allocated() - before < upgraded.nbytes


def test_nothing_waits_for_the_gpu_once_a_shape_is_checked(adapter, dtype):
    path = choose_mapping_path(adapter)
    features = [on_the_gpu(level, (2, 4, 4), dtype) for level in range(3)]

    def step():
        for level, feature in enumerate(features):
            hidden = path.hidden(level, feature, None)
            path.add(level, hidden.clone(), hidden, 1.0)

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_autocast_and_inference_mode_change_nothing(adapter, dtype):
    path = CudaMapping(adapter)
    feature = on_the_gpu(0, (2, 3, 5), dtype)
    other = torch.bfloat16 if dtype == torch.float16 else torch.float16
    with torch.inference_mode(), torch.autocast("cuda", other):
        first = path.hidden(0, feature, None)
        added = path.add(0, upgraded_feature(first), first, 1.0)
    again = path.hidden(0, feature, None)
    assert torch.equal(again, first)
    assert torch.equal(path.add(0, upgraded_feature(again), again, 1.0), added)


def test_memory_that_is_short_in_passing_costs_one_step(adapter, dtype, caplog):
    """The GPU really is full: an allocation fails inside of the path, and the cache can be emptied afterwards."""
    caplog.set_level(logging.INFO)
    path, short = choose_mapping_path(adapter), [True]
    run = path._faster[0].hidden

    def without_memory(*arguments):
        if short.pop() if short else False:
            torch.empty(2**46, dtype=torch.uint8, device="cuda")
        return run(*arguments)

    path._faster[0].hidden = without_memory
    feature = on_the_gpu(2, (2, 3, 5), dtype)
    expected = EagerMapping(adapter).hidden(2, feature, None)
    for _ in range(2):
        assert relative_error(path.hidden(2, feature, None), expected) < ACCURACY[dtype]
        torch.cuda.empty_cache()
    assert not caplog.records
    assert isinstance(path._faster[0], CudaMapping)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_features_pass_to_ordinary_memory_and_back_to_the_bit(steps, dtype):
    there, back = PinnedTransfer(torch.device("cuda")), PinnedTransfer(torch.device("cuda"))
    features = [on_the_gpu(2, (2, 32, 32), dtype) + step for step in range(steps)]
    recorded = []
    for feature in features:
        # the GPU is late, so that a wait that is missing shows
        torch.cuda._sleep(10_000_000)
        with there.step():
            recorded.append(there.to_host(feature))
    there.finish()
    assert not any(feature.is_pinned() for feature in recorded)
    played = []
    for feature in recorded:
        torch.cuda._sleep(10_000_000)
        with back.step():
            played.append(back.to_device(feature))
    assert all(torch.equal(one, other) for one, other in zip(played, features, strict=True))
