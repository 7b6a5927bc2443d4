"""A `generate` command: its files found, its arguments checked, before anything heavy is imported."""

from __future__ import annotations

import argparse
import functools
import itertools
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import WrongArgument, WrongFile
from ..settings import defaults, read_settings
from .annotator_names import read_annotators
from .job import Job, open_picture
from .lora_names import Lora, LoraTags, read_lora, take_tags
from .named_files import find_file
from .options import SETTINGS_ELSEWHERE
from .prompt_grammar import read_styles, with_style
from .sampler_table import sampler_named

MOST_CONTROL = 2.0
JOB_FIELDS = ("width", "height", "steps", "cfg", "sampler", "seed", "batch", "strength", "mask", "clip_skip")
OWN_SETTINGS = defaults().keys() - set(SETTINGS_ELSEWHERE)
NO_TAGS = LoraTags("")
FIELD = re.compile(r"'([a-z0-9_]+)'")


@dataclass(frozen=True)
class Usual:
    """Defaults of a command."""

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
    embeddings: tuple[Path, ...] = ()
    upgraded_controlnets: tuple[Path, ...] = ()


@dataclass(frozen=True)
class GenerateCommand:
    """A command that can be carried out: its files were found and its arguments are valid."""

    files: Files
    jobs: tuple[Job, ...]

    @property
    def pictures(self) -> int:
        """How many there will be."""
        return sum(job.pictures for job in self.jobs)


def read_generate_command(options: argparse.Namespace) -> GenerateCommand:
    """Raises: XAdapterError: naming the option that is wrong."""
    check_folder(options.out)
    prompt, negative_prompt = styled(options, options.prompt)
    prompts, base_prompts = take_tags(prompt, "--prompt"), take_tags(options.base_prompt, "--base-prompt")
    options.base_prompt = base_prompts.prompt
    files = find_files(options, prompts, base_prompts)
    job = replace(read_job(options, files, prompts), negative_prompt=negative_prompt)
    batches = batches_of(options.seed or [0], options.num, options.batch)
    return GenerateCommand(
        files,
        tuple(
            replace(job, prompt=prompt, seed=seed + done, batch=images, settings=job.settings.of_image(done, 0))
            for prompt in read_prompts(options, prompts.prompt)
            for seed, done, images in batches
        ),
    )


def styled(options: argparse.Namespace, prompt: str) -> tuple[str, str]:
    """A prompt and the negative prompt in the styles that are named.

    Raises:
        WrongArgument: there is no such style.
    """
    if not options.style:
        return prompt, options.negative_prompt
    if options.styles is None:
        raise WrongArgument("--style is given, but there are no --styles to find it in.")
    styles = read_styles(options.styles)
    if unknown := [name for name in options.style if name not in styles]:
        raise WrongArgument(
            f"--style: there is no '{unknown[0]}' in {options.styles.name}; there is {', '.join(styles)}."
        )
    named = [styles[name] for name in options.style]
    return (
        functools.reduce(with_style, (style.prompt for style in named), prompt),
        functools.reduce(with_style, (style.negative_prompt for style in named), options.negative_prompt),
    )


def batches_of(seeds: Sequence[int], num: int | None, batch: int) -> list[tuple[int, int, int]]:
    """Seed, images before it and images of each batch: `num` pictures from each seed on, at most `batch` at once.

    Raises:
        WrongArgument: `num` is out of range.
    """
    count = batch if num is None else num
    if count < 1:
        raise WrongArgument(f"--num is {count}, expected a whole number from 1.")
    return [(seed, done, min(batch, count - done)) for seed in seeds for done in range(0, count, max(batch, 1))]


def read_prompts(options: argparse.Namespace, prompt: str) -> list[str]:
    """The prompt, or those of a file.

    Raises:
        WrongArgument: the file cannot be read, holds none, or names LoRAs.
    """
    path = options.prompt_file
    if path is None:
        return [prompt]
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise WrongArgument(f"--prompt-file: {path} cannot be read ({error}).") from error
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise WrongArgument(f"--prompt-file: {path.name} holds no prompt.")
    if tagged := next((line for line in prompts if take_tags(line).loras), None):
        raise WrongArgument(f"--prompt-file: '{tagged}' names a LoRA; name those of all prompts by --lora.")
    # LoRAs of the styles are merged for all of them
    return [take_tags(styled(options, line)[0]).prompt for line in prompts]


def check_folder(folder: Path) -> None:
    """Whether pictures can be written to a folder, by writing.

    Raises:
        WrongFile: they cannot.
    """
    nearest = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=nearest) as file:
            file.write(bytes(2**16))
    except OSError as error:
        raise WrongFile(f"--out is {folder}, which cannot be written to: {error.strerror or error}.") from error


def find_files(options: argparse.Namespace, prompts: LoraTags, base_prompts: LoraTags = NO_TAGS) -> Files:
    """All files that the options name.

    Raises:
        WrongFile: naming the option whose file there is not.
    """
    folder = options.models_dir
    if folder is not None and not folder.is_dir():
        raise WrongFile(f"--models-dir: there is no folder {folder}.")
    named = [(Lora(Path(name), weight), "--lora") for name, weight in map(read_lora, options.lora)]
    # what the base's own prompt names, too, goes to the base as it stands there
    own = {lora.path for lora in base_prompts.loras}
    named += [(lora, "--prompt") for lora in prompts.loras if lora.path not in own]
    named += [(replace(lora, models=("base",)), "--base-prompt") for lora in base_prompts.loras]
    return Files(
        base=find_file(options.base, "checkpoint", folder, "--base"),
        upgraded=find_file(options.upgraded, "checkpoint", folder, "--upgraded"),
        adapter=None
        if options.adapter.lower() == "none"
        else find_file(options.adapter, "adapter", folder, "--adapter"),
        loras=tuple(replace(lora, path=find_file(str(lora.path), "lora", folder, option)) for lora, option in named),
        controlnets=tuple(find_file(name, "controlnet", folder, "--controlnet") for name in options.controlnet),
        embeddings=embedding_folders(folder, options.embeddings),
    )


def embedding_folders(models_folder: Path | None, given: Path | None) -> tuple[Path, ...]:
    """Where textual inversions are looked for: the WebUI keeps them beside its `models/`.

    Raises:
        WrongFile: the folder that was given is none.
    """
    if given is not None:
        if not given.is_dir():
            raise WrongFile(f"--embeddings: there is no folder {given}.")
        return (given,)
    if models_folder is None:
        return ()
    folders = (models_folder / "embeddings", models_folder.absolute().parent / "embeddings")
    return tuple(folder for folder in folders if folder.is_dir())


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
            seed=(options.seed or [0])[0],
            batch=options.batch,
            switch_points=tuple(options.switch_point),
            weights=tuple(options.weight),
            control_images=tuple(open_picture(path, "--control-image") for path in options.control_image),
            annotators=read_annotators(options.annotate, len(files.controlnets)),
            control_scales=tuple(map(tuple, scales)),
            model=files.upgraded.stem,
            loras=tuple((lora.path.stem, lora.said) for lora in files.loras),
            control_names=tuple(path.stem for path in files.controlnets),
            init_image=open_picture(options.init_image, "--init-image") if options.init_image else None,
            mask=open_picture(options.mask, "--mask") if options.mask else None,
            strength=options.strength,
            clip_skip=options.clip_skip,
        )


@contextmanager
def naming_options() -> Iterator[None]:
    """Errors speak of fields of a table: let them speak of options."""
    try:
        yield
    except WrongArgument as error:
        raise WrongArgument(FIELD.sub(_as_option, str(error))) from error


def _as_option(found: re.Match[str]) -> str:
    is_field = found[1] in OWN_SETTINGS or found[1] in JOB_FIELDS
    return f"--{found[1].replace('_', '-')}" if is_field else found[0]
