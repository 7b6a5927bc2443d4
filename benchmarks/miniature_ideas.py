"""Ideas that are no option: `python -m benchmarks.miniature_ideas IDEA[:NUMBER] evaluate …` runs a command with one.

amplified:K   what the ControlNet changes in the base's features counts 1 + K times: features with it, and K times their
              difference to features without it at the same latent. No training; the base runs twice.
shared        the base's noise in the joint stage is SDXL's, made smaller, as in `train --shared-noise`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional

from lib_xadapter.headless import pipeline
from lib_xadapter.headless.cli import main
from lib_xadapter.taps import BaseFeatures, FeatureReader, Taps, read_features
from lib_xadapter.wrapping import wrapped

RESIDUALS = ("down_block_additional_residuals", "mid_block_additional_residual")


class AmplifiedReader:
    """Reads the base's features of a call with its ControlNets and of one without.

    Args:
        reader: of the UNet.
        factor: by which the difference counts once more.
    """

    def __init__(self, reader: FeatureReader, factor: float) -> None:
        self._reader, self._factor = reader, factor
        self._without: tuple[Tensor, ...] | None = None

    def clear(self) -> None:
        self._reader.clear()
        self._without = None

    def take(self) -> BaseFeatures:
        features = self._reader.take()
        if self._without is None:
            return features
        levels = zip(features.levels, self._without, strict=True)
        return replace(
            features, levels=tuple(torch.lerp(without, with_it, 1 + self._factor) for with_it, without in levels)
        )

    def call(self, forward: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """The UNet's own forward, before it once without what ControlNets add."""
        if any(named.get(name) is not None for name in RESIDUALS):
            self._reader.clear()
            forward(*arguments, **named | dict.fromkeys(RESIDUALS))
            self._without = self._reader.take().levels
            self._reader.clear()
        return forward(*arguments, **named)


def amplified(factor: float) -> AbstractContextManager[None]:
    @contextmanager
    def read_amplified(unet: nn.Module, taps: Taps) -> Iterator[AmplifiedReader]:
        with read_features(unet, taps) as reader:
            ours = AmplifiedReader(reader, factor)
            with wrapped(unet, "forward", ours.call):
                yield ours

    return patch.object(pipeline, "read_features", read_amplified)


def shared(_: float) -> AbstractContextManager[None]:
    seeded = pipeline.Noise.seeded

    def one_noise(*given: Any) -> pipeline.Noise:
        noise = seeded(*given)
        return replace(noise, base_again=2 * functional.avg_pool2d(noise.upgraded[None], 2)[0])

    return patch.object(pipeline.Noise, "seeded", one_noise)


IDEAS: dict[str, Callable[[float], AbstractContextManager[None]]] = {"amplified": amplified, "shared": shared}


if __name__ == "__main__":
    idea, _, number = sys.argv[1].partition(":")
    with IDEAS[idea](float(number or 1)):
        sys.exit(main(sys.argv[2:]))
