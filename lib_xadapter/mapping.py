"""The mapping layers: three ResNet blocks and a 1x1 convolution per level, the only trained part of X-Adapter.

Source: paper, "X-Adapter" (mapping layers); released code, `model/adapter.py`, class `Adapter_XL`. Attribute names
below are the keys of the released checkpoint, misspellings included, so that a file loads without renaming.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional

from .errors import DoesNotFit, WrongFile, first_line
from .pickled_weights import read_pickle
from .saving import write_tensors
from .taps import (
    FUSIONS,
    POSITIONS,
    SCALING_FUSIONS,
    Taps,
    base_modules,
    base_strides,
    output_channels,
    time_channels_of,
    upgraded_modules,
    upgraded_strides,
)
from .tensor_files import is_pickled, read_metadata, read_tensor_infos

METADATA = "xadapter."
"""What our keys in a file's metadata begin with."""

NORM_GROUPS = 32


@dataclass(frozen=True)
class BlockLayout:
    """What one ResNet block is made of, as its weights in the file tell.

    `kernel` is the size of the square kernels of `in_conv`, `block2` and `skep`; `block1` is always 3x3.
    """

    in_channels: int
    out_channels: int
    kernel: int = 3
    upsamples: bool = False
    changes_channels: bool = False
    has_skip_convolution: bool = False
    has_norm: bool = False
    time_channels: int | None = None


class Upsampling(nn.Module):
    """Transposed convolution to exactly twice the height and width, odd sizes included."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.ConvTranspose2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        return self.op(x, output_size=(2 * height, 2 * width))


class TimestepProjection(nn.Module):
    """The base's time embedding, projected to one bias per channel."""

    def __init__(self, time_channels: int, out_channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(time_channels, out_channels)

    def forward(self, time_embedding: Tensor) -> Tensor:
        return self.linear(time_embedding)[:, :, None, None]


class ResNetBlock(nn.Module):
    """[up] → [in_conv] → h = conv(x) [+ time] → [norm] → ReLU → conv; h + x."""

    def __init__(self, layout: BlockLayout) -> None:
        super().__init__()
        inner, outer, kernel = layout.in_channels, layout.out_channels, layout.kernel
        padding = kernel // 2
        self.up_opt = Upsampling(inner) if layout.upsamples else None
        self.in_conv = nn.Conv2d(inner, outer, kernel, padding=padding) if layout.changes_channels else None
        self.block1 = nn.Conv2d(outer, outer, 3, padding=1)
        self.timestep_proj = TimestepProjection(layout.time_channels, outer) if layout.time_channels else None
        self.norm1 = nn.GroupNorm(NORM_GROUPS, outer, eps=1e-6) if layout.has_norm else None
        self.block2 = nn.Conv2d(outer, outer, kernel, padding=padding)
        # the released class feeds the skip convolution what in_conv gave, so its input has the outer width
        self.skep = nn.Conv2d(outer, outer, kernel, padding=padding) if layout.has_skip_convolution else None

    def forward(self, x: Tensor, time_embedding: Tensor | None = None) -> Tensor:
        if self.up_opt is not None:
            x = self.up_opt(x)
        if self.in_conv is not None:
            x = self.in_conv(x)
        h = self.block1(x)
        if self.timestep_proj is not None:
            h = h + self.timestep_proj(time_embedding)
        if self.norm1 is not None:
            h = self.norm1(h)
        h = self.block2(functional.relu(h))
        return h + (x if self.skep is None else self.skep(x))


class MappingLayers(nn.Module):
    """Base features to residuals for the upgraded model, level by level.

    Args:
        levels: the blocks of each level, coarsest feature first.
        fusion: how the residuals enter the upgraded features, one of `taps.FUSIONS`.
        positions: where features are read and residuals added, one of `taps.POSITIONS`.
    """

    def __init__(
        self, levels: Sequence[Sequence[BlockLayout]], fusion: str = "addition", positions: str = "decoder"
    ) -> None:
        super().__init__()
        self.fusion = fusion
        self.positions = positions
        self.levels = tuple(tuple(level) for level in levels)
        self.body = nn.ModuleList(ResNetBlock(layout) for layout in itertools.chain(*self.levels))
        self.zero_out = nn.ModuleList(
            nn.Conv2d(level[-1].out_channels, level[-1].out_channels, 1) for level in self.levels
        )
        if fusion in SCALING_FUSIONS:
            self.gamma = nn.ModuleList(nn.Conv2d(*layer.weight.shape[:2], 1) for layer in self.zero_out)

    @property
    def taps(self) -> Taps:
        """Where features are read and residuals added."""
        return POSITIONS[self.positions]

    @property
    def in_channels(self) -> tuple[int, ...]:
        """Channels of the base feature that each level takes."""
        return tuple(level[0].in_channels for level in self.levels)

    @property
    def out_channels(self) -> tuple[int, ...]:
        """Channels of the residual that each level gives."""
        return tuple(level[-1].out_channels for level in self.levels)

    @property
    def time_channels(self) -> int | None:
        """Width of the base's time embedding that the blocks take, None where they take none."""
        return self.levels[0][0].time_channels

    def zero_output(self) -> MappingLayers:
        """Let every residual be zero, as training starts (paper, "Training": zero-initialised output convolutions)."""
        for convolution in itertools.chain.from_iterable(self.output_convolutions(n) for n in range(len(self.levels))):
            nn.init.zeros_(convolution.weight)
            nn.init.zeros_(convolution.bias)
        return self

    def output_convolutions(self, level: int) -> list[nn.Conv2d]:
        """Those of a level: of the residual, or of the shift and then the scale."""
        return [outputs[level] for outputs in (self.zero_out, getattr(self, "gamma", None)) if outputs is not None]

    def map_level(self, level: int, feature: Tensor, time_embedding: Tensor | None = None) -> Tensor:
        """The residual of one level.

        Args:
            level: 0, 1 or 2, or up to 5 for encoder and decoder together.
            feature: (rows, in_channels[level], h, w).
            time_embedding: (rows, time_channels), for mapping layers with timestep conditioning.

        Returns:
            (rows, out_channels[level], h, w), twice h and w where the level upsamples, twice the channels where the
            fusion scales: shift and scale.
        """
        return self.output(level, self.hidden(level, feature, time_embedding))

    def output(self, level: int, hidden: Tensor) -> Tensor:
        """What the output convolutions of a level make of what its ResNet blocks gave; sizes as for `map_level`."""
        outputs = [convolution(hidden) for convolution in self.output_convolutions(level)]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    def hidden(self, level: int, feature: Tensor, time_embedding: Tensor | None = None) -> Tensor:
        """What the ResNet blocks of a level give its output convolution; arguments and sizes as for `map_level`."""
        h = feature
        for block in self.blocks(level):
            h = block(h, time_embedding)
        return h

    def blocks(self, level: int) -> list[ResNetBlock]:
        """The ResNet blocks of a level, in their order."""
        first = sum(len(earlier) for earlier in self.levels[:level])
        return list(self.body[first : first + len(self.levels[level])])

    def forward(self, features: Sequence[Tensor], time_embedding: Tensor | None = None) -> tuple[Tensor, ...]:
        """The residuals of all levels, unscaled.

        Args:
            features: outputs of the base decoder's last three blocks, finest last:
                (rows, in_channels[n], h, w), 1280 @ 32², 640 @ 64², 320 @ 64² at 512 px.
            time_embedding: as for `map_level`.

        Returns:
            Residuals (rows, out_channels[n], h, w): 1280 @ 32², 1280 @ 64², 640 @ 128² at 1024 px.
        """
        return tuple(self.map_level(level, feature, time_embedding) for level, feature in enumerate(features))


def load_adapter(
    path: str | os.PathLike[str], device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> MappingLayers:
    """Mapping layers from a file in the released layout.

    Args:
        path: a `.safetensors` file, or a `.bin`/`.pt` pickle, of which no object but tensors is made.
        device: where the weights go; None leaves them on the CPU.
        dtype: their type; None keeps the file's.

    Raises:
        WrongFile: one sentence naming the file and the key that is wrong.
    """
    name = os.path.basename(os.fspath(path))
    weights = read_weights(path)
    kind = read_kind(read_metadata(path), name)
    levels = read_layout({key: tuple(value.shape) for key, value in weights.items()}, name, len(kind.taps))
    with torch.device("meta"):
        layers = MappingLayers(levels, kind.fusion, kind.positions)
    _check_weights(weights, layers, name)
    layers.load_state_dict(weights, assign=True)
    return layers.to(device=device, dtype=dtype).eval()


def save_adapter(
    adapter: MappingLayers, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None
) -> None:
    """Write mapping layers as a `.safetensors` file in the released layout, whole or not at all.

    Args:
        metadata: what else the file should tell; fusion and positions are always in it.

    Raises:
        WrongFile: it cannot be written there.
    """
    kind = {METADATA + "fusion": adapter.fusion, METADATA + "positions": adapter.positions}
    write_tensors(Path(path), adapter.state_dict(), {**(metadata or {}), **kind})


@dataclass(frozen=True)
class AdapterKind:
    """What a file's metadata says of how its mapping layers are used.

    Attributes:
        fusion: one of `taps.FUSIONS`.
        positions: one of `taps.POSITIONS`.
    """

    fusion: str = "addition"
    positions: str = "decoder"

    @property
    def taps(self) -> Taps:
        """Where features are read and residuals added."""
        return POSITIONS[self.positions]


def read_kind(metadata: Mapping[str, str], name: str) -> AdapterKind:
    """The kind of an adapter file; that of the released one where nothing is said.

    Raises:
        WrongFile: it is one that nobody knows.
    """
    usual = AdapterKind()
    return AdapterKind(
        _named(metadata, "fusion", FUSIONS, usual.fusion, name),
        _named(metadata, "positions", POSITIONS, usual.positions, name),
    )


def _named(metadata: Mapping[str, str], what: str, known: Mapping[str, object], default: str, name: str) -> str:
    chosen = metadata.get(METADATA + what, default)
    if chosen not in known:
        raise WrongFile(f"{name} was trained with the {what} '{chosen}', expected {' or '.join(known)}.")
    return chosen


def layout_for(
    base_unet: nn.Module,
    upgraded_unet: nn.Module,
    blocks: int = 3,
    positions: str = "decoder",
    norm: bool = False,
    timestep: bool = False,
) -> list[list[BlockLayout]]:
    """The released structure for a pair of UNets, the upgraded one at twice the base's size.

    Args:
        blocks: ResNet blocks a level.
        positions: one of `taps.POSITIONS`.
        norm: GroupNorm in each block.
        timestep: each block adds a projection of the base's time embedding.

    Raises:
        DoesNotFit: a residual would have to be smaller than its feature, or more than twice as large.
    """
    taps = POSITIONS[positions]
    given = map(output_channels, base_modules(base_unet, taps))
    wanted = map(output_channels, upgraded_modules(upgraded_unet, taps))
    strides = zip(base_strides(base_unet, taps), upgraded_strides(upgraded_unet, taps), strict=True)
    more = {"has_norm": norm, "time_channels": time_channels_of(base_unet) if timestep else None}
    return [_level(*sizes, blocks, **more) for sizes in zip(given, wanted, strides, strict=True)]


def _level(
    in_channels: int, out_channels: int, strides: tuple[int, int], blocks: int, **more: Any
) -> list[BlockLayout]:
    base_stride, upgraded_stride = strides
    # twice the latent pixels, so that equal strides mean twice the size
    enlarged = 2 * base_stride / upgraded_stride
    if enlarged not in (1, 2):
        raise DoesNotFit(f"Mapping layers make features as large or twice as large, here {enlarged:g} times.")
    if more["has_norm"] and out_channels % NORM_GROUPS:
        raise DoesNotFit(f"GroupNorm needs multiples of {NORM_GROUPS} channels, one level has {out_channels}.")
    first = BlockLayout(
        in_channels, out_channels, upsamples=enlarged == 2, changes_channels=in_channels != out_channels, **more
    )
    return [first] + [BlockLayout(out_channels, out_channels, **more)] * (blocks - 1)


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a file, on the CPU; pickles can hold nothing but tensors.

    Raises:
        WrongFile: the file is missing, cut off or holds something else.
    """
    name = os.path.basename(os.fspath(path))
    if is_pickled(path):
        weights = read_pickle(path)
    else:
        # it tells better than safetensors does what is wrong
        read_tensor_infos(path)
        try:
            weights = safetensors.torch.load_file(path)
        except (safetensors.SafetensorError, RuntimeError, OSError, ValueError, KeyError) as error:
            raise WrongFile(f"{name} is cut off, or holds something other than tensors: {first_line(error)}") from error
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise WrongFile(f"{name} holds something other than named tensors.")
    return weights


def read_layout(
    shapes: Mapping[str, tuple[int, ...]], name: str = "The file", levels: int = len(AdapterKind().taps)
) -> list[list[BlockLayout]]:
    """The blocks of each level, from the names and shapes of a file's tensors.

    Args:
        levels: that there must be.

    Raises:
        WrongFile: there are fewer levels, or the blocks cannot be shared out among them.
    """
    if "body.0.block1.weight" not in shapes and "zero_out.0.weight" not in shapes:
        example = next(iter(shapes), None)
        holds = f"it holds '{example}'" if example else "it is empty"
        raise WrongFile(f"{name} is not an X-Adapter file: {holds} and no 'body.0.block1.weight'.")
    for level in range(levels):
        if len(shapes.get(f"zero_out.{level}.weight", ())) != 4:
            raise WrongFile(f"{name} misses 'zero_out.{level}.weight', the output convolution of level {level}.")
    blocks = 1 + max((int(key.split(".")[1]) for key in shapes if _is_body_key(key)), default=-1)
    if blocks == 0 or blocks % levels:
        raise WrongFile(
            f"{name} holds {blocks} ResNet blocks ('body.0' to 'body.{blocks - 1}'), "
            f"which cannot be shared out among {levels} levels."
        )
    per_level = blocks // levels
    has_norm = any(".norm1." in key for key in shapes)
    for level in range(levels):
        channels = shapes[f"zero_out.{level}.weight"][0]
        if has_norm and channels % NORM_GROUPS:
            raise WrongFile(
                f"{name} has GroupNorm in level {level} of {channels} channels, no multiple of {NORM_GROUPS}."
            )
    return [
        [_read_block(shapes, level, level * per_level + place, first=place == 0) for place in range(per_level)]
        for level in range(levels)
    ]


def _read_block(shapes: Mapping[str, tuple[int, ...]], level: int, block: int, first: bool) -> BlockLayout:
    prefix = f"body.{block}."
    out_channels = shapes[f"zero_out.{level}.weight"][0]
    in_conv = shapes.get(f"{prefix}in_conv.weight", ())
    block2 = shapes.get(f"{prefix}block2.weight", ())
    projections = [shape for key, shape in shapes.items() if key.endswith("timestep_proj.linear.weight")]
    return BlockLayout(
        in_channels=in_conv[1] if len(in_conv) == 4 else out_channels,
        out_channels=out_channels,
        kernel=block2[-1] if len(block2) == 4 else 3,
        upsamples=first and f"{prefix}up_opt.op.weight" in shapes,
        changes_channels=bool(in_conv),
        has_skip_convolution=f"{prefix}skep.weight" in shapes,
        has_norm=any(".norm1." in key for key in shapes),
        time_channels=projections[0][-1] if projections else None,
    )


def _is_body_key(key: str) -> bool:
    parts = key.split(".")
    return parts[0] == "body" and len(parts) > 2 and parts[1].isdigit()


def _check_weights(weights: Mapping[str, Tensor], layers: MappingLayers, name: str) -> None:
    expected = {key: tuple(value.shape) for key, value in layers.state_dict().items()}
    if missing := sorted(expected.keys() - weights.keys()):
        raise WrongFile(f"{name} misses '{missing[0]}'.")
    if unknown := sorted(weights.keys() - expected.keys()):
        raise WrongFile(f"{name} holds '{unknown[0]}', which no X-Adapter has.")
    for key, shape in expected.items():
        if tuple(weights[key].shape) != shape:
            found = "x".join(map(str, weights[key].shape))
            raise WrongFile(f"{name}: '{key}' is {found}, expected {'x'.join(map(str, shape))}.")
    for key, value in weights.items():
        if not value.dtype.is_floating_point:
            raise WrongFile(f"{name}: '{key}' holds {value.dtype}, expected floating-point numbers.")
        # torch compares no numbers of eight bits
        if not bool(torch.isfinite(value.float() if value.element_size() == 1 else value).all()):
            raise WrongFile(f"{name}: '{key}' holds NaN or infinite values.")
