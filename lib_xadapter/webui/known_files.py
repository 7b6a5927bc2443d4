"""What a file was found to be, kept in the WebUI's cache until the file changes."""

from __future__ import annotations

import functools
import logging
import sqlite3
from collections.abc import Callable
from typing import TypeVar

from modules import cache

logger = logging.getLogger(__name__)

Found = TypeVar("Found", bound=str)

FOUND = "found"


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
        return cache.cached_data_for_file(what, name, path, lambda: {FOUND: look_once()})[FOUND]
    except (OSError, sqlite3.Error) as error:
        logger.info("%s is looked up without the WebUI's cache: %s", name, error)
        return look_once()
