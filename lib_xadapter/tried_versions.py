"""Which versions of a host X-Adapter was tried with, as it uses names that are the host's own affair."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Version:
    """A program that X-Adapter uses names of.

    Attributes:
        program: its name.
        tried: the version that X-Adapter was tried with.
        found: the one that runs, as it calls itself; "" where it does not tell.
    """

    program: str
    tried: str
    found: str

    @property
    def differs(self) -> bool:
        """Whether another one runs, as far as it tells: v1.10.1-3-gabcdef is 1.10.1 with some commits more."""
        return bool(_numbers(self.found)) and _numbers(self.found) != _numbers(self.tried)

    def __str__(self) -> str:
        return f"{self.program} {self.found} (tried: {self.tried})"


def difference(versions: Iterable[Version]) -> str:
    """One clause that names each program that runs in another version than was tried, "" where none does."""
    return " and ".join(str(version) for version in versions if version.differs)


def _numbers(text: str) -> tuple[int, ...]:
    found = re.match(r"v?(\d+(?:\.\d+)*)", text.strip())
    return tuple(map(int, found[1].split("."))) if found else ()
