"""Our CUDA C++ compiles for every card, and computes on the CPU what torch computes, launched as on a GPU."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

from lib_xadapter.cuda_mapping import CudaMapping, cuda_operations, nvrtc
from lib_xadapter.cuda_mapping.cuda_operations import SOURCE, CudaOperations
from lib_xadapter.cuda_mapping.operations import TorchOperations, Unfinished, pixels_with_ones
from lib_xadapter.cuda_mapping.weights import Convolution
from tests.cuda.mappings import (
    NO_TIME,
    SHAPES,
    OnTheCpu,
    base_feature,
    relative_error,
    released,
    upgraded_feature,
)
from tests.seeded import seeded

HALVES = {torch.float16: 5e-3, torch.bfloat16: 2e-2}
"""Relative error that is allowed against float64."""

ARCHITECTURES = ["sm_70", "sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"]

DRIVER = Path(__file__).with_name("driver_on_cpu.cpp")


def definitions(dtype: torch.dtype) -> tuple[str, ...]:
    return ("BFLOAT16",) if dtype == torch.bfloat16 else ()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_kernel_compiles_to_machine_code(architecture, dtype):
    if not list(nvrtc.nvrtc_libraries()):
        pytest.skip("there is no NVRTC library here")
    try:
        code = nvrtc.compile_kernels(SOURCE.read_text(), architecture, definitions(dtype))
    except nvrtc.NvrtcError as error:
        if "invalid value for --gpu-architecture" not in str(error):
            raise
        pytest.skip(f"this NVRTC does not know {architecture}")
    assert code.startswith(b"\x7fELF")
    assert b"finish" in code


def test_a_source_that_does_not_compile_is_told_with_the_compilers_words():
    if not list(nvrtc.nvrtc_libraries()):
        pytest.skip("there is no NVRTC library here")
    with pytest.raises(nvrtc.NvrtcError, match='sm_80: .*"nowhere" is undefined'):
        nvrtc.compile_kernels("__global__ void wrong() { nowhere(); }", "sm_80")


def test_a_machine_without_nvrtc_says_so(monkeypatch):
    monkeypatch.setattr(nvrtc, "nvrtc_libraries", lambda: iter(["/nowhere/libnvrtc.so"]))
    with pytest.raises(nvrtc.NvrtcError, match="no NVRTC library"):
        nvrtc.compile_kernels(SOURCE.read_text(), "sm_80")


@pytest.fixture(scope="session")
def drivers(tmp_path_factory):
    """CUDA drivers that are the CPU, one for each type."""
    if shutil.which("g++") is None:
        pytest.skip("there is no g++ here")
    folder = tmp_path_factory.mktemp("drivers")
    libraries = {}
    for dtype in HALVES:
        library = folder / f"{str(dtype).removeprefix('torch.')}.so"
        macros = [f'-DKERNELS="{SOURCE}"', *(f"-D{name}" for name in definitions(dtype))]
        build = ["g++", "-O1", "-fno-fast-math", "-shared", "-fPIC", *macros, str(DRIVER), "-o", str(library)]
        made = subprocess.run(build, capture_output=True, text=True)
        if made.returncode and "_Float16" in made.stderr:
            pytest.skip("this g++ has no 16-bit floating-point numbers")
        assert made.returncode == 0, made.stderr
        libraries[dtype] = ctypes.CDLL(str(library))
    return libraries


@pytest.fixture(params=HALVES, ids=str)
def dtype(request):
    return request.param


@pytest.fixture
def cuda_on_cpu(dtype, drivers, monkeypatch):
    """A CPU that answers where torch, cuDNN and the driver are asked for CUDA."""

    def convolution(x, weight, padding, stride, dilation, groups, benchmark, deterministic, allow_tf32):
        result = functional.conv2d(x.float(), weight.float(), None, stride, padding, dilation, groups)
        return result.to(x.dtype, memory_format=torch.channels_last)

    def transposed(x, weight, padding, output_padding, stride, dilation, groups, benchmark, deterministic, allow_tf32):
        result = functional.conv_transpose2d(
            x.float(), weight.float(), None, stride, padding, output_padding, groups, dilation
        )
        return result.to(x.dtype, memory_format=torch.channels_last)

    def with_relu(x, weight, bias, stride, padding, dilation, groups):
        assert torch.backends.cudnn.benchmark
        result = functional.conv2d(x.float(), weight.float(), bias.float(), stride, padding, dilation, groups)
        return functional.relu(result).to(x.dtype, memory_format=torch.channels_last)

    monkeypatch.setattr(torch, "cudnn_convolution", convolution)
    monkeypatch.setattr(torch, "cudnn_convolution_transpose", transposed)
    monkeypatch.setattr(torch, "cudnn_convolution_relu", with_relu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(cuda_operations, "compile_kernels", lambda source, architecture, definitions: b"code")
    monkeypatch.setattr(nvrtc, "_driver", lambda: drivers[dtype])
    monkeypatch.setattr(nvrtc, "_make_context", lambda: None)


def channels_last(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return seeded(name, shape).to(dtype, memory_format=torch.channels_last)


@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_bias_and_residual_are_added_with_one_rounding(has_bias, has_residual, dtype, cuda_on_cpu):
    result = channels_last("convolution", (3, 24, 5, 7), dtype)
    result[0, :4, 0, 0] = torch.tensor([float("nan"), float("inf"), -float("inf"), 60000.0])
    bias = seeded("bias", (24,)).to(dtype) if has_bias else None
    residual = channels_last("residual", (3, 24, 5, 7), dtype) if has_residual else None
    unfinished = Unfinished(result, bias, residual)
    expected = result.float()
    expected = expected if bias is None else expected + bias.float()[:, None, None]
    expected = expected if residual is None else expected + residual.float()
    hidden = CudaOperations(dtype).finish(unfinished)
    torch.testing.assert_close(hidden, expected.to(dtype), rtol=0, atol=0, equal_nan=True)
    ones = pixels_with_ones(hidden)[..., 24:]
    assert torch.equal(ones, torch.eye(8)[0].to(dtype).expand_as(ones))


@pytest.mark.parametrize("fuse_relu", [False, True])
def test_inner_convolutions_end_in_bias_and_relu(fuse_relu, dtype, cuda_on_cpu):
    x = channels_last("x", (2, 16, 3, 5), dtype)
    convolution = Convolution(channels_last("w", (24, 16, 3, 3), dtype), seeded("b", (24,)).to(dtype))
    exact = Convolution(convolution.weight.double(), convolution.bias.double())
    expected = TorchOperations().convolve(x.double(), exact, relu=True)
    result = CudaOperations(dtype, fuse_relu=fuse_relu).convolve(x, convolution, relu=True)
    assert relative_error(result, expected) < HALVES[dtype]
    assert (result >= 0).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("level", [0, 1, 2])
def test_half_precision_is_near_double_precision(level, shape, dtype, cuda_on_cpu):
    adapter = released(dtype)
    exact = released(torch.float64)
    for parameter, rounded in zip(exact.parameters(), adapter.parameters(), strict=True):
        parameter.data.copy_(rounded)
    path = CudaMapping(adapter, device=OnTheCpu())
    feature = base_feature(level, shape).to(dtype)
    expected = exact.map_level(level, feature.double())
    hidden = path.hidden(level, feature, NO_TIME)
    assert relative_error(path.residual(level, hidden), expected) < HALVES[dtype]
    upgraded = upgraded_feature(hidden)
    total = upgraded.double() + 1.2 * expected
    assert relative_error(path.add(level, upgraded, hidden, 1.2), total) < HALVES[dtype]


def test_strides_that_the_kernel_does_not_read_are_refused(dtype, cuda_on_cpu):
    with pytest.raises(RuntimeError, match="strides"):
        CudaOperations(dtype).finish(Unfinished(torch.zeros(1, 8, 3, 5, dtype=dtype)))


def test_addresses_that_a_gpu_would_stop_at_are_refused(dtype, cuda_on_cpu):
    feature = torch.zeros(1 * 8 * 3 * 5 + 1, dtype=dtype)[1:].view(1, 3, 5, 8).permute(0, 3, 1, 2)
    with pytest.raises(RuntimeError, match="lies at"):
        CudaOperations(dtype).finish(Unfinished(feature))


def test_a_driver_that_does_not_take_the_code_is_named(dtype, cuda_on_cpu):
    with pytest.raises(nvrtc.NvrtcError, match="CUDA_ERROR_NOT_FOUND"):
        nvrtc.Kernel(b"code", "another")


def test_cudnn_is_deterministic_where_torch_is_to_be(dtype, cuda_on_cpu, monkeypatch):
    asked = []

    def convolution(x, weight, padding, stride, dilation, groups, benchmark, deterministic, allow_tf32):
        asked.append((benchmark, deterministic))
        return x.clone()

    monkeypatch.setattr(torch, "cudnn_convolution", convolution)
    x = channels_last("x", (1, 8, 2, 2), dtype)
    weights = Convolution(channels_last("w", (8, 8, 3, 3), dtype), torch.zeros(8, dtype=dtype))
    for deterministic in (False, True):
        monkeypatch.setattr(torch.backends.cudnn, "deterministic", deterministic)
        CudaOperations(dtype, fuse_relu=deterministic).convolve(x, weights, relu=True)
    assert asked == [(True, False), (False, True)]


def test_libraries_of_torchs_own_cuda_version_come_first(tmp_path, monkeypatch):
    for package, name in (("cuda_nvrtc", "libnvrtc.so.12"), ("cu13", "libnvrtc.so.13"), ("cu13", "libnvrtc.alt.so.13")):
        (tmp_path / package / "lib").mkdir(parents=True, exist_ok=True)
        (tmp_path / package / "lib" / name).touch()
    found = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(nvrtc.importlib.util, "find_spec", lambda name: found)
    monkeypatch.setattr(nvrtc.sys, "platform", "linux")
    for cuda, first in (("12.1", "libnvrtc.so.12"), ("13.0", "libnvrtc.so.13")):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        names = [Path(path).name for path in nvrtc.nvrtc_libraries() if str(tmp_path) in path]
        assert names[0] == first
        assert sorted(names) == ["libnvrtc.so.12", "libnvrtc.so.13"]
