"""`generate`: the user's own models and prompt, every picture saved as soon as it is finished."""

from __future__ import annotations

import argparse
import itertools
import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image

from ..errors import WrongArgument, WrongFile, XAdapterError
from ..mapping import load_adapter
from ..settings import defaults, read_settings
from .bars import Bars
from .grid import labelled_grid, save_picture
from .jobs import Job, Picture, make_pictures, open_picture
from .loras import Lora, LoraTags, merge_lora, read_lora, take_tags
from .model_files import find_file, load_base, load_controlnet, load_upgraded
from .models import Models, Placement, with_controlnets
from .options import SETTINGS_ELSEWHERE, say
from .pipeline import RELEASED_RULES, WEBUI_RULES
from .sampler_table import sampler_named

logger = logging.getLogger(__name__)

MOST_CONTROL = 2.0
OWN_SETTINGS = defaults().keys() - set(SETTINGS_ELSEWHERE)
FIELD = re.compile(r"'([a-z_]+)'(?= is )")


@dataclass(frozen=True)
class Usual:
    """What is taken where nothing is said."""

    steps: int
    cfg_scale: float


USUAL, RELEASED_USUAL = Usual(20, 7.0), Usual(50, 7.5)


@dataclass(frozen=True)
class Files:
    """The files of a command line, found but not read."""

    base: Path
    upgraded: Path
    adapter: Path | None
    loras: tuple[Lora, ...]
    controlnets: tuple[Path, ...]


def generate(options: argparse.Namespace) -> int:
    """Check everything, load, make and save."""
    _check_folder(options.out)
    placement = choose_placement(options.device, options.dtype, options.low_memory)
    placement = replace(placement, mapping=options.mapping, fp8=options.fp8)
    prompts = take_tags(options.prompt)
    files = find_files(options, prompts)
    job = read_job(options, files, prompts)
    models = load_models(files, placement, options.tokenizer)
    rules = RELEASED_RULES if options.reference else WEBUI_RULES
    made: list[Picture] = []
    try:
        with Bars(job.pictures) as bars:
            for picture in make_pictures(models, job, rules, bars.show):
                made.append(picture)
                bars.finished()
                _save(picture, options.out, job.settings.return_base_image)
    finally:
        if len(made) > 1:
            save_picture(_free_name(options.out, "grid", ""), sweep_grid(made))
        if made:
            say(f"{len(made)} of {job.pictures} pictures in {options.out}")
    return 0


def choose_placement(device: str | None, dtype: str | None, low_memory: bool) -> Placement:
    """Where to run and in which type.

    Raises:
        WrongArgument: there is no such device.
    """
    chosen = device or ("cuda" if torch.cuda.is_available() else _mps_or_cpu())
    try:
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        first = str(error).strip().splitlines()[0]
        raise WrongArgument(f"--device is '{chosen}', which this machine does not have ({first}).") from error
    return Placement(chosen, getattr(torch, dtype or ("float16" if chosen != "cpu" else "float32")), low_memory)


def _mps_or_cpu() -> str:
    return "mps" if torch.backends.mps.is_available() else "cpu"


def find_files(options: argparse.Namespace, prompts: LoraTags) -> Files:
    """All files that the options name.

    Raises:
        WrongFile: naming the option whose file there is not.
    """
    folder = options.models_dir
    if folder is not None and not folder.is_dir():
        raise WrongFile(f"--models-dir: there is no folder {folder}.")
    named = [(*read_lora(text), "--lora") for text in options.lora]
    named += [(name, weight, "--prompt") for name, weight in prompts.loras]
    return Files(
        base=find_file(options.base, "checkpoint", folder, "--base"),
        upgraded=find_file(options.upgraded, "checkpoint", folder, "--upgraded"),
        adapter=None
        if options.adapter.lower() == "none"
        else find_file(options.adapter, "adapter", folder, "--adapter"),
        loras=tuple(Lora(find_file(name, "lora", folder, option), weight) for name, weight, option in named),
        controlnets=tuple(find_file(name, "controlnet", folder, "--controlnet") for name in options.controlnet),
    )


def read_job(options: argparse.Namespace, files: Files, prompts: LoraTags) -> Job:
    """What the options ask for.

    Raises:
        WrongArgument: naming the option that is out of range.
    """
    usual = RELEASED_USUAL if options.reference else USUAL
    scales = options.control_scale or [[1.0]] * len(files.controlnets)
    for option, given in (("--control-image", options.control_image), ("--control-scale", scales)):
        if len(given) != len(files.controlnets):
            raise WrongArgument(f"{option} is given {len(given)} times, expected once for each --controlnet.")
    for scale in itertools.chain(*scales):
        if not 0 <= scale <= MOST_CONTROL:
            raise WrongArgument(f"--control-scale is {scale:g}, expected a number from 0 to {MOST_CONTROL:g}.")
    own = {name: value for name, value in vars(options).items() if name in OWN_SETTINGS}
    models = {"base_checkpoint": files.base.stem, "adapter": files.adapter.name if files.adapter else "None"}
    swept = {"switch_point": options.switch_point[0], "weight": options.weight[0]}
    with naming_options():
        settings = read_settings({**own, **models, **swept})
        return Job(
            prompt=prompts.prompt,
            negative_prompt=options.negative_prompt,
            settings=settings,
            width=options.width,
            height=options.height,
            steps=usual.steps if options.steps is None else options.steps,
            cfg_scale=usual.cfg_scale if options.cfg is None else options.cfg,
            sampler=sampler_named(options.sampler).name,
            seed=options.seed,
            batch=options.batch,
            switch_points=tuple(options.switch_point),
            weights=tuple(options.weight),
            control_images=tuple(open_picture(path, "--control-image") for path in options.control_image),
            control_scales=tuple(map(tuple, scales)),
            model=files.upgraded.stem,
            loras=tuple((lora.path.stem, lora.weight) for lora in files.loras),
            control_names=tuple(path.stem for path in files.controlnets),
        )


@contextmanager
def naming_options() -> Iterator[None]:
    """Errors speak of fields of a table: let them speak of options."""
    try:
        yield
    except WrongArgument as error:
        raise WrongArgument(FIELD.sub(lambda found: f"--{found[1].replace('_', '-')}", str(error))) from error


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
        controlnets = tuple(load_controlnet(path, base.unet, dtype) for path in files.controlnets)
    with naming("--lora"):
        for lora in files.loras:
            logger.info("%s goes to the %s model.", lora.path.name, merge_lora(lora, base, upgraded))
    models = Models(with_controlnets(base, controlnets), upgraded, adapter, placement)
    with naming("--adapter"):
        models.check()
    for pipeline in (models.base, models.upgraded):
        pipeline.set_progress_bar_config(disable=True)
    if placement.low_memory:
        for pipeline in (base, upgraded):
            pipeline.vae.enable_tiling()
    return models


def _check_folder(folder: Path) -> None:
    nearest = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise WrongFile(f"--out is {folder}, expected a folder that can be written to.")


def _save(picture: Picture, folder: Path, with_base: bool) -> None:
    path = save_picture(_free_name(folder, "", f"-{picture.seed}"), picture.image, picture.text)
    if with_base and picture.base_image is not None:
        save_picture(path.with_name(f"{path.stem}-base.png"), picture.base_image, picture.text)


def _free_name(folder: Path, kind: str, seed: str) -> Path:
    """The next number that no file of the folder has."""
    numbers = [int(found[1]) for path in folder.glob("*.png") if (found := re.match(rf"{kind}(\d{{5}})", path.name))]
    return folder / f"{kind}{max(numbers, default=-1) + 1:05d}{seed}.png"


def sweep_grid(pictures: Sequence[Picture]) -> Image.Image:
    """Weights across; switch points, control scales and seeds down."""
    columns = list(dict.fromkeys(picture.settings.weight for picture in pictures))
    rows = list(dict.fromkeys(_row(picture) for picture in pictures))
    cells = {(_row(picture), picture.settings.weight): picture.image for picture in pictures}
    names = ("switch point", "control", "seed")
    varying = [place for place in range(len(names)) if len({row[place] for row in rows}) > 1] or [0]
    return labelled_grid(
        [[cells.get((row, column)) for column in columns] for row in rows],
        ["\n".join(f"{names[place]} {_shown(row[place])}" for place in varying) for row in rows],
        [f"weight {_shown(column)}" for column in columns],
    )


def _row(picture: Picture) -> tuple[float, tuple[float, ...], int]:
    return picture.settings.switch_point, picture.control_scales, picture.seed


def _shown(value: float | tuple[float, ...]) -> str:
    return ", ".join(f"{item:g}" for item in value) if isinstance(value, tuple) else f"{value:g}"
