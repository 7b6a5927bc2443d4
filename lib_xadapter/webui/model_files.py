"""What lies in the folders: adapter files and SD1.5 checkpoints, by the names that the WebUI lists them under."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

from modules import cache, paths, sd_models, shared

from ..checkpoint_files import detect_checkpoint_family
from ..errors import WrongArgument, WrongFile, XAdapterError
from . import options

ADAPTER_SUFFIXES = (".safetensors", ".bin", ".pt")
BASE_FAMILIES = ("sd1", "sd2")
EXTENSION_FOLDER = Path(__file__).parents[2]

Found = TypeVar("Found")


def adapter_folders() -> list[Path]:
    """Where adapter files are looked for, in this order."""
    named = options.adapter_folder()
    folders = [EXTENSION_FOLDER / "models", Path(paths.models_path) / "X-Adapter"]
    return [*folders, Path(named)] if named else folders


def adapters() -> dict[str, Path]:
    """Adapter files by name: the file's, with its folder inside the adapter folder; the first of two wins."""
    files: dict[str, Path] = {}
    for folder in adapter_folders():
        for path in sorted(shared.walk_files(str(folder), allowed_extensions=list(ADAPTER_SUFFIXES))):
            files.setdefault(Path(path).relative_to(folder).as_posix(), Path(path))
    return files


def base_checkpoints() -> dict[str, sd_models.CheckpointInfo]:
    """Checkpoints that can be the base, by title, those of SD1.x first."""
    found = [(family_of(info), info) for info in sd_models.checkpoints_list.values()]
    return {info.title: info for family in BASE_FAMILIES for kind, info in found if kind == family}


def family_of(info: sd_models.CheckpointInfo) -> str:
    """sd1, sd2, sdxl, sdxl-refiner or unknown, from the names and shapes in the file."""

    def look() -> dict[str, str]:
        try:
            return {"family": detect_checkpoint_family(info.filename)}
        except WrongFile:
            # a broken file among many must not empty the list; choosing it by name tells what is wrong
            return {"family": "unknown"}

    if not os.path.isfile(info.filename):
        return "unknown"
    return cache.cached_data_for_file("xadapter-checkpoint-family", info.name, info.filename, look)["family"]


def find_adapter(name: str) -> Path:
    """The adapter file of a name, with or without extension or hash; the first one found for "".

    Raises:
        WrongArgument: there is none.
    """
    files = adapters()
    if not files:
        looked = ", ".join(map(str, adapter_folders()))
        raise WrongArgument(f"There is no adapter file; put one into one of these folders: {looked}.")
    if not name:
        return next(iter(files.values()))
    return _closest(name, {key: (path, [key]) for key, path in files.items()}, "adapter")


def find_base_checkpoint(name: str) -> sd_models.CheckpointInfo:
    """The checkpoint of a name, with or without extension or hash; the first SD1.5 one for "".

    Raises:
        WrongArgument: there is none, or it is not for SD1.5.
        XAdapterError: its file cannot be read.
    """
    if not name:
        usable = base_checkpoints()
        if not usable:
            raise WrongArgument("There is no SD1.5 checkpoint among the WebUI's models (models/Stable-diffusion).")
        return next(iter(usable.values()))
    everything = {info.title: (info, info.ids) for info in sd_models.checkpoints_list.values()}
    info = _closest(name, everything, "base_checkpoint", choices=base_checkpoints)
    try:
        detected = detect_checkpoint_family(info.filename)
    except WrongFile as error:
        raise XAdapterError(f"The SD1.5 checkpoint cannot be loaded: {error}") from error
    if detected not in BASE_FAMILIES:
        raise WrongArgument(f"'base_checkpoint' is '{name}', a checkpoint of the family {detected}, expected SD1.5.")
    return info


def _closest(
    name: str, candidates: Mapping[str, tuple[Found, Iterable[str]]], argument: str, choices: object = None
) -> Found:
    """The candidate whose names hold this one, letter for letter or without folder case, extension and hash."""
    for spelled in (lambda text: text, _bare):
        for found, names in candidates.values():
            if spelled(name) in {spelled(other) for other in names}:
                return found
    known = list(choices()) if callable(choices) else list(candidates)
    raise WrongArgument(f"'{argument}' is '{name}', which is not among {', '.join(known) or 'none at all'}.")


def _bare(name: str) -> str:
    without_hash = re.sub(r"\s*\[[^\]]+\]\s*$", "", name.strip())
    suffixes = "|".join(re.escape(suffix) for suffix in (*ADAPTER_SUFFIXES, ".ckpt"))
    return re.sub(rf"({suffixes})$", "", without_hash, flags=re.IGNORECASE).replace("\\", "/").lower()
