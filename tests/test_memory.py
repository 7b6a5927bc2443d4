"""Two models share a GPU where both fit with room to work, and nowhere else need to be asked."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lib_xadapter import memory
from lib_xadapter.memory import (
    ONE_PICTURE,
    Work,
    decoding_memory,
    fits_together,
    is_out_of_memory,
    make_room,
    missing_from,
    size_of,
)


@pytest.fixture
def model() -> nn.Module:
    """1,000 parameters and 10 buffers' numbers of four bytes, and nothing shared."""
    model = nn.Linear(99, 10)
    model.register_buffer("seen", torch.zeros(10))
    return model


def test_the_size_of_a_module_is_that_of_its_parameters_and_buffers(model):
    assert size_of(model) == 4 * 1010
    assert size_of(model.half()) == 2 * 1010


@pytest.mark.parametrize(("device", "missing"), [("cpu", 0), ("meta", 4040), ("cuda", 4040), ("cuda:1", 4040)])
def test_what_is_elsewhere_is_missing(model, device, missing):
    assert missing_from(model, torch.device(device)) == missing


def test_a_device_without_number_is_whichever_of_its_kind(model):
    assert missing_from(model.to("meta"), torch.device("meta")) == 0
    assert missing_from(model, torch.device("meta", 0)) == 4040


def test_off_a_gpu_everything_fits(model):
    assert fits_together([model, None], "cpu", 2**60)


@pytest.mark.parametrize(("short", "fits"), [(0, True), (1, False)])
def test_on_a_gpu_models_fit_where_there_is_room_to_work_beside_them(model, monkeypatch, short, fits):
    monkeypatch.setattr(memory, "free_memory", lambda device: 2 * size_of(model) + 1000 - short)
    assert fits_together([model, None, model], "cuda:0", 1000) == fits


@pytest.mark.parametrize(("device", "free"), [("cuda", 1_101), ("cuda:0", 1_100), ("cuda:1", 1_101)])
def test_what_torch_keeps_for_later_is_free(monkeypatch, device, free):
    """With a driver that, as that of torch before 2.5, knows GPUs by their number alone."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda number: (1_000 + [0, 1][number], 5_000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda number: [300, 300][number])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda number: [200, 200][number])
    assert memory.free_memory(torch.device(device)) == free


class Movable:
    """A module that tells when it goes."""

    def __init__(self) -> None:
        self.gone = False

    def to(self, device: str) -> None:
        assert device == "cpu"
        self.gone = True


@pytest.mark.parametrize(("needed", "gone"), [(100, 0), (101, 1), (200, 1), (250, 2), (900, 3)])
def test_one_model_after_the_other_leaves_until_there_is_room(monkeypatch, needed, gone):
    modules = [Movable() for _ in range(3)]
    monkeypatch.setattr(memory, "free_memory", lambda device: 100 + 100 * sum(module.gone for module in modules))
    make_room(needed, "cuda", modules)
    assert [module.gone for module in modules] == [place < gone for place in range(3)]


def test_off_a_gpu_nothing_has_to_leave():
    module = Movable()
    make_room(2**60, "cpu", [module])
    assert not module.gone


class TestWork:
    """What is made in passing grows with rows and pixels."""

    @pytest.mark.parametrize("overlapped", [False, True])
    @pytest.mark.parametrize(
        "more",
        [
            {"rows": 4},
            {"pixels": 2 * 1024 * 1024},
            {"base_pixels": 4 * 512 * 512},
            {"base_pixels": 4 * 512 * 512, "controlnets": 2},
        ],
        ids=str,
    )
    def test_more_work_needs_more(self, more, overlapped):
        assert Work(**more).memory(overlapped) > ONE_PICTURE.memory(overlapped)

    def test_a_controlnet_needs_more_where_the_base_has_a_pool_of_its_own(self):
        assert Work(controlnets=1).memory(overlapped=True) > ONE_PICTURE.memory(overlapped=True)

    def test_side_by_side_needs_more_than_one_after_the_other(self):
        assert ONE_PICTURE.memory(overlapped=True) > ONE_PICTURE.memory(overlapped=False)

    def test_twice_the_rows_need_twice_as_much_beside_what_is_always_there(self):
        one, two, three = (Work(rows=rows).memory(overlapped=True) for rows in (2, 4, 6))
        assert three - two == pytest.approx(two - one, abs=2)

    def test_decoding_in_single_precision_needs_room_for_the_widest_features_of_the_vae(self):
        """256 channels at the picture's size, before, in and after a layer."""
        pixels = 1024 * 1024
        assert decoding_memory(pixels) > 3 * 256 * 4 * pixels


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_libraries_tell_in_words_of_their_own_that_memory_is_short(error, is_one):
    assert is_out_of_memory(error) == is_one
