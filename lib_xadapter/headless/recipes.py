"""What a `generate` command can take over from elsewhere: the text in a picture, or a job file with the REST fields."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import WrongArgument, first_line
from ..infotext import read_infotext
from ..settings import read_settings, shown
from .infotexts import PNG_KEY, STRENGTH
from .options import SETTINGS_ELSEWHERE

PAIR = re.compile(r'([^:,]+): ("(?:\\.|[^"\\])*"|[^,]*)(?:, |$)')
NEGATIVE = "Negative prompt: "
SCRIPT = "X-Adapter"
HIRES = "Hires "

REST_FIELDS = {
    "prompt": "prompt",
    "negative_prompt": "negative_prompt",
    "width": "width",
    "height": "height",
    "steps": "steps",
    "cfg_scale": "cfg",
    "sampler_name": "sampler",
    "seed": "seed",
    "batch_size": "batch",
    "denoising_strength": "strength",
    "styles": "style",
}
"""Field of a request to the WebUI → option."""
WHOLE = ("width", "height", "steps", "seed", "batch_size", "CLIP_stop_at_last_layers")
NUMBERS = ("cfg_scale", "denoising_strength")
"""Fields that are no text."""
OVERRIDES = {"sd_model_checkpoint": "upgraded", "CLIP_stop_at_last_layers": "clip_skip"}
"""Setting in its `override_settings` → option."""


def options_of_png(path: Path) -> dict[str, Any]:
    """The options that make a picture again, as far as its infotext tells them.

    Raises:
        WrongArgument: it has no infotext, or one without X-Adapter.
    """
    try:
        with Image.open(path) as image:
            text = image.info.get(PNG_KEY)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise WrongArgument(f"--from-png: {path} is no picture that can be read ({error}).") from error
    if not text:
        raise WrongArgument(f"--from-png: {path.name} carries no settings.")
    *prompts, last = text.splitlines()
    parameters = {key.strip(): _unquoted(value) for key, value in PAIR.findall(last)}
    settings = read_infotext(parameters)
    if settings is None:
        raise WrongArgument(f"--from-png: {path.name} was made without X-Adapter.")
    if any(key.startswith("ControlNet ") for key in parameters):
        raise WrongArgument(f"--from-png: {path.name} was made with ControlNets, whose images it does not carry.")
    negative = next((place for place, line in enumerate(prompts) if line.startswith(NEGATIVE)), len(prompts))
    try:
        found = {
            "prompt": "\n".join(prompts[:negative]),
            "negative_prompt": "\n".join(prompts[negative:]).removeprefix(NEGATIVE),
            **_numbers(parameters),
            "strength": _strength(parameters),
            "sampler": parameters["Sampler"],
            "upgraded": parameters.get("Model"),
            **_own(settings),
        }
    except (KeyError, ValueError) as error:
        raise WrongArgument(f"--from-png: the settings of {path.name} are not whole ({first_line(error)}).") from error
    return {name: value for name, value in found.items() if value is not None}


def _numbers(parameters: Mapping[str, str]) -> dict[str, Any]:
    width, height = parameters["Size"].split("x")
    return {
        "width": int(width),
        "height": int(height),
        "steps": int(parameters["Steps"]),
        "cfg": float(parameters["CFG scale"]),
        "seed": [int(parameters["Seed"])],
        "clip_skip": int(parameters.get("Clip skip", 1)),
    }


def _strength(parameters: Mapping[str, str]) -> float | None:
    """Of painting over another picture; None where it was made from noise."""
    # the WebUI writes that of Hires. fix under the same key
    if STRENGTH not in parameters or any(key.startswith(HIRES) for key in parameters):
        return None
    return float(parameters[STRENGTH])


def options_of_job(path: Path) -> dict[str, Any]:
    """The options of a job file, JSON or YAML, with the fields of a request to the WebUI's REST interface.

    Raises:
        WrongArgument: it cannot be read, or holds a field that is not known here.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise WrongArgument(f"--job: {path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise WrongArgument(f"--job: {path.name} is no text in UTF-8.") from error
    import yaml

    try:
        job = json.loads(text) if path.suffix.lower() == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise WrongArgument(f"--job: {path.name} is neither JSON nor YAML: {first_line(error)}.") from error
    if not isinstance(job, dict):
        raise WrongArgument(f"--job: {path.name} holds no object.")
    found: dict[str, Any] = {}
    for name, value in job.items():
        if name == "alwayson_scripts":
            found |= _own(_script_settings(value, path))
        elif name == "override_settings" and isinstance(value, dict) and value.keys() <= OVERRIDES.keys():
            found |= {OVERRIDES[setting]: _checked(setting, given, path) for setting, given in value.items()}
        elif name in REST_FIELDS:
            given = _checked(name, value, path)
            found[REST_FIELDS[name]] = [given] if name == "seed" else given
        else:
            raise WrongArgument(f"--job: {path.name} has the field {shown(name)}, expected {', '.join(REST_FIELDS)}.")
    return found


def _checked(name: str, value: Any, path: Path) -> Any:
    """A field's value, of which the range is looked at later."""
    kinds: tuple[type, ...] = (int,) if name in WHOLE else (int, float) if name in NUMBERS else (str,)
    values = value if name == "styles" and isinstance(value, list) else [value]
    if not all(isinstance(one, kinds) and not isinstance(one, bool) for one in values):
        expected = "a whole number" if name in WHOLE else "a number" if name in NUMBERS else "text"
        raise WrongArgument(f"--job: {path.name} has '{name}' {shown(value)}, expected {expected}.")
    return value


def _script_settings(scripts: Any, path: Path) -> Mapping[str, Any]:
    try:
        (settings,) = scripts[SCRIPT]["args"]
        (_,) = scripts
        settings = dict(settings)
    except (KeyError, TypeError, ValueError):
        raise WrongArgument(
            f'--job: {path.name} has \'alwayson_scripts\', expected {{"{SCRIPT}": {{"args": [{{…}}]}}}}.'
        ) from None
    read_settings(settings)
    return settings


def _own(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the X-Adapter group."""
    found = {name: value for name, value in settings.items() if name not in SETTINGS_ELSEWHERE}
    for name in ("switch_point", "weight"):
        if name in settings:
            value = settings[name]
            found[name] = [tuple(value) if isinstance(value, list) else value]
    for name, option in (("base_checkpoint", "base"), ("adapter", "adapter")):
        if settings.get(name):
            found[option] = settings[name]
    return found


def _unquoted(text: str) -> str:
    try:
        return json.loads(text) if text.startswith('"') else text
    except ValueError:
        # as the WebUI does
        return text
