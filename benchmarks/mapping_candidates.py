"""The ways to run mapping layers that are held against each other, by name."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from lib_xadapter.mapping import MappingLayers
from lib_xadapter.mapping_choice import choose_mapping_path
from lib_xadapter.mapping_paths import EagerMapping, MappingPath


class NotHere(Exception):
    """A path cannot run on this machine; the message says why."""


class CompiledMapping(EagerMapping):
    """What `torch.compile` makes of the eager path."""

    def __init__(self, adapter: MappingLayers, **options: str) -> None:
        super().__init__(adapter)
        self._compiled_hidden = torch.compile(super().hidden, dynamic=False, **options)
        self._compiled_add = torch.compile(super().add, dynamic=False, **options)

    def hidden(self, level: int, feature: Tensor, time_embedding: Tensor | None) -> Tensor:
        return self._compiled_hidden(level, feature, time_embedding)

    def add(self, level: int, feature: Tensor, hidden: Tensor, weight: float) -> Tensor:
        return self._compiled_add(level, feature, hidden, weight)


def _channels_last(adapter: MappingLayers) -> MappingPath:
    return EagerMapping(adapter.to(memory_format=torch.channels_last))


def _compiled(adapter: MappingLayers) -> MappingPath:
    return CompiledMapping(adapter)


def _compiled_longer(adapter: MappingLayers) -> MappingPath:
    """Without CUDA graphs, in which one level's results would be overwritten by the next one's."""
    return CompiledMapping(adapter.to(memory_format=torch.channels_last), mode="max-autotune-no-cudagraphs")


def _product(adapter: MappingLayers) -> MappingPath:
    from lib_xadapter.cuda_mapping import ChannelsLastMapping

    return ChannelsLastMapping(adapter)


def _cuda(adapter: MappingLayers) -> MappingPath:
    from lib_xadapter.cuda_mapping import CudaMapping

    _check(adapter)
    return CudaMapping(adapter)


def _check(adapter: MappingLayers) -> None:
    """Not left to `choose_mapping_path`: it would go on eagerly, and the eager path be timed under a wrong name."""
    from lib_xadapter.cuda_mapping import obstacle

    if (reason := obstacle(adapter)) is not None:
        raise NotHere(reason)


RELEASED_FORM, AS_USED = "eager NCHW", "as users get it"

CANDIDATES: Mapping[str, Callable[[MappingLayers], MappingPath]] = MappingProxyType(
    {
        RELEASED_FORM: EagerMapping,
        "eager channels-last": _channels_last,
        "torch.compile": _compiled,
        "torch.compile max-autotune": _compiled_longer,
        "channels-last, added in place": _product,
        "cuda": _cuda,
        AS_USED: choose_mapping_path,
    }
)
"""Each takes mapping layers that are its own to change. The first is what the released code does."""

ON_CPU = (RELEASED_FORM, "eager channels-last", "torch.compile", "channels-last, added in place")


def candidate(name: str, adapter: MappingLayers) -> MappingPath:
    """A path with mapping layers of its own.

    Raises:
        NotHere: it cannot run on this machine.
    """
    try:
        return CANDIDATES[name](copy.deepcopy(adapter))
    except ImportError as error:
        raise NotHere(str(error)) from error
