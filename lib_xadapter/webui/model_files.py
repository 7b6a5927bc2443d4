"""What lies in the folders: adapter files and SD1.5 checkpoints, by the names that the WebUI lists them under."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from modules import paths, sd_models, shared

from ..checkpoint_files import detect_checkpoint_family, input_channels
from ..errors import WrongArgument, WrongFile, XAdapterError
from ..families import BASE_FAMILIES, FAMILY_NAMES
from ..file_names import find_named
from ..pairs import Pair
from ..tensor_files import read_metadata
from . import options
from .known_files import found_in_file

ADAPTER_SUFFIXES = (".safetensors", ".bin", ".pt")
BASE_CHANNELS = (4, 9)
"""What a base's UNet takes: a latent; beside it, an inpainting model's mask and masked picture."""
EXTENSION_FOLDER = Path(__file__).parents[2]


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
    found = [(base_family(info), info) for info in sd_models.checkpoints_list.values()]
    return {info.title: info for family in BASE_FAMILIES for kind, info in found if kind == family}


def base_family(info: sd_models.CheckpointInfo) -> str:
    """The family of a checkpoint that can be the base, sd1 or sd2; "" for every other."""

    def look() -> str:
        try:
            check_base(info.name, info.filename)
        except WrongArgument:
            return ""
        return detect_checkpoint_family(info.filename)

    if not os.path.isfile(info.filename):
        return ""
    try:
        return found_in_file("xadapter-base-families", info.name, info.filename, look)
    except WrongFile:
        # a broken file among many must not empty the list; choosing it by name tells what is wrong
        return ""


def check_base(name: str, path: str) -> None:
    """Whether a checkpoint can be the base.

    Raises:
        WrongArgument: it is not for SD1.5 or SD2, or its UNet takes more than a picture to paint in.
        WrongFile: it cannot be read.
    """
    detected = detect_checkpoint_family(path)
    if detected not in BASE_FAMILIES:
        what = (
            f"a checkpoint of {FAMILY_NAMES[detected]}" if detected in FAMILY_NAMES else "no checkpoint that is known"
        )
        raise WrongArgument(f"'base_checkpoint' is '{name}', {what}, expected SD1.5 or SD2.")
    channels = input_channels(path)
    if channels not in BASE_CHANNELS:
        raise WrongArgument(
            f"'base_checkpoint' is '{name}', whose UNet takes {channels} channels (a model that edits or follows a "
            "given picture); expected 4, or 9 for an inpainting model."
        )


def find_adapter(name: str) -> Path:
    """The adapter file of a name, with or without extension or hash; the first one found for "".

    Raises:
        WrongArgument: there is none.
    """
    files = adapters()
    if not files:
        # whoever asks over REST is not told where the machine keeps what
        raise WrongArgument(
            "There is no adapter file; put one into models/X-Adapter of the WebUI, or name a folder in Settings → "
            "X-Adapter."
        )
    if not name:
        return next(iter(files.values()))
    found = find_named(name, {path: [key] for key, path in files.items()})
    if found is None:
        raise _unknown("adapter", name, files)
    return found


def adapter_pair(path: Path) -> Pair:
    """Which models an adapter file is for; unknown where it does not tell.

    Raises:
        WrongFile: it cannot be read.
    """
    return Pair.written_in(read_metadata(path))


def expected_base_family(name: str) -> str:
    """The family of the checkpoint that a name stands for as the base, sd1 where it stands for none."""
    try:
        return base_family(find_base_checkpoint(name))
    except XAdapterError:
        return "sd1"


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
    info = find_named(name, {info: info.ids for info in sd_models.checkpoints_list.values()})
    if info is None:
        raise _unknown("base_checkpoint", name, base_checkpoints())
    try:
        check_base(name, info.filename)
    except WrongFile as error:
        raise XAdapterError(f"The SD1.5 checkpoint cannot be loaded: {error}") from error
    return info


def _unknown(argument: str, name: str, known: Iterable[str]) -> WrongArgument:
    return WrongArgument(f"'{argument}' is '{name}', which is not among {', '.join(known) or 'none at all'}.")
