"""Names, shapes and types are read from model files without loading them, and broken files are named."""

from __future__ import annotations

import json
import os
import pickle
import sys
from collections import OrderedDict, defaultdict
from types import ModuleType

import numpy
import pytest
import torch
from safetensors.torch import save_file

from lib_xadapter.errors import WrongFile
from lib_xadapter.tensor_files import TensorInfo, read_metadata, read_tensor_infos

PICKLES = pytest.mark.parametrize("name", ["model.pt", "model.bin", "model.ckpt", "model.PTH"])
WITH_OR_WITHOUT_ZIP = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before-zip"])


@pytest.fixture
def tensors():
    return {
        "a.weight": torch.zeros(2, 3, 1, 1),
        "a.bias": torch.zeros(2, dtype=torch.float16),
        "alpha": torch.tensor(4.0, dtype=torch.bfloat16),
        "steps": torch.tensor([1, 2]),
    }


@pytest.fixture
def infos():
    return {
        "a.weight": TensorInfo((2, 3, 1, 1), "float32"),
        "a.bias": TensorInfo((2,), "float16"),
        "alpha": TensorInfo((), "bfloat16"),
        "steps": TensorInfo((2,), "int64"),
    }


class TestSafetensors:
    @pytest.fixture
    def path(self, tmp_path, tensors):
        path = tmp_path / "model.safetensors"
        save_file(tensors, path, metadata={"trainer": "kohya"})
        return path

    @pytest.fixture
    def written(self, tmp_path):
        """A file with the given header and bytes of weights."""

        def write(header, weights=b""):
            text = header if isinstance(header, bytes) else json.dumps(header).encode()
            path = tmp_path / "model.safetensors"
            path.write_bytes(len(text).to_bytes(8, "little") + text + weights)
            return path

        return write

    def test_names_shapes_and_types(self, path, infos):
        assert read_tensor_infos(path) == infos
        assert read_tensor_infos(str(path)) == infos

    def test_metadata(self, path):
        assert read_metadata(path) == {"trainer": "kohya"}

    def test_a_file_without_metadata_or_tensors(self, written):
        path = written({})
        assert read_tensor_infos(path) == {}
        assert read_metadata(path) == {}

    def test_a_type_that_is_not_known_keeps_its_name(self, written):
        path = written({"a": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}, b"..")
        assert read_tensor_infos(path) == {"a": TensorInfo((4,), "f4")}

    @pytest.mark.parametrize("length", [0, 4, 8, 50, -1])
    def test_a_file_that_is_cut_off(self, path, length):
        path.write_bytes(path.read_bytes()[:length])
        with pytest.raises(WrongFile, match=r"model\.safetensors is cut off"):
            read_tensor_infos(path)

    def test_something_else_under_this_name(self, tmp_path):
        path = tmp_path / "page.safetensors"
        path.write_text("<!DOCTYPE html><html>404</html>")
        with pytest.raises(WrongFile, match=r"page\.safetensors is no safetensors file: no header begins"):
            read_metadata(path)

    @pytest.mark.parametrize("header", [b"{not json", b"\xff\xfe{}", b"[" * 100_000])
    def test_a_header_that_is_not_json(self, written, header):
        with pytest.raises(WrongFile, match="its header is not JSON"):
            read_tensor_infos(written(header))

    def test_a_header_that_is_no_object(self, written):
        with pytest.raises(WrongFile, match="its header is not a JSON object"):
            read_tensor_infos(written(["a"]))

    def test_metadata_that_are_no_object(self, written):
        with pytest.raises(WrongFile, match="'__metadata__' is not an object"):
            read_metadata(written({"__metadata__": "kohya"}))

    @pytest.mark.parametrize("entry", [{}, None, 3, {"dtype": "F32", "shape": [1], "data_offsets": [0]}])
    def test_an_entry_that_is_not_whole(self, written, entry):
        with pytest.raises(WrongFile, match="'a' needs dtype, shape and two data offsets"):
            read_tensor_infos(written({"a": entry}))

    @pytest.mark.parametrize(("shape", "offsets"), [([-1], [0, 4]), (["1"], [0, 4]), ([1.0], [0, 4]), ([1], [-4, 0])])
    def test_numbers_that_make_no_sense(self, written, shape, offsets):
        with pytest.raises(WrongFile, match="of 'a' must be whole numbers"):
            read_tensor_infos(written({"a": {"dtype": "F32", "shape": shape, "data_offsets": offsets}}, b"...."))

    def test_offsets_that_do_not_fit_the_shape(self, written):
        with pytest.raises(WrongFile, match=r"'a' of shape \(2,\) in float32 needs 8 bytes, its data offsets give 4"):
            read_tensor_infos(written({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"...."))


@PICKLES
@WITH_OR_WITHOUT_ZIP
class TestPickles:
    @pytest.fixture
    def saved(self, tmp_path, name, zipped):
        """The path of a file that torch.save wrote."""

        def save(content):
            path = tmp_path / name
            torch.save(content, path, _use_new_zipfile_serialization=zipped)
            return path

        return save

    def test_names_shapes_and_types(self, saved, tensors, infos):
        assert read_tensor_infos(saved(tensors)) == infos

    def test_a_state_dict_and_what_a_training_run_leaves_beside_it(self, saved, tensors, infos):
        beside = {
            "epoch": 3,
            "loss": numpy.float64(0.5),
            "dtype": torch.float16,
            "lr": defaultdict(int, a=1),
            "seen": {1, 2},
        }
        assert read_tensor_infos(saved({"state_dict": OrderedDict(tensors), **beside})) == infos

    def test_parameters_of_a_module(self, saved):
        module = torch.nn.Linear(3, 2)
        infos = {"weight": TensorInfo((2, 3), "float32"), "bias": TensorInfo((2,), "float32")}
        assert read_tensor_infos(saved(module.state_dict())) == infos
        assert read_tensor_infos(saved(dict(module.named_parameters()))) == infos

    def test_there_are_no_metadata(self, saved, tensors):
        assert read_metadata(saved(tensors)) == {}

    def test_only_tensors_by_name_are_told(self, saved, tensors):
        assert read_tensor_infos(saved({"note": "hello", 3: tensors["alpha"]})) == {}

    def test_something_that_has_no_names(self, saved, tensors):
        with pytest.raises(WrongFile, match="holds one list, expected tensors by name"):
            read_tensor_infos(saved(list(tensors.values())))

    def test_a_pickle_that_would_run_a_command_is_refused_and_runs_nothing(self, saved, name, tmp_path):
        mark = tmp_path / "mark"
        with pytest.raises(WrongFile, match=rf"{name} .*asks for (posix|nt)\.system"):
            read_tensor_infos(saved({"a": CommandOnLoad(f"echo > {mark}")}))
        assert not mark.exists()

    def test_a_file_that_is_cut_off(self, saved, tensors, name):
        path = saved(tensors)
        path.write_bytes(path.read_bytes()[:300])
        with pytest.raises(WrongFile, match=rf"{name} is cut off or is no PyTorch file"):
            read_tensor_infos(path)


class CommandOnLoad:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("content", [b"", b"PK", b"not a pickle", pickle.dumps({"a": 1}), b"\x80\x02."])
def test_a_file_that_torch_did_not_write(tmp_path, content):
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    with pytest.raises(WrongFile, match=r"model\.pt is cut off or is no PyTorch file"):
        read_tensor_infos(path)


@pytest.mark.skipif(not hasattr(torch, "uint16"), reason="this torch has no types without a storage class of their own")
def test_types_without_a_storage_class_of_their_own(tmp_path):
    torch.save({"a": torch.zeros(3, dtype=torch.uint16)}, tmp_path / "model.pt")
    assert read_tensor_infos(tmp_path / "model.pt") == {"a": TensorInfo((3,), "uint16")}


def test_callbacks_in_the_first_stable_diffusion_checkpoints(tmp_path, monkeypatch):
    module = "pytorch_lightning.callbacks.model_checkpoint"
    checkpoint = type("ModelCheckpoint", (), {"__module__": module})
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", module):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules[module].ModelCheckpoint = checkpoint
    path = tmp_path / "sd.ckpt"
    torch.save({"state_dict": {"a": torch.zeros(2)}, "callbacks": {checkpoint: {"last": checkpoint()}}}, path)
    assert read_tensor_infos(path) == {"a": TensorInfo((2,), "float32")}


@pytest.mark.parametrize("name", ["missing.safetensors", "missing.ckpt"])
def test_a_file_that_is_missing(tmp_path, name):
    with pytest.raises(WrongFile, match=rf"There is no file .*{name}"):
        read_tensor_infos(tmp_path / name)


@pytest.mark.parametrize("name", ["folder.safetensors", "folder.pt"])
def test_a_folder(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(WrongFile, match=f"{name} cannot be read"):
        read_tensor_infos(tmp_path / name)
