"""Methods of somebody else's object, called through a function of ours for a while."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

BENEATH = "_beneath_wrapper"
"""Where a wrapper keeps what stood in its place among the owner's own attributes."""
NOTHING = object()


@contextmanager
def copies_unwrapped(owner: Any) -> Iterator[None]:
    """While open, `copy.copy` of the owner gives an object on which none of its methods is wrapped by `wrapped`.

    Args:
        owner: an object whose class does not say itself how it is copied.
    """

    def own_attributes() -> dict[str, Any]:
        beneath = {name: _unwrapped(value) for name, value in vars(owner).items() if name != "__getstate__"}
        return {name: value for name, value in beneath.items() if value is not NOTHING}

    # what Python asks an object for that is copied or pickled
    owner.__getstate__ = own_attributes
    try:
        yield
    finally:
        del owner.__getstate__


def _unwrapped(value: Any) -> Any:
    while (beneath := getattr(value, "__dict__", {}).get(BENEATH)) is not None:
        value = beneath
    return value


@contextmanager
def wrapped(owner: Any, name: str, wrapper: Callable[..., Any]) -> Iterator[None]:
    """While open, a call of the owner's method goes to the wrapper, which is given the method that was there before.

    Whatever stood in the owner's own attributes is put back. Where somebody else has wrapped ours in the meantime,
    theirs stays, and ours passes its calls on. A copy of the owner that somebody makes meanwhile has ours among its
    attributes, bound to the owner: see `copies_unwrapped`.

    Args:
        owner: an object, not a class.
        name: of a method of its class, or of a function among its own attributes.
        wrapper: called with the method that was there, then the call's own arguments.
    """
    method, own = getattr(owner, name), dict(vars(owner))
    is_open = True

    @functools.wraps(method)
    def ours(*args: Any, **kwargs: Any) -> Any:
        return wrapper(method, *args, **kwargs) if is_open else method(*args, **kwargs)

    setattr(ours, BENEATH, own.get(name, NOTHING))
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
