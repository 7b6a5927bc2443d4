"""Our CUDA C++ compiles for every card, and computes on the CPU what torch computes, launched as on a GPU."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lib_xadapter.cuda_mapping import CudaMapping, finish, nvrtc
from lib_xadapter.cuda_mapping.finish import SOURCE, FinishKernel
from tests.cuda.mappings import SHAPES, base_feature, relative_error, released, upgraded_feature
from tests.seeded import seeded

HALVES = {torch.float16: 5e-3, torch.bfloat16: 2e-2}
"""Relative error that is allowed against float64."""

CARDS = [(7, 0), (7, 2), (7, 5), (8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (10, 3), (11, 0), (12, 0), (12, 1)]

DRIVER = Path(__file__).with_name("driver_on_cpu.cpp")


def libraries() -> list[Path]:
    """Every NVRTC here: beside torch, and beside the WebUI's torch 2.1 where WEBUI_DIR names one."""
    found = [Path(path) for path in nvrtc.nvrtc_libraries()]
    if (webui := os.environ.get("WEBUI_DIR")) is not None:
        found += Path(webui).glob("venv/lib/python*/site-packages/nvidia/cuda_nvrtc/lib/libnvrtc.so.*")
    return found


def definitions(dtype: torch.dtype) -> tuple[str, ...]:
    return ("BFLOAT16",) if dtype == torch.bfloat16 else ()


@pytest.fixture(params=libraries() or [None], ids=lambda path: path.name if path else "none")
def library(request, monkeypatch):
    if request.param is None:
        pytest.skip("there is no NVRTC library here")
    monkeypatch.setattr(nvrtc, "nvrtc_libraries", lambda: iter([str(request.param)]))
    return nvrtc._nvrtc()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("card", CARDS, ids=str)
def test_the_kernel_compiles_for_every_card(card, dtype, library):
    known, wanted = nvrtc._architectures(library), 10 * card[0] + card[1]
    if wanted < min(known):
        with pytest.raises(nvrtc.NvrtcError, match=f"no more for compute capability {card[0]}.{card[1]}"):
            nvrtc.compile_kernels(SOURCE.read_text(), card, definitions(dtype))
        return
    code = nvrtc.compile_kernels(SOURCE.read_text(), card, definitions(dtype))
    if wanted in known:
        assert code.startswith(b"\x7fELF")
        assert b"finish" in code
    else:
        newest = max(architecture for architecture in known if architecture < wanted)
        assert re.search(rf"^\.target sm_{newest}$", code.decode().rstrip("\0"), re.MULTILINE)
        assert b".entry finish" in code


def test_a_card_newer_than_the_compiler_gets_text_that_its_driver_translates(library):
    code = nvrtc.compile_kernels(SOURCE.read_text(), (99, 0))
    assert f".target sm_{max(nvrtc._architectures(library))}".encode() in code
    assert code.endswith(b"\0")


def test_a_source_that_does_not_compile_is_told_with_the_compilers_words(library):
    with pytest.raises(nvrtc.NvrtcError, match='sm_80: .*"nowhere" is undefined'):
        nvrtc.compile_kernels("__global__ void wrong() { nowhere(); }", (8, 0))


def test_a_machine_without_nvrtc_says_so(monkeypatch):
    monkeypatch.setattr(nvrtc, "nvrtc_libraries", lambda: iter(["/nowhere/libnvrtc.so"]))
    with pytest.raises(nvrtc.NvrtcError, match="no NVRTC library"):
        nvrtc.compile_kernels(SOURCE.read_text(), (8, 0))


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
def kernel(dtype, drivers, monkeypatch):
    """The kernel on a CPU that answers where the driver is asked for CUDA."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(finish, "compile_kernels", lambda source, capability, definitions: b"code")
    monkeypatch.setattr(nvrtc, "_driver", lambda: drivers[dtype])
    return FinishKernel(torch.device("cpu"), dtype)


def channels_last(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return seeded(name, shape).to(dtype, memory_format=torch.channels_last)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("has_residual", [False, True])
def test_bias_and_residual_are_added_with_one_rounding(has_residual, relu, dtype, kernel):
    x = channels_last("convolution", (3, 24, 5, 7), dtype)
    x[0, :4, 0, 0] = torch.tensor([float("nan"), float("inf"), -float("inf"), 60000.0])
    bias = seeded("bias", (24,)).to(dtype)
    residual = channels_last("residual", (3, 24, 5, 7), dtype) if has_residual else None
    expected = x.float() + bias.float()[:, None, None]
    expected = expected if residual is None else expected + residual.float()
    expected = expected.relu() if relu else expected
    result = kernel(x, bias, residual, relu)
    assert result.data_ptr() == x.data_ptr()
    torch.testing.assert_close(result, expected.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("level", [0, 1, 2])
def test_half_precision_is_near_double_precision(level, shape, dtype, kernel):
    adapter = released(dtype)
    exact = released(torch.float64)
    for parameter, rounded in zip(exact.parameters(), adapter.parameters(), strict=True):
        parameter.data.copy_(rounded)
    path = CudaMapping(adapter, kernel)
    feature = base_feature(level, shape).to(dtype)
    expected = exact.map_level(level, feature.double())
    hidden = path.hidden(level, feature, None)
    assert relative_error(path.residual(level, hidden), expected) < HALVES[dtype]
    upgraded = upgraded_feature(hidden)
    total = upgraded.double() + 1.2 * expected
    assert relative_error(path.add(level, upgraded, hidden, 1.2), total) < HALVES[dtype]


def test_features_in_another_layout_are_brought_into_the_kernels(dtype, kernel):
    x, residual = (seeded(name, (2, 8, 3, 5)).to(dtype) for name in ("x", "residual"))
    bias = torch.zeros(8, dtype=dtype)
    torch.testing.assert_close(kernel(x.clone(), bias, residual), (x.float() + residual.float()).to(dtype))


def test_addresses_that_a_gpu_would_stop_at_are_refused(dtype, kernel):
    feature = torch.zeros(1 * 8 * 3 * 5 + 1, dtype=dtype)[1:].view(1, 3, 5, 8).permute(0, 3, 1, 2)
    with pytest.raises(RuntimeError, match="lies at"):
        kernel(feature, torch.zeros(8, dtype=dtype))


def test_a_driver_that_does_not_take_the_code_is_named(kernel):
    with pytest.raises(nvrtc.NvrtcError, match="CUDA_ERROR_NOT_FOUND"):
        nvrtc.Kernel(b"code", "another", torch.device("cpu"))


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
