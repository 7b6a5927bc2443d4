"""`inspect`: what a model file is, from the names and shapes of its tensors."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from ..checkpoint_files import detect_checkpoint_family, input_channels
from ..errors import WrongFile
from ..families import FAMILY_NAMES, FAMILY_OF_CONTEXT_WIDTH, FAMILY_OF_EMBEDDING_WIDTH
from ..lora_files import detect_lora_base
from ..mapping import METADATA, BlockLayout, read_kind, read_layout
from ..pairs import Pair
from ..tensor_files import TensorInfo, read_metadata, read_tensor_infos
from .options import say

SECOND_TEXT_ENCODER_WIDTH = 1280
"""Of SDXL's."""


def inspect_file(options: argparse.Namespace) -> int:
    """Say what a file is."""
    for line in describe(options.file):
        say(line)
    return 0


def describe(path: Path) -> list[str]:
    """What a file is, and what it holds, a line each.

    Raises:
        WrongFile: it is missing, cut off, or holds no tensors.
    """
    if path.is_dir():
        raise WrongFile(f"{path} is a folder, expected a model file.")
    tensors = read_tensor_infos(path)
    kinds = (_adapter, _controlnet, _checkpoint, _embedding, _lora)
    found = next((lines for kind in kinds if (lines := kind(path, tensors))), ["a file of tensors that is not known"])
    types = ", ".join(f"{count} {dtype}" for dtype, count in Counter(t.dtype for t in tensors.values()).most_common())
    return [f"{path.name}: {found[0]}", *found[1:], f"  {len(tensors)} tensors ({types})"]


def _adapter(path: Path, tensors: Mapping[str, TensorInfo]) -> list[str]:
    if "body.0.block1.weight" not in tensors or "zero_out.0.weight" not in tensors:
        return []
    metadata = read_metadata(path)
    kind = read_kind(metadata, path.name)
    levels = read_layout({key: info.shape for key, info in tensors.items()}, path.name, len(kind.taps))
    first: BlockLayout = levels[0][0]
    options = [
        f"{len(levels[0])} ResNet blocks a level",
        f"GroupNorm {'on' if first.has_norm else 'off'}",
        f"timestep conditioning {f'on ({first.time_channels} channels)' if first.time_channels else 'off'}",
    ]
    return [
        _title(Pair.written_in(metadata)),
        f"  {', '.join(options)}",
        f"  positions: {kind.positions}, fusion: {kind.fusion}",
        *(
            f"  level {number}: {level[0].in_channels} → {level[-1].out_channels} channels"
            f"{', twice the size' if level[0].upsamples else ''}"
            for number, level in enumerate(levels)
        ),
        *(f"  {key.removeprefix(METADATA)}: {value}" for key, value in sorted(metadata.items()) if _tells(key)),
    ]


def _title(pair: Pair) -> str:
    return f"an X-Adapter for {pair}" if str(pair) else "an X-Adapter"


def _tells(key: str) -> bool:
    """Whether a line of its own says what stands under a key of the metadata."""
    return key.startswith(METADATA) and key.removeprefix(METADATA) not in ("fusion", "positions", "pair")


def _controlnet(path: Path, tensors: Mapping[str, TensorInfo]) -> list[str]:
    ends = ("middle_block_out.0.weight", "controlnet_mid_block.weight")
    if not any(key.removeprefix("control_model.") in ends for key in tensors):
        return []
    widths = {info.shape[-1] for key, info in tensors.items() if key.endswith(".attn2.to_k.weight")}
    width = min(widths, default=0)
    layout = "diffusers" if ends[1] in tensors else "CompVis"
    return [
        f"a ControlNet for {_name(FAMILY_OF_CONTEXT_WIDTH, width) or f'a model with prompts of {width} channels'}",
        f"  {layout} layout",
    ]


def _checkpoint(path: Path, tensors: Mapping[str, TensorInfo]) -> list[str]:
    family = detect_checkpoint_family(path)
    if family == "unknown":
        return []
    channels = input_channels(path)
    parts = {
        "VAE": "first_stage_model.",
        "text encoder": ("cond_stage_model.", "conditioner.embedders."),
        "EMA weights": "model_ema.",
    }
    held = [name for name, prefix in parts.items() if any(key.startswith(prefix) for key in tensors)]
    kind = " inpainting" if channels == 9 else ""
    return [
        f"a checkpoint of {FAMILY_NAMES[family]}{kind}",
        f"  UNet of {channels} channels, {', '.join(held) or 'no VAE'}",
    ]


def _lora(path: Path, tensors: Mapping[str, TensorInfo]) -> list[str]:
    base = detect_lora_base(path)
    if base == "unknown" and not any("lora" in key or "hada_" in key or "lokr_" in key for key in tensors):
        return []
    ranks = {
        min(info.shape[:2]) for key, info in tensors.items() if key.endswith(("lora_down.weight", "lora_A.weight"))
    }
    return [
        f"a LoRA for {FAMILY_NAMES.get(base, 'a model that its keys and shapes do not tell')}",
        *([f"  rank {', '.join(map(str, sorted(ranks)))}"] if ranks else []),
    ]


def _embedding(path: Path, tensors: Mapping[str, TensorInfo]) -> list[str]:
    shapes = {key: info.shape for key, info in tensors.items()}
    if "clip_l" in shapes and "clip_g" in shapes:
        return ["an embedding for SDXL", f"  {shapes['clip_l'][0]} tokens"]
    if not 0 < len(shapes) <= 2 or not all(len(shape) in (1, 2) for shape in shapes.values()):
        return []
    shape = next(iter(shapes.values()))
    model = _name(FAMILY_OF_EMBEDDING_WIDTH, shape[-1]) or f"a text encoder of {shape[-1]} channels"
    if shape[-1] == SECOND_TEXT_ENCODER_WIDTH:
        model = "SDXL (second text encoder)"
    return [f"an embedding for {model}", f"  {shape[0] if len(shape) == 2 else 1} tokens"]


def _name(families: Mapping[int, str], width: int) -> str | None:
    """The name of a width's family, None where there is none."""
    return FAMILY_NAMES[families[width]] if width in families else None
