"""Settings of the WebUI as one of its modules is to see them for a while, and nobody else."""

from __future__ import annotations

from typing import Any


def overlaid(below: Any, **own: Any) -> Any:
    """An object with some attributes that differ from those of another."""
    return _Overlaid(below, own)


class _Overlaid:
    def __init__(self, below: Any, own: dict[str, Any]) -> None:
        self.__dict__.update(own)
        self._below = below

    def __getattr__(self, name: str) -> Any:
        return getattr(self._below, name)
