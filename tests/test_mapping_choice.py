"""The faster path is taken where it can be; where it cannot, errs or fails, the picture is made all the same."""

from __future__ import annotations

import copy
import logging
from types import SimpleNamespace

import pytest
import torch

from lib_xadapter import cuda_mapping
from lib_xadapter.cuda_mapping import ChannelsLastMapping, CudaMapping, obstacle, obstacles
from lib_xadapter.mapping_choice import CheckedMapping, choose_mapping_path
from lib_xadapter.mapping_paths import EagerMapping
from tests.cuda.mappings import base_feature, finish_by_torch, relative_error, released, upgraded_feature
from tests.small_adapter import AdapterPlan

SHAPE = (2, 3, 5)
NARROW = AdapterPlan(in_channels=(16, 16, 8), out_channels=(16, 16, 8), blocks=1)


def lines(caplog) -> list[tuple[str, str]]:
    return [(record.levelname, record.getMessage()) for record in caplog.records if record.levelno > logging.DEBUG]


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
    monkeypatch.setattr(cuda_mapping, "CudaMapping", lambda adapter: CudaMapping(adapter, finish_by_torch))
    return gpu


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
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_on_a_gpu_takes_the_cuda_path(choice, dtype, a_gpu, caplog):
    path = choose_mapping_path(released(dtype, NARROW), choice)
    assert isinstance(path, CheckedMapping)
    for level in range(3):
        hidden = path.hidden(level, base_feature(level, SHAPE, NARROW), None)
        assert hidden.stride(1) == 1
        path.add(level, upgraded_feature(hidden), hidden, 1.0)
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


class Failing:
    """A `Finish` that fails or errs as often as it is told to, and is right from then on.

    Args:
        how: what happens to the result.
        times: None for always.
    """

    def __init__(self, how, times: int | None = None) -> None:
        self.how, self.times, self.calls = how, times, 0

    def __call__(self, x, bias, residual=None, relu=False):
        self.calls += 1
        result = finish_by_torch(x, bias, residual, relu)
        return result if self.times is not None and self.calls > self.times else self.how(result)


def raises(error):
    def fail(result):
        raise error

    return fail


def no_memory():
    return torch.cuda.OutOfMemoryError("CUDA out of memory.\nTried to allocate 126 MiB.")


ERRORS = {
    "fails": raises(KeyError("something that no one has foreseen")),
    "nearly_right": lambda result: result * 1.03,
    "another_row": lambda result: result.roll(1, 0),
    "one_pixel": lambda result: result.index_fill(3, torch.tensor([0]), 0),
    "nan": lambda result: result * float("nan"),
}


def checked(finish) -> tuple[CheckedMapping, EagerMapping]:
    """A path with such a kernel, and what it has to compute."""
    adapter = released(torch.float16, NARROW)
    reference = EagerMapping(copy.deepcopy(adapter))
    faster = [CudaMapping(adapter, finish), ChannelsLastMapping(adapter)]
    return CheckedMapping(faster, EagerMapping(adapter)), reference


def assert_right(path, reference, level, shape=SHAPE) -> None:
    feature = base_feature(level, shape, NARROW)
    expected = reference.hidden(level, feature, None)
    hidden = path.hidden(level, feature, None)
    assert relative_error(hidden, expected) < 5e-3
    upgraded = upgraded_feature(hidden)
    total = reference.add(level, upgraded.clone(), expected, 0.9)
    assert relative_error(path.add(level, upgraded, hidden, 0.9), total) < 5e-3


@pytest.mark.parametrize("error", ERRORS)
def test_a_kernel_that_fails_or_errs_is_given_up_with_one_line(error, caplog):
    kernel = Failing(ERRORS[error])
    path, reference = checked(kernel)
    for level in (2, 1, 0, 2):
        assert_right(path, reference, level)
    [(level_name, sentence)] = lines(caplog)
    assert level_name == "WARNING"
    assert sentence.startswith("The mapping layers go on without CudaMapping: ")
    calls = kernel.calls
    assert_right(path, reference, 1, (1, 4, 4))
    assert kernel.calls == calls


def test_where_the_layout_fails_too_torchs_own_kernels_are_left(caplog, monkeypatch):
    path, reference = checked(Failing(ERRORS["fails"]))
    monkeypatch.setattr(ChannelsLastMapping, "hidden", raises_always)
    assert_right(path, reference, 1)
    assert_right(path, reference, 2)
    assert [sentence.split(":")[0] for _, sentence in lines(caplog)] == [
        "The mapping layers go on without CudaMapping",
        "The mapping layers go on without ChannelsLastMapping",
    ]


def raises_always(*arguments):
    raise RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED")


@pytest.mark.parametrize("spoil", [False, True])
def test_an_addition_that_errs_is_given_up_and_the_feature_is_as_it_was(spoil, caplog, monkeypatch):
    def wrong(self, level, feature, hidden, weight):
        feature.add_(1)
        if spoil:
            raise RuntimeError("half-way")
        return feature

    monkeypatch.setattr(ChannelsLastMapping, "add", wrong)
    path, reference = checked(finish_by_torch)
    assert_right(path, reference, 1)
    assert_right(path, reference, 0)
    assert len(lines(caplog)) == 2


def test_an_error_too_small_to_be_seen_at_one_weight_is_found_at_another(caplog):
    """The residual errs by its own size, which beside the feature shows at weight 1 alone."""
    adapter = released(torch.float16, NARROW)

    class Doubled(ChannelsLastMapping):
        def add(self, level, feature, hidden, weight):
            return super().add(level, feature, hidden, 2 * weight)

    path, eager = CheckedMapping([Doubled(adapter)], EagerMapping(adapter)), EagerMapping(adapter)
    hidden = eager.hidden(0, base_feature(0, SHAPE, NARROW), None)
    feature = upgraded_feature(hidden)
    path.add(0, feature.clone(), hidden, 1e-4)
    assert not lines(caplog)
    path.add(0, feature.clone(), hidden, 1.0)
    [(level, sentence)] = lines(caplog)
    assert level == "WARNING"
    assert "go on without Doubled" in sentence


def test_each_shape_is_checked_once(monkeypatch):
    path, _reference = checked(finish_by_torch)
    seen = []
    eager = path._eager.hidden
    monkeypatch.setattr(path._eager, "hidden", lambda level, *rest: seen.append(level) or eager(level, *rest))
    for level, shape in ((0, SHAPE), (0, SHAPE), (1, SHAPE), (0, (3, 4, 4)), (0, SHAPE)):
        path.hidden(level, base_feature(level, shape, NARROW), None)
    assert seen == [0] * 2 + [1] * 2 + [0] * 3


def test_once_it_is_checked_the_residual_is_added_into_the_feature_itself():
    path, _ = checked(finish_by_torch)
    hidden = path.hidden(1, base_feature(1, SHAPE, NARROW), None)
    path.add(1, upgraded_feature(hidden), hidden, 1.0)
    feature = upgraded_feature(hidden)
    assert path.add(1, feature, hidden, 1.0).data_ptr() == feature.data_ptr()


def test_a_kernel_that_is_right_at_first_and_fails_later_is_given_up(caplog):
    kernel = Failing(lambda result: result, None)
    path, reference = checked(kernel)
    assert_right(path, reference, 1)
    kernel.how = ERRORS["fails"]
    assert_right(path, reference, 1)
    assert len(lines(caplog)) == 1


@pytest.mark.parametrize(
    "error",
    [
        no_memory(),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("The CUDA driver answers CUDA_ERROR_OUT_OF_MEMORY."),
    ],
    ids=lambda error: type(error).__name__,
)
def test_memory_that_is_short_in_passing_costs_one_step(error, caplog):
    kernel = Failing(raises(error), times=1)
    path, reference = checked(kernel)
    assert_right(path, reference, 1)
    assert kernel.calls == 1
    assert_right(path, reference, 1)
    assert kernel.calls > 1
    assert not lines(caplog)


def test_memory_that_the_eager_layers_lack_too_is_the_callers_affair(monkeypatch):
    path, _ = checked(Failing(raises(no_memory())))
    monkeypatch.setattr(path._eager, "hidden", lambda *arguments: raises(no_memory())(None))
    with pytest.raises(torch.cuda.OutOfMemoryError):
        path.hidden(0, base_feature(0, SHAPE, NARROW), None)


def test_numbers_that_are_infinite_eagerly_too_are_no_disagreement(caplog):
    path, _ = checked(finish_by_torch)
    path.hidden(1, base_feature(1, SHAPE, NARROW) * float("inf"), None)
    assert not lines(caplog)
