"""Files that are broken anywhere: every reader gives an answer or one sentence, and nothing else happens."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy
import pytest
import safetensors.torch
import torch

from lib_xadapter.checkpoint_files import detect_checkpoint_family, input_channels
from lib_xadapter.controlnet_files import detect_control_family
from lib_xadapter.errors import WrongFile, XAdapterError
from lib_xadapter.lora_files import detect_lora_base
from lib_xadapter.mapping import load_adapter, read_weights
from lib_xadapter.pickled_weights import read_pickle
from lib_xadapter.tensor_files import read_metadata, read_tensor_infos
from tests.small_adapter import AdapterPlan

READERS: tuple[Callable, ...] = (
    read_tensor_infos,
    read_metadata,
    read_weights,
    load_adapter,
    detect_lora_base,
    detect_control_family,
    detect_checkpoint_family,
    input_channels,
)
LORA = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
CONTENTS = {
    "adapter": AdapterPlan().weights(),
    "lora": {
        f"{LORA}.lora_up.weight": torch.ones(320, 4),
        f"{LORA}.lora_down.weight": torch.ones(4, 768),
        f"{LORA}.alpha": torch.tensor(4.0),
    },
    "controlnet": {
        "control_model.zero_convs.0.0.weight": torch.zeros(32, 32, 1, 1),
        "control_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(32, 768),
    },
    "checkpoint": {
        "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(32, 4, 3, 3),
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(32, 768),
    },
}
MUTATIONS = 60
"""Of each file for each reader."""


def written(path, content, kind: str) -> bytes:
    if kind == "safetensors":
        return safetensors.torch.save(dict(content), metadata={"ss_network_module": "networks.lora"})
    torch.save(dict(content), path, _use_new_zipfile_serialization=kind == "zip")
    return path.read_bytes()


def broken(whole: bytes, random: numpy.random.Generator) -> bytes:
    """Some bytes changed, cut off, put in, doubled or moved; more often near the beginning, where headers are."""
    data = bytearray(whole)
    for _ in range(int(random.integers(1, 4))):
        place = int(random.integers(0, max(1, int(len(data) * random.choice([0.01, 0.1, 1.0])))))
        length = int(random.integers(1, 64))
        change = random.integers(6)
        if change == 0 and data:
            data[place] ^= 1 << int(random.integers(8))
        elif change == 1:
            data[place : place + length] = random.bytes(length)
        elif change == 2:
            del data[place:]
        elif change == 3:
            data[place:place] = random.bytes(length)
        elif change == 4:
            data[place:place] = data[place : place + length]
        else:
            del data[place : place + length]
    return bytes(data)


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.__name__)
@pytest.mark.parametrize("kind", ["safetensors", "zip", "before-zip"])
@pytest.mark.parametrize("content", CONTENTS)
def test_a_broken_file_is_read_or_told_in_one_sentence(tmp_path, content, kind, reader):
    path = tmp_path / ("model.safetensors" if kind == "safetensors" else "model.pt")
    whole = written(path, CONTENTS[content], kind)
    random = numpy.random.default_rng(list(f"{content} {kind} {reader.__name__}".encode()))
    for _ in range(MUTATIONS):
        path.write_bytes(broken(whole, random))
        try:
            reader(path)
        except XAdapterError as error:
            told = str(error)
            assert "model." in told
            assert len(told) < 2000


@pytest.mark.parametrize("length", [2**32, 2**40, 2**63, 2**64 - 1])
def test_a_header_that_claims_gigabytes_is_refused_before_it_is_read(tmp_path, length):
    path = tmp_path / "model.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b"{}" + bytes(100))
    with pytest.raises(WrongFile, match=f"expected a header of {length} bytes"):
        read_tensor_infos(path)


def test_a_header_as_long_as_its_claim_is_refused_all_the_same(tmp_path):
    """A file of zeros costs nothing on the disk, and its header would fill the memory."""
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write((2**32).to_bytes(8, "little"))
        file.truncate(2**32 + 100)
    with pytest.raises(WrongFile, match="its header claims 4294967296 bytes, expected 100000000 at most"):
        read_tensor_infos(path)


def test_shapes_whose_product_has_no_end_are_told(tmp_path):
    header = json.dumps({"a": {"dtype": "F32", "shape": [2**62] * 40, "data_offsets": [0, 4]}}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(WrongFile, match=r"model\.safetensors: 'a' of shape"):
        read_tensor_infos(path)


def test_a_pickle_that_goes_on_in_itself_ends(tmp_path):
    content: dict = {}
    content["itself"] = content
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(WrongFile, match="holds a list or mapping in itself"):
        read_pickle(tmp_path / "model.pt")
