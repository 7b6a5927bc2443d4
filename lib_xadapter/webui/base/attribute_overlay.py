"""Settings of the WebUI as one of its modules is to see them for a while, and nobody else."""

from __future__ import annotations

from typing import Any


def with_attributes(below: Any, **own: Any) -> Any:
    """An object like another, with some attributes of its own."""
    return _Overlay(below, own)


class _Overlay:
    def __init__(self, below: Any, own: dict[str, Any]) -> None:
        self.__dict__.update(own)
        self._below = below

    def __getattr__(self, name: str) -> Any:
        return getattr(self._below, name)
