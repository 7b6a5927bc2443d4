"""Files by name, as the WebUI finds them; read before anything heavy is imported."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import WrongFile
from ..file_names import MODEL_SUFFIXES, find_named

FOLDERS = {
    "checkpoint": ("Stable-diffusion",),
    "lora": ("Lora", "LyCORIS"),
    "controlnet": ("ControlNet",),
    "adapter": ("X-Adapter",),
}


SAY_WHAT_A_FOLDER_IS = ("model_index.json", "config.json")
"""Of a pipeline of diffusers, and of one model."""


def find_file(name: str, kind: str, models_folder: Path | None, option: str) -> Path:
    """The file or folder of a name: a path, or a name as the WebUI lists it, with or without extension and hash.

    Args:
        name: as the user gave it.
        kind: a row of `FOLDERS`.
        models_folder: a WebUI's `models/`, None where only paths count.
        option: for messages.

    Raises:
        WrongFile: there is none.
    """
    if Path(name).exists():
        return Path(name)
    if models_folder is None:
        where = "" if Path(name).is_absolute() else f" in {Path.cwd()}, and no --models-dir to look into"
        raise WrongFile(f"{option}: there is no file {name}{where}.")
    folders = [models_folder / folder for folder in FOLDERS[kind]]
    candidates = {path: [path.relative_to(folder).as_posix()] for folder in folders for path in _model_files(folder)}
    found = find_named(name, candidates)
    if found is not None:
        return found
    known = ", ".join(listed for names in candidates.values() for listed in names) or "nothing at all"
    raise WrongFile(f"{option}: there is no {kind} '{name}' in {folders[0]}; there is {known}.")


def _model_files(folder: Path) -> Sequence[Path]:
    """Single files and folders of diffusers, but for what those hold."""
    found = sorted(folder.rglob("*"))
    models = {path.parent for path in found if path.name in SAY_WHAT_A_FOLDER_IS}
    whole = {path for path in models if models.isdisjoint(path.parents)}
    files = [path for path in found if path.suffix.lower() in MODEL_SUFFIXES and whole.isdisjoint(path.parents)]
    return sorted([*files, *whole])
