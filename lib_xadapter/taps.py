"""Where features are read from the base's decoder, and where residuals are added to the upgraded model's.

Source: paper, "X-Adapter"; the places are those of the released code, `model/unet_adapter.py`.

| level | base feature                  | upgraded feature it is added to | at 1024 px |
|-------|-------------------------------|---------------------------------|------------|
| 0     | third-last decoder block      | after the middle block          | 1280 @ 32² |
| 1     | second-last decoder block     | after the first decoder block   | 1280 @ 64² |
| 2     | last decoder block            | after the second decoder block  | 640 @ 128² |

A decoder block is what the paper and diffusers call one: everything at one resolution, its upsampling included. The
CompVis layout spreads it over several `output_blocks`; its output is that of the last of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from .errors import DoesNotFit

if TYPE_CHECKING:
    from .mapping import MappingLayers


@dataclass(frozen=True)
class Tap:
    """One row of the table: indices into the decoder blocks; `upgraded_block` None is the middle block."""

    base_block: int
    upgraded_block: int | None


Taps = tuple[Tap, ...]

TAPS: Taps = (Tap(base_block=-3, upgraded_block=None), Tap(base_block=-2, upgraded_block=0), Tap(-1, upgraded_block=1))

POSITIONS: Mapping[str, Taps] = {"decoder": TAPS}
"""Name in an adapter file's metadata → where its levels read and add."""


@dataclass(frozen=True)
class BaseFeatures:
    """What the base's UNet gave for a batch of rows.

    Attributes:
        levels: one (rows, channels, h, w) for each tap, finest last.
        time_embedding: (rows, channels), for mapping layers with timestep conditioning; None where there are none.
    """

    levels: tuple[Tensor, ...]
    time_embedding: Tensor | None


Fusion = Callable[[Tensor, Tensor, float], Tensor]
"""(feature, residual, weight) → feature: how a residual enters the upgraded feature."""


def addition(feature: Tensor, residual: Tensor, weight: float) -> Tensor:
    """feature + weight · residual: the paper's choice."""
    return feature + weight * residual


def guidance(feature: Tensor, residual: Tensor, weight: float) -> Tensor:
    """feature + weight · (residual − feature): the paper's ablation ("guidance"), off in the released code."""
    return feature + weight * (residual - feature)


FUSIONS: Mapping[str, Fusion] = {"addition": addition, "guidance": guidance}
"""Name in an adapter file's metadata → how its residuals enter."""


def decoder_blocks(unet: nn.Module) -> list[nn.Module]:
    """The modules whose outputs are those of the decoder blocks, coarsest first.

    Args:
        unet: a UNet in CompVis layout (`output_blocks`) or diffusers layout (`up_blocks`).

    Raises:
        DoesNotFit: the module is neither.
    """
    if hasattr(unet, "up_blocks"):
        return list(unet.up_blocks)
    if hasattr(unet, "output_blocks"):
        *inner, last = unet.output_blocks
        return [block for block in inner if _upsamples(block)] + [last]
    raise DoesNotFit(f"{type(unet).__name__} is no UNet in CompVis or diffusers layout: it has no decoder blocks.")


def middle_block(unet: nn.Module) -> nn.Module:
    """The block between encoder and decoder."""
    return unet.mid_block if hasattr(unet, "mid_block") else unet.middle_block


def base_modules(unet: nn.Module, taps: Taps = TAPS) -> tuple[nn.Module, ...]:
    """The modules whose outputs are the base's features, one a tap."""
    blocks = decoder_blocks(unet)
    return tuple(blocks[tap.base_block] for tap in taps)


def upgraded_modules(unet: nn.Module, taps: Taps = TAPS) -> tuple[nn.Module, ...]:
    """The modules to whose outputs the residuals are added, one a tap."""
    blocks = decoder_blocks(unet)
    return tuple(middle_block(unet) if tap.upgraded_block is None else blocks[tap.upgraded_block] for tap in taps)


def base_strides(unet: nn.Module, taps: Taps = TAPS) -> tuple[int, ...]:
    """Latent pixels of the base to one pixel of each feature: 2, 1 and 1 for SD1.5."""
    return tuple(_stride(len(decoder_blocks(unet)), tap.base_block) for tap in taps)


def upgraded_strides(unet: nn.Module, taps: Taps = TAPS) -> tuple[int, ...]:
    """Latent pixels of the upgraded model to one pixel of each feature: 4, 2 and 1 for SDXL."""
    return tuple(_stride(len(decoder_blocks(unet)), tap.upgraded_block) for tap in taps)


def _stride(blocks: int, block: int | None) -> int:
    """Every decoder block but the last doubles height and width at its end; the middle block is before the first."""
    doublings = 0 if block is None else block % blocks + 1
    return 2 ** max(blocks - 1 - doublings, 0)


def check_fit(adapter: MappingLayers, base_unet: nn.Module, upgraded_unet: nn.Module) -> None:
    """Whether the mapping layers fit this base and this upgraded model.

    Raises:
        DoesNotFit: naming the first level whose channels differ.
    """
    taps = POSITIONS[adapter.positions]
    given = [output_channels(module) for module in base_modules(base_unet, taps)]
    wanted = [output_channels(module) for module in upgraded_modules(upgraded_unet, taps)]
    for level, (taken, offered) in enumerate(zip(adapter.in_channels, given, strict=True)):
        if taken != offered:
            key = f"body.{level * len(adapter.levels[0])}"
            raise DoesNotFit(
                f"The adapter does not fit the base model: level {level} ('{key}') takes features "
                f"of {taken} channels, the base gives {offered}."
            )
    for level, (offered, taken) in enumerate(zip(adapter.out_channels, wanted, strict=True)):
        if taken != offered:
            raise DoesNotFit(
                f"The adapter does not fit the upgraded model: level {level} ('zero_out.{level}') gives residuals "
                f"of {offered} channels, the upgraded model takes {taken}."
            )


def output_channels(block: nn.Module) -> int:
    """Channels of a decoder or middle block's output, from its last layer that tells."""
    layers = block.resnets if hasattr(block, "resnets") else block
    for layer in reversed(list(layers)):
        # an attention layer of the CompVis layout gives back the width that it takes
        for attribute in ("out_channels", "in_channels"):
            if isinstance(getattr(layer, attribute, None), int):
                return getattr(layer, attribute)
    raise DoesNotFit(f"{type(block).__name__} has no layer that tells its channels.")


class FeatureReader:
    """Collects the features of every call of a UNet until they are taken."""

    def __init__(self, levels: int = len(TAPS)) -> None:
        self._levels: list[list[Tensor]] = [[] for _ in range(levels)]
        self._time_embedding: list[Tensor] = []
        self._paused = False

    def take(self) -> BaseFeatures:
        """The features of all calls since the last `take`, their rows one after the other."""
        features = BaseFeatures(tuple(_rows(level) for level in self._levels), _rows(self._time_embedding))
        self.clear()
        return features

    def clear(self) -> None:
        """Forget what was collected."""
        for collected in (*self._levels, self._time_embedding):
            collected.clear()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """While open, calls of the UNet leave nothing behind."""
        outside, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = outside


@contextmanager
def read_features(base_unet: nn.Module, taps: Taps = TAPS) -> Iterator[FeatureReader]:
    """While open, the base's decoder features of every call can be taken from the reader."""
    reader = FeatureReader(len(taps))

    def collect(into: list[Tensor]) -> Callable[[nn.Module, tuple, Tensor], None]:
        return lambda module, inputs, output: None if reader._paused else into.append(output)

    with ExitStack() as hooks:
        for module, level in zip(base_modules(base_unet, taps), reader._levels, strict=True):
            hooks.callback(module.register_forward_hook(collect(level)).remove)
        time_embedding = base_unet.time_embedding if hasattr(base_unet, "time_embedding") else base_unet.time_embed
        hooks.callback(time_embedding.register_forward_hook(collect(reader._time_embedding)).remove)
        yield reader


@contextmanager
def fuse_into(
    upgraded_unet: nn.Module,
    fuse: Callable[[int, Tensor], Tensor],
    levels: Sequence[int] = tuple(range(len(TAPS))),
    taps: Taps = TAPS,
) -> Iterator[None]:
    """While open, the upgraded UNet's features pass through `fuse` on their way.

    Args:
        upgraded_unet: the upgraded model's UNet.
        fuse: (level, feature) → the feature that takes its place.
        levels: those that are touched at all.
        taps: where each level is.
    """

    def hook(level: int) -> Callable[[nn.Module, tuple, Tensor], Tensor]:
        return lambda module, inputs, feature: fuse(level, feature)

    with ExitStack() as hooks:
        for level, module in enumerate(upgraded_modules(upgraded_unet, taps)):
            if level in levels:
                hooks.callback(module.register_forward_hook(hook(level)).remove)
        yield


def like(residual: Tensor, feature: Tensor) -> Tensor:
    """The residual in the feature's type and, where base and upgraded sizes are not 1:2, resized to its size."""
    if residual.shape[-2:] != feature.shape[-2:]:
        residual = functional.interpolate(residual.float(), feature.shape[-2:], mode="bilinear", align_corners=False)
    return residual.to(feature)


def _upsamples(block: nn.Module) -> bool:
    return any(type(layer).__name__ == "Upsample" for layer in block.children())


def _rows(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
