"""Arguments that a plot sets for one of its cells.

A cell is made with a shallow copy of the plot's processing object. What is set for it stands on that copy and is never
changed in place, so that no cell sees another's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from modules.processing import StableDiffusionProcessing

from ...infotext import PREFIX
from ...settings import defaults

ATTRIBUTE = "xadapter_cell"
"""Where a processing object keeps them."""


def set_arguments(p: StableDiffusionProcessing, **given: Any) -> None:
    """Set arguments of X-Adapter for this picture, in front of the page's and the request's."""
    setattr(p, ATTRIBUTE, {**getattr(p, ATTRIBUTE, {}), **given})


def with_cell(p: StableDiffusionProcessing, values: Sequence[Any]) -> list[Any]:
    """What the WebUI hands to the script, with what is set for the cell in its places.

    A cell with an argument of X-Adapter is made with X-Adapter, ticked or not, unless one of them says otherwise.
    """
    set_for_cell: Mapping[str, Any] = getattr(p, ATTRIBUTE, {})
    if not set_for_cell:
        return list(values)
    given = {"enabled": True, **set_for_cell}
    if values and isinstance(values[0], Mapping):
        return [{**values[0], **given}, *values[1:]]
    names = list(defaults())
    placed = [*values, *[None] * (len(names) - len(values))]
    for name, value in given.items():
        placed[names.index(name)] = value
    return placed


def is_one_of_several(p: StableDiffusionProcessing) -> bool:
    """Whether the picture is made by a script chosen in the Script list, which will ask for more of the kind."""
    return bool(p.script_args and p.script_args[0])


def own_infotext(p: StableDiffusionProcessing) -> dict[str, Any]:
    """What is to stand under the picture so far, less what X-Adapter wrote for an earlier cell; cells share theirs."""
    return {key: value for key, value in p.extra_generation_params.items() if not key.startswith(PREFIX)}
