"""Two models share a GPU where both fit with room to work, and nowhere else need to be asked."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lib_xadapter import memory
from lib_xadapter.memory import WORKING_MEMORY, fits_together, size_of


@pytest.fixture
def model() -> nn.Module:
    """1,000 parameters and 10 buffers' numbers of four bytes, and nothing shared."""
    model = nn.Linear(99, 10)
    model.register_buffer("seen", torch.zeros(10))
    return model


def test_the_size_of_a_module_is_that_of_its_parameters_and_buffers(model):
    assert size_of(model) == 4 * 1010
    assert size_of(model.half()) == 2 * 1010


def test_only_what_is_on_a_device_counts_there(model):
    assert size_of(model, torch.device("cpu")) == 4 * 1010
    assert size_of(model, torch.device("meta")) == 0
    assert size_of(model.to("meta"), torch.device("meta")) == 4 * 1010


def test_off_a_gpu_everything_fits(model):
    assert fits_together([model, None], "cpu")


@pytest.mark.parametrize(("missing", "fits"), [(0, True), (1, False)])
def test_on_a_gpu_models_fit_where_there_is_room_to_work_beside_them(model, monkeypatch, missing, fits):
    free = 2 * size_of(model) + WORKING_MEMORY - missing
    monkeypatch.setattr(memory, "free_memory", lambda device: free)
    assert fits_together([model, None, model], "cuda:0") == fits
