"""Which path the mapping layers take, and what happens where the faster one fails."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from .errors import first_line
from .mapping_paths import EagerMapping, MappingPath
from .memory import is_out_of_memory

if TYPE_CHECKING:
    from .mapping import MappingLayers

logger = logging.getLogger(__name__)

MappingChoice = Literal["auto", "eager", "cuda"]
MAPPING_CHOICES: tuple[MappingChoice, ...] = get_args(MappingChoice)

ACCURACY = {torch.float16: 5e-3, torch.bfloat16: 2e-2}
"""|faster − eager| / |eager|, L2 over a row, up to which two paths agree."""


def choose_mapping_path(adapter: MappingLayers, choice: MappingChoice = "auto") -> MappingPath:
    """The path for mapping layers that are where, and in the type that, they will run in.

    Args:
        choice: "auto" takes the CUDA path on NVIDIA GPUs from compute capability 7.0 on, in half precision; "cuda" the
            same, but warns where that is impossible, for the picture is the same; "eager" torch's own kernels.
    """
    eager = EagerMapping(adapter)
    if choice == "eager":
        return eager
    # the WebUI imports this at start-up, where only the one who has a GPU should wait for what belongs to it
    from .cuda_mapping import ChannelsLastMapping, CudaMapping, obstacle

    if (reason := obstacle(adapter)) is not None:
        level = logging.WARNING if choice == "cuda" else logging.INFO
        logger.log(level, "The mapping layers run eagerly: %s.", reason)
        return eager
    return CheckedMapping([CudaMapping(adapter), ChannelsLastMapping(adapter)], eager)


class CheckedMapping:
    """Takes the fastest path that does what the eager one does.

    Each shape's first result is held against the eager one, row by row, as in the accuracy stated above. A path that
    differs, or fails, is given up with one line in the log. Where memory does not suffice for the moment, the eager
    path takes over once.

    Args:
        faster: paths, the fastest first.
        eager: its failures are the caller's.
    """

    def __init__(self, faster: Sequence[MappingPath], eager: MappingPath) -> None:
        self._faster = list(faster)
        self._eager = eager
        self._agreed: set[Hashable] = set()

    @property
    def adapter(self) -> MappingLayers:
        return self._eager.adapter

    def hidden(self, level: int, feature: Tensor, time_embedding: Tensor | None) -> Tensor:
        def eagerly(rows: slice) -> Tensor:
            embedding = None if time_embedding is None else time_embedding[rows]
            return self._eager.hidden(level, feature[rows], embedding)

        key = ("hidden", level, feature.shape)
        return self._run(key, lambda path: path.hidden(level, feature, time_embedding), eagerly)

    def residual(self, level: int, hidden: Tensor) -> Tensor:
        return self._eager.residual(level, hidden)

    def add(self, level: int, feature: Tensor, hidden: Tensor, weight: float) -> Tensor:
        # beside a feature, a residual of small weight could be wrong unseen
        key = ("add", level, feature.shape, feature.stride(), weight)

        def add(path: MappingPath) -> Tensor:
            # until a path has agreed, it writes into a copy
            place = feature if key in self._agreed else feature.clone()
            return path.add(level, place, hidden, weight)

        return self._run(key, add, lambda rows: self._eager.add(level, feature[rows], hidden[rows], weight))

    def _run(self, key: Hashable, fast: Callable[[MappingPath], Tensor], eagerly: Callable[[slice], Tensor]) -> Tensor:
        while self._faster:
            try:
                result = fast(self._faster[0])
                if key not in self._agreed and self._agrees(result, eagerly):
                    self._agreed.add(key)
                return result
            # a driver, cuDNN or NVRTC each fail in ways of their own, and a picture can be had all the same
            except Exception as error:
                if is_out_of_memory(error):
                    logger.debug("The mapping layers run eagerly once: %s", error)
                    break
                self._give_up(error)
        return eagerly(slice(None))

    def _agrees(self, result: Tensor, eagerly: Callable[[slice], Tensor]) -> bool:
        """Whether a result is the eager one's; not known where that is infinite or no number."""
        accuracy, sizes = ACCURACY[self.adapter.zero_out[0].weight.dtype], []
        for row in range(len(result)):
            expected = eagerly(slice(row, row + 1)).float()
            distance, size = (float(x.norm()) for x in (result[row : row + 1].float() - expected, expected))
            if math.isfinite(size) and not distance <= accuracy * size:
                raise Disagreement(f"it is {distance:g} away from the eager path's {size:g}")
            sizes.append(size)
        return all(map(math.isfinite, sizes))

    def _give_up(self, error: Exception) -> None:
        path = self._faster.pop(0)
        self._agreed.clear()
        name, kind = type(path).__name__, type(error).__name__
        logger.warning("The mapping layers go on without %s: %s: %s", name, kind, first_line(error))


class Disagreement(Exception):
    """A path computes something other than the eager one."""
