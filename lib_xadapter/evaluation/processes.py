"""One process, or several that accelerate has launched: which items are whose."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import TypeVar

from accelerate import PartialState

from ..headless.generate import choose_placement

LONGEST_WAIT = timedelta(days=30)
"""The first process to finish its share waits for the last."""

Shared = TypeVar("Shared")


class Processes:
    """Those of this run.

    Args:
        device: that the user named; None for the best there is, each process its own.

    Raises:
        WrongArgument: there is no such device.
    """

    def __init__(self, device: str | None) -> None:
        chosen = choose_placement(device, None, False).device
        self._state = PartialState(cpu=chosen == "cpu", timeout=LONGEST_WAIT)
        # accelerate numbers CPUs, too
        self.device = chosen if self.count == 1 or chosen == "cpu" else str(self._state.device)

    @property
    def count(self) -> int:
        return self._state.num_processes

    @property
    def is_first(self) -> bool:
        return self._state.is_main_process

    def share(self, items: Sequence[Shared]) -> Sequence[Shared]:
        """Those of this process: every n-th, whatever is done already, so that no two make the same."""
        return items[self._state.process_index :: self.count]

    def wait(self) -> None:
        """Until all are here."""
        self._state.wait_for_everyone()

    def leave(self) -> None:
        """To be called at the end, whatever it was."""
        self._state.destroy_process_group()
