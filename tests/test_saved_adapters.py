"""Mapping layers for a pair of UNets, written and read again with what they were trained for."""

from __future__ import annotations

import subprocess
import sys

import pytest
import safetensors
import torch

from lib_xadapter.errors import WrongFile
from lib_xadapter.evaluations import Evaluation
from lib_xadapter.mapping import MappingLayers, layout_for, load_adapter, save_adapter
from lib_xadapter.recording import expected_size, record
from lib_xadapter.rows import batch_rows
from lib_xadapter.settings import LEVELS
from lib_xadapter.taps import TAPS, check_fit, read_features
from tests.small_adapter import AdapterPlan
from tests.small_unets import base_unet, upgraded_unet


@pytest.fixture(scope="module")
def layers() -> MappingLayers:
    return MappingLayers(layout_for(base_unet(), upgraded_unet()), fusion="guidance")


def test_there_is_a_level_for_each_tap():
    assert len(TAPS) == LEVELS


def test_the_layout_for_two_unets_is_the_released_one_and_fits_them(layers):
    plan = AdapterPlan(layers.in_channels, layers.out_channels)
    assert {key: tuple(value.shape) for key, value in layers.state_dict().items()} == plan.shapes()
    check_fit(layers, base_unet(), upgraded_unet())


def test_what_is_written_is_read_with_its_fusion_and_positions(layers, tmp_path):
    path = tmp_path / "own.safetensors"
    save_adapter(layers, path, {"steps": "200"})
    again = load_adapter(path)
    assert (again.fusion, again.positions) == ("guidance", "decoder")
    assert all(torch.equal(again.state_dict()[key], value) for key, value in layers.state_dict().items())
    with safetensors.safe_open(path, framework="pt") as file:
        assert file.metadata()["steps"] == "200"


def test_a_file_that_cannot_be_written_leaves_the_earlier_one(layers, tmp_path, monkeypatch):
    path = tmp_path / "own.safetensors"
    save_adapter(layers, path)
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *paths: (_ for _ in ()).throw(OSError("no space left on device")))
    with pytest.raises(WrongFile, match=r"own.safetensors cannot be written: no space"):
        save_adapter(layers, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("what", ["fusion", "positions"])
def test_what_it_was_trained_for_and_nobody_knows_is_told(layers, tmp_path, what):
    path = tmp_path / "own.safetensors"
    save_adapter(layers, path)
    weights = safetensors.torch.load_file(path)
    safetensors.torch.save_file(weights, path, {f"xadapter.{what}": "magic"})
    with pytest.raises(WrongFile, match=f"trained with the {what} 'magic', expected"):
        load_adapter(path)


def test_layers_as_training_begins_add_nothing(layers):
    fresh = MappingLayers(layers.levels).zero_output()
    residual = fresh.map_level(0, torch.randn(1, layers.in_channels[0], 4, 4))
    assert residual.abs().sum() == 0


def test_loaded_layers_can_be_trained_on(layers, tmp_path):
    path = tmp_path / "own.safetensors"
    save_adapter(layers, path)
    assert all(parameter.requires_grad for parameter in load_adapter(path).parameters())


@pytest.mark.parametrize("size", [(8, 8), (10, 6)], ids=str)
def test_the_size_of_a_recording_is_known_before_the_base_runs(size):
    unet, rows = base_unet(), batch_rows([1])

    class Source:
        def __init__(self, reader):
            self.reader = reader

        def at(self, evaluation):
            unet(torch.zeros(2, 4, *size), torch.ones(2), torch.zeros(2, 7, unet.config.cross_attention_dim))
            return type("Found", (), {"features": self.reader.take(), "rows": rows})()

    with torch.no_grad(), read_features(unet) as reader:
        recording = record(Source(reader), [Evaluation(sigma, 0, 0.0) for sigma in (3.0, 2.0)])
    time_embeddings = sum(step.row_features.features.time_embedding.nbytes for step in recording.steps)
    assert recording.size - time_embeddings == expected_size(unet, 2, size, 2)


def test_settings_and_infotext_need_no_torch():
    rooms = "lib_xadapter.settings, lib_xadapter.infotext, lib_xadapter.presets"
    check = f"import sys, {rooms}; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True).stdout == "False\n"
