"""Settings as text under a picture, in the form that the WebUI writes and pastes: `key: value, key: value`.

Default values are left out. The key of `enabled` holds the version, which tells what they were (`CHANGES`).
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import WrongArgument
from .settings import Settings, arguments, checked, defaults, shown

logger = logging.getLogger(__name__)

PREFIX = "X-Adapter "


@dataclass(frozen=True)
class Change:
    """A default that became another, so that older pictures must be read otherwise than newer ones.

    A rule that no argument tells becomes one when it changes: its default is the new rule, `before` the old one.

    Attributes:
        version: the first with the new default.
        argument: the argument's name.
        before: its default until then.
    """

    version: str
    argument: str
    before: Any


CHANGES: tuple[Change, ...] = ()
"""All of them, oldest first."""


def defaults_of(version: str) -> dict[str, Any]:
    """Argument → what it meant in a version to leave it out."""
    values = defaults()
    for change in reversed(CHANGES):
        if _numbers(version) < _numbers(change.version):
            values[change.argument] = change.before
    return values


def written_names() -> list[str]:
    """The arguments that a picture depends on; how it was made faster or with less memory is not written."""
    return [name for name, row in arguments().items() if row.infotext and name != "enabled"]


def key_of(name: str) -> str:
    """The infotext key of an argument."""
    return PREFIX + arguments()[name].infotext


VERSION_KEY = key_of("enabled")
BASE_SEED_KEY = key_of("base_seed")
PLUGINS_KEY = PREFIX + "plugins"
"""Which plugin went to which model, in words; for the reader only, pasting passes over it."""
HIRES_PLUGINS_KEY = PREFIX + "hires plugins"
"""The same of the second pass of Hires. fix, where it is not as in the first."""


def write_infotext(settings: Settings, version: str) -> dict[str, str]:
    """Infotext keys and values for everything that is not at its default."""
    written = {VERSION_KEY: version}
    for name in written_names():
        value = getattr(settings, name)
        if value != defaults()[name]:
            written[key_of(name)] = _write(value)
    return written


def read_infotext(parameters: Mapping[str, Any]) -> dict[str, Any] | None:
    """Every argument as the parsed infotext has it; None for a picture made without X-Adapter.

    What is left out has the default of the version that wrote it, and so has what the argument cannot be: anything can
    be pasted. Arguments that no infotext holds are not among them.
    """
    if VERSION_KEY not in parameters:
        return None
    values, left_out = {"enabled": True}, defaults_of(str(parameters[VERSION_KEY]))
    for name in written_names():
        text, default = _find(parameters, key_of(name)), left_out[name]
        values[name] = default if text is None else _read_or(default, name, str(text))
    return values


def _read_or(default: Any, name: str, text: str) -> Any:
    try:
        return checked(name, _read(name, text, default))
    except (ValueError, IndexError, WrongArgument):
        logger.warning("%s is passed over: it is %s.", key_of(name), shown(text))
        return default


def _numbers(version: str) -> tuple[int, ...]:
    """Of `0.1.0`, to be compared."""
    return tuple(map(int, re.findall(r"[0-9]{1,9}", version)))


def _write(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(_number, value))
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, str):
        return _quoted(value)
    return str(value)


def _number(value: float) -> str:
    """The shortest text that reads as exactly this number."""
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def _quoted(text: str) -> str:
    """The WebUI quotes what holds `,`, `:` or a line break, and unquotes whatever stands in quotes."""
    if not any(mark in text for mark in ",:\n") and (text.startswith('"') or text != text.strip()):
        return json.dumps(text, ensure_ascii=False)
    return text


def _find(parameters: Mapping[str, Any], key: str) -> str | None:
    # the WebUI splits a value of the form 512x768 in two
    if f"{key}-1" in parameters and f"{key}-2" in parameters:
        return f"{parameters[f'{key}-1']}x{parameters[f'{key}-2']}"
    return parameters.get(key)


def _read(name: str, text: str, default: Any) -> Any:
    if isinstance(default, bool):
        return text == "True"
    if isinstance(default, int):
        return int(text)
    if name == "weight":
        numbers = tuple(float(part) for part in text.split())
        return numbers[0] if len(numbers) == 1 else numbers
    if isinstance(default, float):
        return float(text)
    return text
