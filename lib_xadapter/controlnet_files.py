"""Which model a file for the ControlNet extension belongs to, from the names and shapes of its tensors.

A file is of one kind: ControlNet, T2I-Adapter, IP-Adapter, … Each kind has a function below that knows its names. What
a model has and has not comes first, as it holds for models of any width; the widths of the released models come next.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Literal

from .checkpoint_files import SD_UNET, SDXL_UNET, UnetLayout, family_of_projections
from .families import FAMILY_OF_CONTEXT_WIDTH
from .tensor_files import TensorInfo, read_tensor_infos

ControlFamily = Literal["sd1", "sd2", "sdxl", "unknown"]
Tensors = Mapping[str, TensorInfo]
Kind = Callable[[Tensors], "ControlFamily | None"]
"""Gives the family of a file of its kind, None for a file of another kind."""

UNETS: Mapping[ControlFamily, UnetLayout] = {"sd1": SD_UNET, "sdxl": SDXL_UNET}
# what stands before every name in some files: the original releases, diffusers' T2I-Adapters
PREFIXES = ("control_model.", "adapter.")


def detect_control_family(path: str | os.PathLike[str]) -> ControlFamily:
    """The model that a ControlNet, Control-LoRA, T2I-Adapter, IP-Adapter or ControlNet-LLLite was made for.

    Raises:
        WrongFile: the file is missing, cut off, or holds no tensors by name.
    """
    tensors = {_without_prefix(name): info for name, info in read_tensor_infos(path).items()}
    return next((family for kind in KINDS if (family := kind(tensors)) is not None), "unknown")


def _without_prefix(name: str) -> str:
    return next((name.removeprefix(prefix) for prefix in PREFIXES if name.startswith(prefix)), name)


# --- kinds ------------------------------------------------------------------------------------------------------------

PROJECTION = re.compile(r"(?:input_blocks|down_blocks|middle_block|mid_block)\..+\.proj_in\.weight")
CONTEXT_KEY = re.compile(r".+\.attn2\.to_k\.(?:weight|down)")


def sparse_control(tensors: Tensors) -> ControlFamily | None:
    """SparseCtrl of AnimateDiff, which exists for SD1.5 alone."""
    return "sd1" if any(".motion_modules." in name for name in tensors) else None


def control_network(tensors: Tensors) -> ControlFamily | None:
    """ControlNet and Control-LoRA, in CompVis or diffusers layout: a copy of the UNet's encoder."""
    compvis, diffusers = "input_hint_block.0.weight" in tensors, "controlnet_cond_embedding.conv_in.weight" in tensors
    if not compvis and not diffusers:
        return None
    # only SDXL is told the picture's size
    if any(name.startswith(("label_emb.", "add_embedding.")) for name in tensors):
        return "sdxl"
    levels = _numbers(r"input_blocks\.(\d+)\..+" if compvis else r"down_blocks\.(\d+)\..+", tensors)
    last_of_sd = 11 if compvis else len(SD_UNET.channels) - 1
    if max(levels, default=0) < last_of_sd:
        return "sdxl" if levels else "unknown"
    contexts = (info.shape[-1] for name, info in tensors.items() if CONTEXT_KEY.fullmatch(name))
    return family_of_projections(tensors, PROJECTION) or _by_width(contexts)


def t2i_adapter(tensors: Tensors) -> ControlFamily | None:
    """T2I-Adapter: folds 8x8 pixels of its hint into channels for SD1, 16x16 for SDXL."""
    first = tensors.get("conv_in.weight") or tensors.get("body.0.in_conv.weight")
    if first is None or not any(re.fullmatch(r"body\..+\.block1\.weight", name) for name in tensors):
        return None
    hint_channels = first.shape[1]
    if hint_channels in (16 * 16, 3 * 16 * 16):
        return "sdxl"
    return "sd1" if hint_channels in (8 * 8, 3 * 8 * 8) else "unknown"


def style_adapter(tensors: Tensors) -> ControlFamily | None:
    """T2I-Adapter's style model: gives tokens of the text encoder's width."""
    if "style_embedding" not in tensors:
        return None
    projection = tensors.get("proj")
    return FAMILY_OF_CONTEXT_WIDTH.get(projection.shape[-1], "unknown") if projection else "unknown"


def ip_adapter(tensors: Tensors) -> ControlFamily | None:
    """IP-Adapter: one pair of keys and values for each cross-attention of the UNet, 16 in SD, 70 in SDXL."""
    keys = [info for name, info in tensors.items() if re.fullmatch(r"ip_adapter\.\d+\.to_k_ip\.weight", name)]
    if not keys:
        return None
    if len(keys) > 16:
        return "sdxl"
    return _by_width(info.shape[-1] for info in keys)


def lllite(tensors: Tensors) -> ControlFamily | None:
    """ControlNet-LLLite: layers named after the attention layers that they go before."""
    names = [name.split(".")[0] for name in tensors if name.startswith("lllite_unet_")]
    if not names:
        return None
    # two ResNet blocks and a downsampling each in the encoder, three blocks in the decoder
    encoder = {(number - 1) // 3 for number in _numbers(r"lllite_unet_input_blocks_(\d+)_.+", names)}
    decoder = {number // 3 for number in _numbers(r"lllite_unet_output_blocks_(\d+)_.+", names)}
    fitting = [
        family
        for family, layout in UNETS.items()
        if encoder | {layout.encoder_level(level) for level in decoder} <= layout.attention_levels
    ]
    if len(fitting) == 1:
        return fitting[0]
    if any(number > 0 for number in _numbers(r".+_transformer_blocks_(\d+)_.+", names)):
        return "sdxl"
    contexts = [info for name, info in tensors.items() if re.fullmatch(r".+_attn2_to_[kv]\.down\.0\.weight", name)]
    return _by_width(info.shape[1] for info in contexts)


KINDS: tuple[Kind, ...] = (sparse_control, control_network, ip_adapter, t2i_adapter, style_adapter, lllite)


# --- what they share --------------------------------------------------------------------------------------------------


def _by_width(widths: Iterable[int]) -> ControlFamily:
    families = {FAMILY_OF_CONTEXT_WIDTH.get(width, "unknown") for width in widths}
    return families.pop() if len(families) == 1 else "unknown"


def _numbers(pattern: str, names: Iterable[str]) -> set[int]:
    return {int(found[1]) for name in names if (found := re.fullmatch(pattern, name))}
