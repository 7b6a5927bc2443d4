"""Methods of somebody else's object, called through a function of ours for a while."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def wrapped(owner: Any, name: str, wrapper: Callable[..., Any]) -> Iterator[None]:
    """While open, a call of the owner's method goes to the wrapper, which is given the method that was there before.

    Whatever stood in the owner's own attributes is put back. Where somebody else has wrapped ours in the meantime,
    theirs stays, and ours passes its calls on.

    Args:
        owner: an object, not a class.
        name: of a method of its class, or of a function among its own attributes.
        wrapper: called with the method that was there, then the call's own arguments.
    """
    host, own = getattr(owner, name), dict(vars(owner))
    is_open = True

    @functools.wraps(host)
    def ours(*args: Any, **kwargs: Any) -> Any:
        return wrapper(host, *args, **kwargs) if is_open else host(*args, **kwargs)

    setattr(owner, name, ours)
    try:
        yield
    finally:
        is_open = False
        if vars(owner).get(name) is ours:
            if name in own:
                setattr(owner, name, own[name])
            else:
                delattr(owner, name)
