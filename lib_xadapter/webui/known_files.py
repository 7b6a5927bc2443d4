"""What a file was found to be, kept in the WebUI's cache until the file or X-Adapter changes."""

from __future__ import annotations

import functools
import logging
import os
import sqlite3
from collections.abc import Callable, MutableMapping
from typing import Any, TypeVar

from modules import cache

from .. import __version__

logger = logging.getLogger(__name__)

Found = TypeVar("Found", bound=str)

FOUND, STATE = "found", "state"


def found_in_file(what: str, name: str, path: str, look: Callable[[], Found]) -> Found:
    """What `look` finds in a file, looked up once for each state of it; what it raises is not kept.

    Args:
        what: the cache's section.
        name: the file's, there.
        path: of it.
        look: reads it; for each call of this function where the cache cannot be read or written, as on a full disk.
    """
    look_once = functools.cache(look)
    try:
        return _found_or_known(cache.cache(what), name, _state_of(path), look_once)
    except (OSError, sqlite3.Error) as error:
        logger.info("%s is looked up without the WebUI's cache: %s", name, error)
        return look_once()


def _found_or_known(section: MutableMapping[str, Any], name: str, state: list[Any], look: Callable[[], Found]) -> Found:
    known = section.get(name)
    if known is None or known.get(STATE) != state:
        known = section[name] = {STATE: state, FOUND: look()}
    return known[FOUND]


def _state_of(path: str) -> list[Any]:
    """Of a file, and of the code that judges it: another version may see more in the same file."""
    status = os.stat(path)
    return [__version__, status.st_mtime, status.st_size]
