"""Small random files for the ControlNet extension, beside those of small_models.py."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .units import CONTROLNET, T2I_ADAPTER, T2I_OF_SDXL, T2I_WITHOUT_NAME

IP_ADAPTER = "ip-adapter_sd15"
IP_ADAPTER_PLUS = "ip-adapter-plus_sd15"
FACE_ID = "ip-adapter-faceid_sd15"
CHANNELS, TEXT_WIDTH = 32, 64
"""Of tiny15's first level, and of its text encoder (small_models.py)."""
IMAGE_WIDTH = 48
"""Of the embedding of a whole image; the extension reads it from the file."""
PATCH_WIDTH = 1280
"""Of the embeddings of its patches; the extension has those of an empty image in this width."""
FACE_WIDTH = 512
SHUFFLE = "control_v11e_sd15_shuffle"

# channels of the UNet's cross-attentions in the order in which an IP-Adapter numbers them: encoder, decoder, middle
ATTENTIONS = (1, 1, 2, 2, 4, 4, 4, 4, 4, 2, 2, 2, 1, 1, 1, 4)


def write_controls(models: Path, folder: Path) -> None:
    """T2I-Adapters that no name tells apart, IP-Adapters, and files that cannot work.

    Args:
        models: the folder that small_models.py wrote.
        folder: a folder of the same layout.
    """
    controls = folder / "models/ControlNet"
    controls.mkdir(parents=True)
    source = models / f"models/ControlNet/{T2I_ADAPTER}.safetensors"
    weights = load_file(source)
    stronger = {name: 2 * tensor if "block2" in name else tensor for name, tensor in weights.items()}
    save_file(stronger, controls / f"{T2I_WITHOUT_NAME}.safetensors")
    first = torch.randn((32, 3 * 16 * 16, 3, 3), generator=torch.Generator().manual_seed(3)) / 83
    save_file({**weights, "conv_in.weight": first}, controls / f"{T2I_OF_SDXL}.safetensors")
    (controls / "cut_sd15.safetensors").write_bytes(source.read_bytes()[:20000])
    (controls / "text_sd15.pth").write_text("no model")
    odd = {name: tensor for name, tensor in weights.items() if not name.startswith("body.7")}
    odd["body.0.block1.weight"] = torch.zeros(8, 8, 3, 3)
    save_file(odd, controls / "odd_sd15.safetensors")
    save_file({**odd, "conv_in.weight": first}, controls / "odd_sdxl.safetensors")
    for name, projection in ((IP_ADAPTER, whole_image()), (IP_ADAPTER_PLUS, patches()), (FACE_ID, face())):
        save_file(ip_adapter(projection), controls / f"{name}.safetensors")


def name_for_shuffling(models: Path, folder: Path) -> None:
    """The full-width ControlNet under another name, by which the extension averages over the picture."""
    controls = folder / "models/ControlNet"
    controls.mkdir(parents=True)
    (controls / f"{SHUFFLE}.safetensors").symlink_to(models / f"models/ControlNet/{CONTROLNET}.safetensors")


def write_annotators(folder: Path) -> None:
    """An annotator's file without weights: the extension leaves the network as it was initialised."""
    (folder / "lama").mkdir()
    torch.save({"state_dict": {}}, folder / "lama/ControlNetLama.pth", _use_new_zipfile_serialization=False)


# --- IP-Adapters for tiny15 -------------------------------------------------------------------------------------------


def ip_adapter(projection: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Random weights under the names of the h94 files: the projection to tokens, a key and a value per attention."""
    shapes = {f"image_proj.{name}": shape for name, shape in projection.items()}
    for place, channels in enumerate(ATTENTIONS):
        shape = (channels * CHANNELS, TEXT_WIDTH)
        shapes |= {f"ip_adapter.{2 * place + 1}.to_{part}_ip.weight": shape for part in ("k", "v")}
    generator = torch.Generator().manual_seed(5)
    return {name: torch.randn(shape, generator=generator) / math.sqrt(shape[-1]) for name, shape in shapes.items()}


def whole_image(tokens: int = 4) -> dict[str, tuple[int, ...]]:
    """Of one embedding for the whole image."""
    width = TEXT_WIDTH
    return {**linear("proj", IMAGE_WIDTH, tokens * width), **norm("norm", width)}


def patches(tokens: int = 16, layers: int = 4, inner: int = 12 * 64) -> dict[str, tuple[int, ...]]:
    """Of an embedding for every patch: a resampler."""
    width = TEXT_WIDTH
    shapes = {"latents": (1, tokens, width), **linear("proj_in", PATCH_WIDTH, width)}
    shapes |= {**linear("proj_out", width, width), **norm("norm_out", width)}
    for layer in range(layers):
        attention, feed_forward = f"layers.{layer}.0", f"layers.{layer}.1"
        shapes |= {**norm(f"{attention}.norm1", width), **norm(f"{attention}.norm2", width)}
        shapes |= {f"{attention}.to_q.weight": (inner, width), f"{attention}.to_kv.weight": (2 * inner, width)}
        shapes |= {f"{attention}.to_out.weight": (width, inner), **norm(f"{feed_forward}.0", width)}
        shapes |= {f"{feed_forward}.1.weight": (4 * width, width), f"{feed_forward}.3.weight": (width, 4 * width)}
    return shapes


def face(tokens: int = 4) -> dict[str, tuple[int, ...]]:
    """Of the embedding of a face."""
    width = TEXT_WIDTH
    first, second = linear("proj.0", FACE_WIDTH, 2 * FACE_WIDTH), linear("proj.2", 2 * FACE_WIDTH, tokens * width)
    return {**first, **second, **norm("norm", width)}


def linear(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}
