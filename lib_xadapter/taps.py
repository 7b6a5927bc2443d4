"""Where features are read from the base, and where and how residuals enter the upgraded model.

Source: paper, "X-Adapter"; the places are those of the released code, `model/unet_adapter.py`.

| level | base feature                  | upgraded feature it is added to | at 1024 px |
|-------|-------------------------------|---------------------------------|------------|
| 0     | third-last decoder block      | after the middle block          | 1280 @ 32² |
| 1     | second-last decoder block     | after the first decoder block   | 1280 @ 64² |
| 2     | last decoder block            | after the second decoder block  | 640 @ 128² |

A decoder block is what the paper and diffusers call one: everything at one resolution, its upsampling included. The
CompVis layout spreads it over several `output_blocks`; its output is that of the last of them.

The paper's ablation reads from the encoder, too, or from it alone. It does not say where; here each level of the base's
encoder goes to the upgraded encoder's level of the same number:

| level | base feature                  | upgraded feature it is added to | at 1024 px  |
|-------|-------------------------------|---------------------------------|-------------|
| 0     | third encoder block           | third encoder block             | 1280 @ 32²  |
| 1     | second encoder block          | second encoder block            | 640 @ 64²   |
| 2     | first encoder block           | first encoder block             | 320 @ 128²  |

An encoder block is everything at one resolution, before its downsampling: what goes down, and over the last skip
connection at that resolution to the decoder. Both of them get the residual, as in the released code.
"""

from __future__ import annotations

import itertools
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


ENCODER, MIDDLE, DECODER = "encoder", "middle", "decoder"


@dataclass(frozen=True)
class Place:
    """The output of a part of a UNet: of an encoder or decoder block by its number, or of the middle block."""

    part: str
    block: int = 0


@dataclass(frozen=True)
class Tap:
    """One row of the tables.

    Attributes:
        base: where the feature is read.
        upgraded: where the residual enters.
        grain: 0 coarse, 1 middle, 2 fine: which of the weights that a user gives is that of this level.
    """

    base: Place
    upgraded: Place
    grain: int


Taps = tuple[Tap, ...]

TAPS: Taps = (
    Tap(Place(DECODER, -3), Place(MIDDLE), grain=0),
    Tap(Place(DECODER, -2), Place(DECODER, 0), grain=1),
    Tap(Place(DECODER, -1), Place(DECODER, 1), grain=2),
)
ENCODER_TAPS: Taps = tuple(Tap(Place(ENCODER, 2 - grain), Place(ENCODER, 2 - grain), grain) for grain in range(3))

POSITIONS: Mapping[str, Taps] = {"decoder": TAPS, "encoder": ENCODER_TAPS, "both": (*ENCODER_TAPS, *TAPS)}
"""Name in an adapter file's metadata → where its levels read and add."""


@dataclass(frozen=True)
class BaseFeatures:
    """What the base's UNet gave for a batch of rows.

    Attributes:
        levels: one (rows, channels, h, w) for each tap, finest last.
        time_embedding: (rows, channels), for mapping layers with timestep conditioning; None in a recording for those
            without.
    """

    levels: tuple[Tensor, ...]
    time_embedding: Tensor | None


Output = Tensor | tuple[Tensor, ...]
"""Of a module: a feature, or a tuple of which it is the first."""

Fusion = Callable[[Tensor, Tensor, float], Tensor]
"""(feature, residual, weight) → feature: how a residual enters the upgraded feature."""


def addition(feature: Tensor, residual: Tensor, weight: float) -> Tensor:
    """feature + weight · residual: the paper's choice."""
    return feature + weight * residual


def guidance(feature: Tensor, residual: Tensor, weight: float) -> Tensor:
    """feature + weight · (residual − feature): the paper's ablation ("guidance"), off in the released code."""
    return feature + weight * (residual - feature)


def spade(feature: Tensor, residual: Tensor, weight: float) -> Tensor:
    """feature + weight · (β + γ · norm(feature)): the paper's ablation after SPADE (arXiv 1903.07291).

    SPADE scales and shifts a normalised feature. γ and β are what is added here to the feature's own deviation and
    mean, so that zeros leave it as it is. Each row and channel is normalised alone, so that no row depends on others.

    Args:
        residual: β and γ, one after the other along the channels.
    """
    shift, scale = residual.chunk(2, dim=1)
    return feature + weight * (shift + scale * functional.layer_norm(feature, feature.shape[-2:]))


FUSIONS: Mapping[str, Fusion] = {"addition": addition, "guidance": guidance, "spade": spade}
"""Name in an adapter file's metadata → how its residuals enter."""

SCALING_FUSIONS = frozenset({"spade"})
"""Those whose residual is a shift and a scale, given by output convolutions of their own."""


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
        return [block for block in inner if _resizes(block, "Upsample")] + [last]
    raise DoesNotFit(f"{type(unet).__name__} is no UNet in CompVis or diffusers layout: it has no decoder blocks.")


def encoder_blocks(unet: nn.Module) -> list[nn.Module]:
    """The modules whose outputs are those of the encoder blocks before their downsampling, finest first.

    Args:
        unet: as for `decoder_blocks`.

    Raises:
        DoesNotFit: the module is neither.
    """
    if hasattr(unet, "down_blocks"):
        return [(getattr(block, "attentions", None) or block.resnets)[-1] for block in unet.down_blocks]
    if hasattr(unet, "input_blocks"):
        blocks = list(unet.input_blocks)
        ends = [block for block, following in itertools.pairwise(blocks) if _resizes(following, "Downsample")]
        return [*ends, blocks[-1]]
    raise DoesNotFit(f"{type(unet).__name__} is no UNet in CompVis or diffusers layout: it has no encoder blocks.")


def middle_block(unet: nn.Module) -> nn.Module:
    """The block between encoder and decoder."""
    return unet.mid_block if hasattr(unet, "mid_block") else unet.middle_block


def module_at(unet: nn.Module, place: Place) -> nn.Module:
    """The module whose output a place is; that of a diffusers attention is the first of a tuple."""
    if place.part == MIDDLE:
        return middle_block(unet)
    return (encoder_blocks if place.part == ENCODER else decoder_blocks)(unet)[place.block]


def base_modules(unet: nn.Module, taps: Taps = TAPS) -> tuple[nn.Module, ...]:
    """The modules whose outputs are the base's features, one a tap."""
    return tuple(module_at(unet, tap.base) for tap in taps)


def upgraded_modules(unet: nn.Module, taps: Taps = TAPS) -> tuple[nn.Module, ...]:
    """The modules to whose outputs the residuals are added, one a tap."""
    return tuple(module_at(unet, tap.upgraded) for tap in taps)


def base_strides(unet: nn.Module, taps: Taps = TAPS) -> tuple[int, ...]:
    """Latent pixels of the base to one pixel of each feature: 2, 1 and 1 for SD1.5's decoder."""
    return tuple(_stride(len(decoder_blocks(unet)), tap.base) for tap in taps)


def upgraded_strides(unet: nn.Module, taps: Taps = TAPS) -> tuple[int, ...]:
    """Latent pixels of the upgraded model to one pixel of each feature: 4, 2 and 1 for SDXL's decoder."""
    return tuple(_stride(len(decoder_blocks(unet)), tap.upgraded) for tap in taps)


def _stride(blocks: int, place: Place) -> int:
    """Every encoder block but the last halves height and width at its end, every decoder block but the last doubles
    them; the middle block is before the first of those."""
    if place.part == ENCODER:
        return 2 ** (place.block % blocks)
    doublings = 0 if place.part == MIDDLE else place.block % blocks + 1
    return 2 ** max(blocks - 1 - doublings, 0)


def time_embedding_of(unet: nn.Module) -> nn.Module:
    """The module whose output is the time embedding."""
    return unet.time_embedding if hasattr(unet, "time_embedding") else unet.time_embed


def time_channels_of(unet: nn.Module) -> int:
    """The width of a UNet's time embedding."""
    return [layer for layer in time_embedding_of(unet).modules() if isinstance(layer, nn.Linear)][-1].out_features


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
    """Channels of a block's output, from its last layer that tells."""
    layers = getattr(block, "resnets", block)
    if isinstance(layers, nn.Module) and isinstance(getattr(layers, "out_channels", None), int):
        return layers.out_channels
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
    """While open, the base's features of every call can be taken from the reader."""
    reader = FeatureReader(len(taps))

    def collect(into: list[Tensor]) -> Callable[[nn.Module, tuple, Output], None]:
        return lambda module, inputs, output: None if reader._paused else into.append(_feature(output))

    with ExitStack() as hooks:
        for module, level in zip(base_modules(base_unet, taps), reader._levels, strict=True):
            hooks.callback(module.register_forward_hook(collect(level)).remove)
        time_embedding = time_embedding_of(base_unet)
        hooks.callback(time_embedding.register_forward_hook(collect(reader._time_embedding)).remove)
        yield reader


@contextmanager
def fuse_into(
    upgraded_unet: nn.Module,
    fuse: Callable[[int, Tensor], Tensor],
    levels: Sequence[int] | None = None,
    taps: Taps = TAPS,
) -> Iterator[None]:
    """While open, the upgraded UNet's features pass through `fuse` on their way.

    Args:
        upgraded_unet: the upgraded model's UNet.
        fuse: (level, feature) → the feature that takes its place.
        levels: those that are touched at all; None for all of them.
        taps: where each level is.
    """

    def hook(level: int) -> Callable[[nn.Module, tuple, Output], Output]:
        return lambda module, inputs, output: _with_feature(output, fuse(level, _feature(output)))

    with ExitStack() as hooks:
        for level, module in enumerate(upgraded_modules(upgraded_unet, taps)):
            if levels is None or level in levels:
                hooks.callback(module.register_forward_hook(hook(level)).remove)
        yield


def resized_like(residual: Tensor, feature: Tensor) -> Tensor:
    """The residual in the feature's type and, where base and upgraded sizes are not 1:2, resized to its size."""
    if residual.shape[-2:] != feature.shape[-2:]:
        residual = functional.interpolate(residual.float(), feature.shape[-2:], mode="bilinear", align_corners=False)
    return residual.to(feature)


def _resizes(block: nn.Module, by: str) -> bool:
    return any(type(layer).__name__ == by for layer in block.children())


def _feature(output: Output) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _with_feature(output: Output, feature: Tensor) -> Output:
    return (feature, *output[1:]) if isinstance(output, tuple) else feature


def _rows(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
