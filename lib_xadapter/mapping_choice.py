"""Which path the mapping layers take, and what happens where the faster one fails."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, TypeVar, get_args

from torch import Tensor

from .mapping_paths import EagerMapping, MappingPath

if TYPE_CHECKING:
    from .mapping import MappingLayers

logger = logging.getLogger(__name__)

MappingChoice = Literal["auto", "eager", "cuda"]
MAPPING_CHOICES: tuple[MappingChoice, ...] = get_args(MappingChoice)

Result = TypeVar("Result")


def choose_mapping_path(adapter: MappingLayers, choice: MappingChoice = "auto", fp8: bool = False) -> MappingPath:
    """The path for mapping layers that are where, and in the type that, they will run in.

    Args:
        choice: "auto" takes the CUDA path on NVIDIA GPUs from compute capability 7.0 on, in half precision; "cuda" the
            same, but warns where that is impossible, for the picture is the same; "eager" torch's own kernels.
        fp8: run the wide convolutions in 8 bits, on cards that have them, where Triton is installed.

    Returns:
        A path that goes on eagerly, with one line in the log, should the faster one fail. It is worth keeping as long
        as the adapter: what it prepared is found again, and made anew after the adapter was moved.
    """
    eager = EagerMapping(adapter)
    if choice == "eager":
        return eager
    # the WebUI imports this at start-up, where only the one who has a GPU should wait for what belongs to it
    from .cuda_mapping import CudaMapping, obstacle
    from .cuda_mapping.eight_bits import eight_bit_obstacle, eight_bit_operations

    if (reason := obstacle(adapter)) is not None:
        level = logging.WARNING if choice == "cuda" else logging.INFO
        logger.log(level, "The mapping layers run eagerly: %s.", reason)
        return eager
    path = FallbackMapping(CudaMapping(adapter), eager)
    if fp8 and (reason := eight_bit_obstacle(adapter)) is not None:
        logger.warning("The mapping layers run in 16 bits: %s.", reason)
    elif fp8:
        path = FallbackMapping(CudaMapping(adapter, eight_bit_operations), path)
    return path


class FallbackMapping:
    """Takes a path until it fails for the first time, and another one from there on.

    Args:
        first: what it prepared is released when it fails.
        other: its failures are the caller's.
    """

    def __init__(self, first: MappingPath, other: MappingPath) -> None:
        self._first = first
        self._other = other
        self._failed = False

    @property
    def adapter(self) -> MappingLayers:
        return self._other.adapter

    def hidden(self, level: int, feature: Tensor, time_embedding: Tensor) -> Tensor:
        return self._run(lambda path: path.hidden(level, feature, time_embedding))

    def residual(self, level: int, hidden: Tensor) -> Tensor:
        return self._run(lambda path: path.residual(level, hidden))

    def add(self, level: int, feature: Tensor, hidden: Tensor, weight: float) -> Tensor:
        before = feature._version

        def add(path: MappingPath) -> Tensor:
            if feature._version != before:
                raise RuntimeError("an addition of mapping layers failed half-way, and cannot be repeated")
            return path.add(level, feature, hidden, weight)

        return self._run(add)

    def release(self) -> None:
        self._first.release()
        self._other.release()

    def _run(self, call: Callable[[MappingPath], Result]) -> Result:
        if not self._failed:
            try:
                return call(self._first)
            # a driver, cuDNN, NVRTC or Triton each fail in ways of their own, and a picture can be had all the same
            except Exception as error:
                self._failed = True
                self._first.release()
                reason = str(error).strip().splitlines() or [""]
                logger.warning(
                    "The mapping layers go on without %s: %s: %s",
                    type(self._first).__name__,
                    type(error).__name__,
                    reason[0],
                )
        return call(self._other)
