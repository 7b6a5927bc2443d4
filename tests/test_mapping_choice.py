"""The faster path is taken where it can be; where it cannot, or fails, the picture is made all the same."""

from __future__ import annotations

import copy
import logging
from types import SimpleNamespace

import pytest
import torch
from lib_xadapter.cuda_mapping.graphs import Captures
from lib_xadapter.cuda_mapping.operations import TorchOperations

from lib_xadapter import cuda_mapping
from lib_xadapter.cuda_mapping import CudaMapping, eight_bits, obstacle, obstacles
from lib_xadapter.mapping_choice import FallbackMapping, choose_mapping_path
from lib_xadapter.mapping_paths import EagerMapping
from tests.cuda.mappings import NO_TIME, CpuCapturer, OnTheCpu, base_feature, released, upgraded_feature
from tests.small_adapter import AdapterPlan

SHAPE = (2, 3, 5)


def lines(caplog) -> list[tuple[str, str]]:
    return [(record.levelname, record.getMessage()) for record in caplog.records]


@pytest.fixture(autouse=True)
def every_line(caplog):
    caplog.set_level(logging.DEBUG)


@pytest.fixture
def a_gpu(monkeypatch):
    """torch believes that there is a GPU, of a capability that tests may change, and that weights lie there."""
    gpu = SimpleNamespace(capability=(8, 6))
    monkeypatch.setattr(torch.version, "cuda", "12.1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: gpu.capability)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(obstacles, "NVIDIA", "cpu")
    monkeypatch.setattr(cuda_mapping, "CudaMapping", lambda adapter, *_: on_the_cpu(adapter))
    return gpu


def on_the_cpu(adapter, make_operations=lambda dtype: TorchOperations(), capturer=None) -> CudaMapping:
    return CudaMapping(adapter, make_operations, device=OnTheCpu(lambda: Captures(capturer or CpuCapturer())))


@pytest.mark.parametrize(("choice", "level"), [("auto", "INFO"), ("cuda", "WARNING")])
def test_without_a_gpu_the_layers_run_eagerly_and_one_line_says_why(choice, level, caplog):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    path = choose_mapping_path(released(), choice)
    assert isinstance(path, EagerMapping)
    assert lines(caplog) == [(level, "The mapping layers run eagerly: torch sees no NVIDIA GPU.")]


def test_eager_on_request_needs_no_words(caplog):
    assert isinstance(choose_mapping_path(released(), "eager"), EagerMapping)
    assert not lines(caplog)


@pytest.mark.parametrize("choice", ["auto", "cuda"])
def test_half_precision_on_a_gpu_takes_the_cuda_path(choice, a_gpu, caplog):
    path = choose_mapping_path(released(torch.float16), choice)
    assert isinstance(path, FallbackMapping)
    assert path.hidden(0, base_feature(0, SHAPE), NO_TIME).stride(1) == 1
    assert not lines(caplog)


@pytest.mark.parametrize(
    ("dtype", "plan", "capability", "reason"),
    [
        (torch.float32, AdapterPlan(), (8, 6), "they are in float32, not in float16 or bfloat16"),
        (torch.float16, AdapterPlan(), (6, 1), "float16 needs compute capability 7.0, not 6.1"),
        (torch.bfloat16, AdapterPlan(), (7, 5), "bfloat16 needs compute capability 8.0, not 7.5"),
        (torch.float16, AdapterPlan(norm=True), (8, 6), "these have group norms"),
        (torch.float16, AdapterPlan(time_channels=64), (8, 6), "these have timestep conditioning"),
        (torch.float16, AdapterPlan(out_channels=(128, 128, 60)), (8, 6), "60 channels are not multiples of 8"),
    ],
)
def test_what_the_cuda_path_cannot_do_is_told(dtype, plan, capability, reason, a_gpu, caplog):
    a_gpu.capability = capability
    assert isinstance(choose_mapping_path(released(dtype, plan)), EagerMapping)
    [(level, sentence)] = lines(caplog)
    assert level == "INFO"
    assert reason in sentence


def test_layers_that_are_not_on_the_gpu_run_where_they_are(a_gpu, monkeypatch):
    monkeypatch.setattr(obstacles, "NVIDIA", "cuda")
    assert obstacle(released(torch.float16)) == "they are on cpu"


@pytest.mark.parametrize(
    ("capability", "triton", "reason"),
    [((8, 6), "3.1.0", "compute capability 8.9"), ((9, 0), None, "not installed"), ((9, 0), "2.1.0", "not 2.1.0")],
)
def test_eight_bits_that_cannot_be_had_become_sixteen(capability, triton, reason, a_gpu, caplog, monkeypatch):
    a_gpu.capability = capability
    monkeypatch.setattr(eight_bits, "triton_version", lambda: triton)
    path = choose_mapping_path(released(torch.float16), fp8=True)
    assert isinstance(path, FallbackMapping)
    [(level, sentence)] = lines(caplog)
    assert level == "WARNING"
    assert sentence.startswith("The mapping layers run in 16 bits: ") and reason in sentence


class Failure(Exception):
    """Something that no one has foreseen."""


class FailingCapturer:
    """Fails where graphs are captured."""

    def capture(self, blocks, feature):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.\nTried to allocate 126 MiB.")


def no_operations(dtype):
    raise Failure("no NVRTC")


class FailingOperations(TorchOperations):
    """Fail at one of the operations.

    Args:
        name: of the operation.
    """

    def __init__(self, name: str) -> None:
        def fail(*arguments, **options):
            raise Failure(name)

        setattr(self, name, fail)


STAGES = {
    "compiling": lambda adapter: on_the_cpu(adapter, no_operations),
    "capturing": lambda adapter: on_the_cpu(adapter, capturer=FailingCapturer()),
    **{
        name: lambda adapter, name=name: on_the_cpu(adapter, lambda dtype: FailingOperations(name))
        for name in ("convolve", "upsample", "begin", "finish")
    },
}


@pytest.mark.parametrize("stage", STAGES)
def test_whatever_fails_the_eager_layers_take_over_with_one_line(stage, caplog):
    adapter = released(torch.float64)
    reference = EagerMapping(copy.deepcopy(adapter))
    path = FallbackMapping(STAGES[stage](adapter), EagerMapping(adapter))
    for level in (2, 1, 0, 2):
        feature = base_feature(level, SHAPE)
        hidden = path.hidden(level, feature, NO_TIME)
        upgraded = upgraded_feature(hidden)
        expected = reference.add(level, upgraded.clone(), reference.hidden(level, feature, NO_TIME), 0.9)
        torch.testing.assert_close(path.add(level, upgraded, hidden, 0.9), expected)
    [(level_name, sentence)] = lines(caplog)
    assert level_name == "WARNING"
    assert sentence.startswith("The mapping layers go on without CudaMapping: ")
    assert "\n" not in sentence


@pytest.mark.parametrize("call", ["add", "residual"])
def test_a_hidden_feature_of_the_path_that_failed_is_used_all_the_same(call, caplog, monkeypatch):
    adapter = released(torch.float64)
    first = on_the_cpu(adapter)
    path = FallbackMapping(first, EagerMapping(adapter))
    reference = EagerMapping(copy.deepcopy(adapter))
    hidden = path.hidden(1, base_feature(1, SHAPE), NO_TIME)

    def fail(*arguments):
        raise Failure

    monkeypatch.setattr(first, call, fail)
    if call == "residual":
        torch.testing.assert_close(path.residual(1, hidden), reference.residual(1, hidden))
    else:
        feature = upgraded_feature(hidden)
        torch.testing.assert_close(path.add(1, feature.clone(), hidden, 0.5), reference.add(1, feature, hidden, 0.5))
    assert lines(caplog) == [("WARNING", "The mapping layers go on without CudaMapping: Failure: ")]


def test_an_addition_that_failed_half_way_is_not_repeated(monkeypatch):
    """The bias would be counted twice."""
    adapter = released(torch.float64)
    first = on_the_cpu(adapter)
    path = FallbackMapping(first, EagerMapping(adapter))
    hidden = path.hidden(1, base_feature(1, SHAPE), NO_TIME)
    feature = upgraded_feature(hidden)

    def fail_half_way(level, feature, *arguments):
        feature.add_(1)
        raise Failure

    monkeypatch.setattr(first, "add", fail_half_way)
    with pytest.raises(RuntimeError, match="failed half-way"):
        path.add(1, feature, hidden, 0.5)


def test_memory_that_the_eager_layers_lack_too_is_the_callers_affair(caplog, monkeypatch):
    adapter = released()
    eager = EagerMapping(adapter)

    def fail(*arguments):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(eager, "hidden", fail)
    path = FallbackMapping(on_the_cpu(adapter, capturer=FailingCapturer()), eager)
    for _ in range(2):
        with pytest.raises(torch.cuda.OutOfMemoryError):
            path.hidden(0, base_feature(0, SHAPE), NO_TIME)
    assert len(lines(caplog)) == 1


def test_what_the_failed_path_had_prepared_is_given_back():
    adapter = released()
    first = on_the_cpu(adapter, capturer=FailingCapturer())
    FallbackMapping(first, EagerMapping(adapter)).hidden(0, base_feature(0, SHAPE), NO_TIME)
    assert first._prepared is None


def test_eight_bits_that_fail_become_sixteen(caplog):
    adapter = released(torch.float64)
    sixteen = FallbackMapping(on_the_cpu(adapter), EagerMapping(adapter))
    path = FallbackMapping(on_the_cpu(adapter, no_operations), sixteen)
    assert path.hidden(0, base_feature(0, SHAPE), NO_TIME).stride(1) == 1
    assert len(lines(caplog)) == 1
