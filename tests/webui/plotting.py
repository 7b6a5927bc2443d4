"""What the tests ask the WebUI's X/Y/Z plot for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from .asking import arguments
from .conftest import PLAIN
from .server import Answer, WebUIServer

PLOT = "x/y/z plot"
PREFIX = "[X-Adapter] "


def axis_labels(server: WebUIServer) -> list[str]:
    """The axes that the txt2img tab offers."""
    return server.probed(server.get("/probe/axes"))


def plot(server: WebUIServer, *axes: tuple[str, str], given: Mapping[str, Any] | None = None, **request: Any) -> Answer:
    """A plot over up to three axes (label, values as they are typed), its grid and then its pictures."""
    labels = axis_labels(server)
    chosen = [(labels.index(label), values, []) for label, values in axes]
    chosen += [(0, "", [])] * (3 - len(chosen))
    places = [part for axis in chosen for part in axis]
    legend, lone, sub_grids, keep_random, vary, margin, as_text = True, True, False, False, [False] * 3, 0, True
    script_args = [*places, legend, lone, sub_grids, keep_random, *vary, margin, as_text]
    return scripted(server, PLOT, script_args, given, **request)


def scripted(
    server: WebUIServer, name: str, script_args: Sequence[Any], given: Mapping[str, Any] | None = None, **request: Any
) -> Answer:
    """What a script of the Script list makes with X-Adapter ticked, or unticked where nothing is given."""
    ticked = arguments(**given) if given is not None else {}
    asked = {**PLAIN, **request, **ticked, "script_name": name, "script_args": list(script_args)}
    return server.txt2img(**asked)


def calls_of(calls: Sequence[Mapping[str, Any]]) -> Counter[str]:
    """How often each model's UNet was called."""
    return Counter(call["model"] for call in calls)
