"""`generate`: the user's own models and prompt, every picture saved as soon as it is finished."""

from __future__ import annotations

import argparse
import contextlib
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

from ..errors import WrongArgument, XAdapterError
from ..mapping import load_adapter
from .annotators import annotated
from .bars import Bars
from .generate_command import Files, GenerateCommand
from .grid import labelled_grid, save_picture
from .infotexts import PNG_KEY
from .inversions import Inversions
from .jobs import Picture, make_pictures
from .loras import merge_lora
from .model_files import load_base, load_control, load_controlnet, load_upgraded
from .models import Models, Placement, with_controls
from .options import say
from .pipeline import RELEASED_RULES, WEBUI_RULES

logger = logging.getLogger(__name__)


def generate(options: argparse.Namespace, command: GenerateCommand) -> int:
    """Load, make and save the pictures of a command."""
    placement = choose_placement(options.device, options.dtype, options.low_memory)
    placement = replace(placement, mapping=options.mapping)
    models = load_models(command.files, placement, options.tokenizer)
    there = texts_in(options.out) if options.resume else set()
    rules = RELEASED_RULES if options.reference else WEBUI_RULES
    made: list[Picture] = []
    try:
        with Bars(command.pictures) as bars:
            for job in map(annotated, command.jobs):
                for picture in make_pictures(models, job, rules, bars.show, there):
                    _save(picture, options.out, job.settings.return_base_image)
                    made.append(picture)
                    bars.finished()
    finally:
        if len(made) > 1:
            save_picture(_free_name(options.out, "grid", ""), sweep_grid(made))
        if made:
            say(f"{len(made)} of {command.pictures} pictures in {options.out}")
    if not made:
        say(f"All {command.pictures} pictures are in {options.out} already.")
    return 0


def texts_in(folder: Path) -> set[str]:
    """What is written in the pictures of a folder."""
    found = set()
    for path in folder.glob("*.png"):
        with contextlib.suppress(OSError, SyntaxError), Image.open(path) as image:
            found.add(image.info.get(PNG_KEY, ""))
    return found


def choose_placement(device: str | None, dtype: str | None, low_memory: bool) -> Placement:
    """Where to run and in which type.

    Raises:
        WrongArgument: there is no such device.
    """
    chosen = device or ("cuda" if torch.cuda.is_available() else _mps_or_cpu())
    try:
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        known = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        there = ", ".join(["cpu", *(kind for kind, is_there in known.items() if is_there)])
        raise WrongArgument(f"--device is '{chosen}', which this machine does not have; it has {there}.") from error
    return Placement(chosen, getattr(torch, dtype or ("float16" if chosen != "cpu" else "float32")), low_memory)


def _mps_or_cpu() -> str:
    return "mps" if torch.backends.mps.is_available() else "cpu"


@contextmanager
def naming(option: str) -> Iterator[None]:
    """Errors of a file name the option that it came by."""
    try:
        yield
    except XAdapterError as error:
        raise type(error)(f"{option}: {error}") from error


def load_models(files: Files, placement: Placement, tokenizer: Path | None = None) -> Models:
    """The models of the files, with the LoRAs merged.

    Raises:
        XAdapterError: naming the option whose file is wrong or does not fit.
    """
    dtype = placement.dtype
    with naming("--adapter"):
        adapter = load_adapter(files.adapter, dtype=dtype) if files.adapter else None
    with naming("--base"):
        base = load_base(files.base, dtype, tokenizer)
    with naming("--upgraded"):
        upgraded = load_upgraded(files.upgraded, dtype, tokenizer)
    with naming("--controlnet"):
        controlled = with_controls(base, [load_control(path, base.unet, dtype) for path in files.controlnets])
    with naming("--upgraded-controlnet"):
        own = [load_controlnet(path, upgraded.unet, dtype) for path in files.upgraded_controlnets]
    with naming("--lora"):
        for lora in files.loras:
            logger.info("%s goes to the %s model.", lora.path.name, merge_lora(lora, base, upgraded))
    with naming("--lora"):
        inversions = Inversions.below(*files.embeddings).with_those_of(lora.path for lora in files.loras)
    models = Models(controlled, with_controls(upgraded, own), adapter, placement, inversions)
    with naming("--adapter"):
        models.check()
    for pipeline in (models.base, models.upgraded):
        pipeline.set_progress_bar_config(disable=True)
    if placement.low_memory:
        for pipeline in (base, upgraded):
            pipeline.vae.enable_tiling()
    return models


def _save(picture: Picture, folder: Path, with_base: bool) -> None:
    path = save_picture(_free_name(folder, "", f"-{picture.seed}"), picture.image, picture.text)
    if with_base and picture.base_image is not None:
        save_picture(path.with_name(f"{path.stem}-base.png"), picture.base_image, picture.text)


def _free_name(folder: Path, kind: str, seed: str) -> Path:
    """The next number that no file of the folder has."""
    numbers = [int(found[1]) for path in folder.glob("*.png") if (found := re.match(rf"{kind}(\d{{5}})", path.name))]
    return folder / f"{kind}{max(numbers, default=-1) + 1:05d}{seed}.png"


LONGEST_LABEL = 24


def sweep_grid(pictures: Sequence[Picture]) -> Image.Image:
    """Weights across; switch points, control scales and seeds down."""
    columns = list(dict.fromkeys(picture.settings.weight for picture in pictures))
    rows = list(dict.fromkeys(_row(picture) for picture in pictures))
    cells = {(_row(picture), picture.settings.weight): picture.image for picture in pictures}
    names = ("prompt", "switch point", "control", "seed")
    varying = [place for place in range(len(names)) if len({row[place] for row in rows}) > 1] or [0]
    return labelled_grid(
        [[cells.get((row, column)) for column in columns] for row in rows],
        ["\n".join(f"{names[place]} {_shown(row[place])}" for place in varying) for row in rows],
        [f"weight {_shown(column)}" for column in columns],
    )


def _row(picture: Picture) -> tuple[str, float, tuple[float, ...], int]:
    return picture.prompt, picture.settings.switch_point, picture.control_scales, picture.seed


def _shown(value: str | float | tuple[float, ...]) -> str:
    if isinstance(value, str):
        return value[:LONGEST_LABEL]
    return ", ".join(f"{item:g}" for item in value) if isinstance(value, tuple) else f"{value:g}"
