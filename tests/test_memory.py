"""Two models share a GPU where both fit with room to work, and nowhere else need to be asked."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lib_xadapter import memory
from lib_xadapter.memory import WORKING_MEMORY, fits_together, missing_from, size_of


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
    assert fits_together([model, None], "cpu")


@pytest.mark.parametrize(("missing", "fits"), [(0, True), (1, False)])
def test_on_a_gpu_models_fit_where_there_is_room_to_work_beside_them(model, monkeypatch, missing, fits):
    free = 2 * size_of(model) + WORKING_MEMORY - missing
    monkeypatch.setattr(memory, "free_memory", lambda device: free)
    assert fits_together([model, None, model], "cuda:0") == fits
