"""How a job that could not begin ends: with its message, when the WebUI first asks for anything of it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from modules.processing import StableDiffusionProcessing

from ..wrapping import wrapped


def end_at_once(p: StableDiffusionProcessing, error: Exception) -> None:
    """Let the processing object's `init` raise, once; nothing of it is left when that, or `close`, has been called."""
    scope = ExitStack()

    def init(host: Callable[..., None], *args: Any) -> None:
        scope.close()
        raise error

    def close(host: Callable[[], None]) -> None:
        scope.close()
        host()

    scope.enter_context(wrapped(p, "init", init))
    scope.enter_context(wrapped(p, "close", close))
