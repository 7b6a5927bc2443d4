"""Which model family a checkpoint belongs to, from the names and shapes of its tensors."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from .tensor_files import TensorInfo, read_tensor_infos

CheckpointFamily = Literal["sd1", "sd2", "sd2-unclip", "sdxl", "sdxl-refiner", "unknown"]


@dataclass(frozen=True)
class UnetLayout:
    """What tells one UNet from another whatever its width: how many levels it has and which hold attention.

    Attributes:
        channels: released width of each encoder level, finest first; the decoder has the same levels, coarsest first.
        attention_levels: the encoder levels with attention, counted from the finest.
    """

    channels: tuple[int, ...]
    attention_levels: frozenset[int]

    def encoder_level(self, decoder_level: int) -> int:
        """The encoder level of the same size as a decoder level, which counts from the coarsest."""
        return len(self.channels) - 1 - decoder_level


# the released configurations: v1-inference.yaml and v2-inference.yaml, sd_xl_base.yaml, sd_xl_refiner.yaml
SD_UNET = UnetLayout(channels=(320, 640, 1280, 1280), attention_levels=frozenset({0, 1, 2}))
SDXL_UNET = UnetLayout(channels=(320, 640, 1280), attention_levels=frozenset({1, 2}))
SDXL_REFINER_UNET = UnetLayout(channels=(384, 768, 1536, 1536), attention_levels=frozenset({1, 2}))

UNET_PREFIX = "model.diffusion_model."
FIRST_CONVOLUTION = f"{UNET_PREFIX}input_blocks.0.0.weight"
PICTURE_EMBEDDING = f"{UNET_PREFIX}label_emb.0.0.weight"
"""What only SD2.1-unCLIP has beside SD2's layers: it is conditioned on CLIP's embedding of a picture."""

# two ResNet blocks and a downsampling each, after the first convolution
INPUT_BLOCKS_PER_LEVEL = 3
INPUT_BLOCK = re.compile(rf"{re.escape(UNET_PREFIX)}input_blocks\.(?P<block>[1-9]\d*)\.(?P<layer>\d+)\.(?P<rest>.+)")
PROJECTION = re.compile(rf"{re.escape(UNET_PREFIX)}.+\.proj_in\.weight")
TEMPORAL_LAYER = ".time_stack."

# text encoder of an SD checkpoint → family: CLIP of transformers, OpenCLIP
TEXT_ENCODERS: Mapping[str, CheckpointFamily] = {
    "cond_stage_model.transformer.": "sd1",
    "cond_stage_model.model.": "sd2",
}


def detect_checkpoint_family(path: str | os.PathLike[str]) -> CheckpointFamily:
    """The family of a single-file checkpoint in CompVis layout; "unknown" for every other file.

    Structure decides and widths do not, so that models of other widths are recognised, too. The UNet comes first, as
    it is what X-Adapter works on; the text encoder speaks only where the UNet fits SD1 and SD2 alike.

    Raises:
        WrongFile: the file is missing, cut off, or holds no tensors by name.
    """
    tensors = read_tensor_infos(path)
    layout = unet_layout(tensors)
    if layout == SDXL_UNET:
        return "sdxl"
    if layout == SDXL_REFINER_UNET:
        return "sdxl-refiner"
    if layout == SD_UNET and PICTURE_EMBEDDING in tensors:
        return "sd2-unclip"
    if layout == SD_UNET:
        return family_of_projections(tensors, PROJECTION) or _family_of_text_encoder(tensors)
    return "unknown"


def input_channels(path: str | os.PathLike[str]) -> int | None:
    """Channels that the checkpoint's UNet takes: 4, or 9 for an inpainting model; None without a CompVis UNet.

    Raises:
        WrongFile: as for `detect_checkpoint_family`.
    """
    convolution = read_tensor_infos(path).get(FIRST_CONVOLUTION)
    return convolution.shape[1] if convolution and len(convolution.shape) == 4 else None


def unet_layout(tensors: Mapping[str, TensorInfo]) -> UnetLayout | None:
    """The layout that a checkpoint's UNet has, by its encoder; None where it is none of those known."""
    levels, attention_levels = set(), set()
    for name in tensors:
        if TEMPORAL_LAYER in name:
            return None  # a video model made from SD2
        if found := INPUT_BLOCK.fullmatch(name):
            level = (int(found["block"]) - 1) // INPUT_BLOCKS_PER_LEVEL
            levels.add(level)
            if found["rest"].startswith("transformer_blocks."):
                attention_levels.add(level)
    for layout in (SD_UNET, SDXL_UNET, SDXL_REFINER_UNET):
        if (len(levels), attention_levels) == (len(layout.channels), layout.attention_levels):
            return layout
    return None


def family_of_projections(tensors: Mapping[str, TensorInfo], projection: re.Pattern[str]) -> CheckpointFamily | None:
    """SD1 projects into its transformers by 1x1 convolutions (4 dimensions), SD2 by linear layers (2 dimensions).

    Args:
        projection: matches the names of those layers' weights.
    """
    dimensions = {len(info.shape) for name, info in tensors.items() if projection.fullmatch(name)}
    return {(4,): "sd1", (2,): "sd2"}.get(tuple(dimensions))


def _family_of_text_encoder(tensors: Mapping[str, TensorInfo]) -> CheckpointFamily:
    found = (family for prefix, family in TEXT_ENCODERS.items() if any(name.startswith(prefix) for name in tensors))
    return next(found, "unknown")
