"""Weights come out of torch.save's files without torch.load: no code of a file runs, and none can fill the memory."""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict

import pytest
import torch

from lib_xadapter.errors import WrongFile
from lib_xadapter.pickled_weights import read_pickle

WITH_OR_WITHOUT_ZIP = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before-zip"])
TYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.pt"


def equal(found, expected) -> bool:
    """Of everything that is around tensors, too."""
    if isinstance(expected, torch.Tensor):
        return found.dtype == expected.dtype and torch.equal(found, expected)
    if isinstance(expected, dict):
        return list(found) == list(expected) and all(equal(found[key], value) for key, value in expected.items())
    if isinstance(expected, list | tuple):
        return len(found) == len(expected) and all(map(equal, found, expected))
    return found == expected


@WITH_OR_WITHOUT_ZIP
class TestWhatTorchSaved:
    @pytest.fixture
    def again(self, path, zipped):
        """What is read of what was saved."""

        def again(content):
            torch.save(content, path, _use_new_zipfile_serialization=zipped)
            return read_pickle(path)

        return again

    @pytest.mark.parametrize("dtype", TYPES)
    def test_tensors_of_every_type(self, again, dtype):
        content = {
            "a": torch.arange(-3, 5).reshape(2, 4).to(getattr(torch, dtype)),
            "b": torch.ones((), dtype=torch.half),
        }
        assert equal(again(content), content)

    def test_views_of_one_storage(self, again):
        whole = torch.randn(6, 4)
        content = {"whole": whole, "turned": whole.T, "part": whole[1:5:2, 1:3], "expanded": whole[:1].expand(3, 4)}
        assert equal(again(content), content)

    def test_tensors_without_numbers(self, again):
        content = {"none": torch.zeros(0, 3), "empty": torch.zeros(2, 0)}
        assert equal(again(content), content)

    def test_state_dicts_parameters_and_plain_values(self, again):
        module = torch.nn.Linear(3, 2)
        content = {
            "state_dict": module.state_dict(),
            "epoch": 3,
            "told": ["a", 1.5, None, True],
            "inner": {"x": (1, 2)},
        }
        found = again(content)
        assert equal(found["state_dict"], dict(module.state_dict()))
        assert (found["epoch"], found["told"], found["inner"]) == (3, ["a", 1.5, None, True], {"x": [1, 2]})
        assert equal(again(dict(module.named_parameters())), dict(module.state_dict()))

    def test_what_a_training_run_leaves_beside_is_left_out(self, again):
        found = again(OrderedDict(a=torch.ones(1), seen={1, 2}, dtype=torch.float16))
        assert equal({"a": found["a"]}, {"a": torch.ones(1)})
        assert "seen" not in found

    def test_the_vectors_of_the_first_trainer_of_textual_inversions(self, again):
        vectors = torch.randn(2, 8)
        content = {"string_to_token": {"*": 265}, "string_to_param": torch.nn.ParameterDict({"*": vectors})}
        found = again(content)
        assert equal(found["string_to_param"], {"*": vectors})

    def test_a_command_is_refused_and_not_run(self, again, tmp_path):
        mark = tmp_path / "mark"
        with pytest.raises(WrongFile, match=r"asks for posix\.system|asks for nt\.system"):
            again({"a": CommandOnLoad(f"echo > {mark}")})
        assert not mark.exists()

    @pytest.mark.parametrize("kept", [0.2, 0.5, 0.9])
    def test_a_file_that_is_cut_off(self, path, zipped, kept):
        torch.save({"a": torch.zeros(1000)}, path, _use_new_zipfile_serialization=zipped)
        path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
        with pytest.raises(WrongFile, match=r"model\.pt is cut off"):
            read_pickle(path)


class CommandOnLoad:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        import os

        return os.system, (self.command,)


def test_code_of_a_torchscript_archive_does_not_run(path, tmp_path):
    """CVE-2025-32434: up to torch 2.5, torch.load runs it even with weights_only=True."""
    mark = tmp_path / "mark"

    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.mark, self.numbers = str(mark), 0

        @torch.jit.export
        def __getstate__(self):
            return self.mark, self.training

        @torch.jit.export
        def __setstate__(self, state: tuple[str, bool]):
            self.mark, self.training = state
            # a shared file is made where there is none
            self.numbers = torch.from_file(self.mark, True, 1).numel()

        def forward(self, x):
            return x

    torch.jit.script(Module()).save(str(path))
    torch.jit.load(str(path))
    assert mark.exists(), "the archive does nothing, so this test would prove nothing"
    mark.unlink()
    with pytest.raises(
        WrongFile, match=r"model\.pt is cut off or is no PyTorch file of tensors: it asks for __torch__"
    ):
        read_pickle(path)
    assert not mark.exists()


@pytest.fixture
def rewritten(path):
    """A saved file whose zip members are changed."""

    def rewrite(content, change):
        torch.save(content, path)
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w") as archive:
            for name, (data, kind) in change(members).items():
                archive.writestr(zipfile.ZipInfo(name), data, kind)
        return path

    return rewrite


def stored(members):
    return {name: (data, zipfile.ZIP_STORED) for name, data in members.items()}


def test_compressed_members_are_refused_before_they_are_unpacked(rewritten):
    """A thousandth of the file could be enough to fill the memory."""

    def change(members):
        return {
            name: (bytes(50_000_000) if "/data/" in name else data, zipfile.ZIP_DEFLATED)
            if "/data/" in name
            else (data, zipfile.ZIP_STORED)
            for name, data in members.items()
        }

    path = rewritten({"a": torch.zeros(12_500_000)}, change)
    assert path.stat().st_size < 100_000
    with pytest.raises(WrongFile, match="is compressed, which torch.save never does"):
        read_pickle(path)


def test_a_tensor_that_goes_beyond_its_weights(rewritten):
    """As in CVE-2026-24747: its weights are fewer than it claims."""

    def change(members):
        return stored({name: data[:8] if "/data/" in name else data for name, data in members.items()})

    with pytest.raises(WrongFile, match=r"a tensor of shape \(4,\) goes beyond its weights"):
        read_pickle(rewritten({"a": torch.zeros(4)}, change))


def test_weights_of_the_other_byte_order(rewritten):
    def change(members):
        return stored({name: b"big" if name.endswith("byteorder") else data for name, data in members.items()})

    with pytest.raises(WrongFile, match="not little-endian"):
        read_pickle(rewritten({"a": torch.zeros(4)}, change))


class Claims:
    """A tensor with any numbers in the place of its offset, shape and stride."""

    def __init__(self, *claims):
        self.claims = claims

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, (self.storage(), *self.claims, False, OrderedDict())

    @staticmethod
    def storage():
        return torch.zeros(4).storage()


@pytest.mark.filterwarnings("ignore:TypedStorage")
@pytest.mark.parametrize(
    "claims",
    [
        (0, (5,), (1,)),
        (4, (1,), (1,)),
        (-1, (1,), (1,)),
        (0, (2, 2), (4, 1)),
        (0, (2,), (-1,)),
        (0, (-1,), (1,)),
        (0, (2**62, 2**62), (1, 1)),
    ],
)
def test_shapes_that_make_no_sense(path, claims):
    torch.save({"a": Claims(*claims)}, path)
    with pytest.raises(WrongFile, match=r"goes beyond its weights"):
        read_pickle(path)


@pytest.mark.parametrize("content", [b"", b"PK", b"not a pickle", pickle.dumps({"a": 1}), b"\x80\x02."])
def test_a_file_that_torch_did_not_write(path, content):
    path.write_bytes(content)
    with pytest.raises(WrongFile, match=r"model\.pt is cut off or is no PyTorch file"):
        read_pickle(path)


def test_a_file_that_is_not_there(path):
    with pytest.raises(WrongFile, match="There is no file"):
        read_pickle(path)
