"""The command line: what there is to say, and one line where it is said wrongly."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from .. import __version__
from ..errors import WrongArgument
from ..miniature.command_line import add_miniature
from ..settings import RECORDED, Settings, arguments, checked, defaults, expectation
from ..training.command_line import add_train
from .annotator_names import ANNOTATORS, CONTROLS
from .sampler_table import DEFAULT_SAMPLER, SAMPLERS

logger = logging.getLogger(__name__)

EXIT_WRONG = 2

SETTINGS_ELSEWHERE = ("enabled", "base_checkpoint", "adapter", "switch_point", "weight", "hires")
"""Fields of `Settings` that are options of another kind, or concern what this host has not."""
MAPPING_CHOICES = ("auto", "eager", "cuda")
"""Of `mapping_choice`, which imports torch: help must not wait for that."""
DTYPES = ("float32", "float16", "bfloat16")
SEVERAL: dict[str, Any] = {"action": "extend", "nargs": "+", "default": []}
SETTINGS_OF_EVALUATE = (
    "base_negative_prompt",
    "base_width",
    "base_height",
    "base_cfg_scale",
    "base_steps",
    "base_seed",
    "base_start",
    "guidance_start",
    "guidance_end",
    "refresh_every",
    "cond_only",
    "uncond_weight",
)
FID_AGAINST = ("sdxl", "captions")
"""Whose pictures: plain SDXL's, or those that the captions came with; anything else is a folder."""
FID_FEATURES = ("inception", "clip")
METRICS = ("fid", "clip", "condition", "style")


class Once(argparse.Action):
    """Takes an option's value, and refuses a second one."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        given = namespace.__dict__.setdefault("_given", set())
        if option is not None and self.dest in given:
            parser.error(f"{option} is given twice.")
        given.add(self.dest)
        setattr(namespace, self.dest, values)


class Several(argparse.Action):
    """Takes an option's values, and adds those of a second one; the default goes, also one that was taken over."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        given = namespace.__dict__.setdefault("_given", set())
        before = getattr(namespace, self.dest) if self.dest in given else []
        given.add(self.dest)
        setattr(namespace, self.dest, [*before, *values])


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def __init__(self, *arguments_given: Any, **named: Any) -> None:
        super().__init__(*arguments_given, **named)
        self.register("action", None, Once)
        self.register("action", "store", Once)
        self.register("action", "extend", Several)

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_WRONG, f"{self.prog}: {message}\n")


def read_options(arguments_given: list[str] | None = None) -> argparse.Namespace:
    """The options of a command line; ends the program with status 2 where they are wrong."""
    parser = make_parser()
    options = parser.parse_args(arguments_given)
    if options.command == "evaluate":
        _check_models(parser, options)
    if options.command != "generate":
        return options
    if taken_over := _taken_over(parser, options):
        parser = make_parser(taken_over)
        options = parser.parse_args(arguments_given)
    _check_models(parser, options)
    return options


def _check_models(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    missing = [f"--{name}" for name in ("upgraded", "base", "adapter") if getattr(options, name) is None]
    if missing:
        parser.error(f"the following arguments are required: {', '.join(missing)}")


def _taken_over(parser: argparse.ArgumentParser, options: argparse.Namespace) -> dict[str, Any]:
    """What stands in the place of the options' defaults."""
    if options.from_png is None and options.job is None:
        return {}
    from .recipes import options_of_job, options_of_png

    found: dict[str, Any] = {}
    try:
        for path, read in ((options.from_png, options_of_png), (options.job, options_of_job)):
            found |= read(path) if path is not None else {}
            if read is options_of_png and "strength" in found and options.init_image is None:
                logger.warning(
                    "--from-png: %s was painted over another picture, which it does not carry; without --init-image it "
                    "is made from noise.",
                    path.name,
                )
    except WrongArgument as error:
        parser.error(str(error))
    return found


def make_parser(taken_over: Mapping[str, Any] | None = None) -> Parser:
    """The parser; `taken_over` gives options of `generate` other defaults."""
    parser = Parser("xadapter", description="X-Adapter: SD1.5 plugins on SDXL, without a WebUI.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_demo(commands.add_parser("demo", help="see it work on miniature models that come with it"))
    generate = commands.add_parser("generate", help="make pictures with your own models")
    _add_generate(generate)
    generate.set_defaults(**(taken_over or {}))
    add_train(commands.add_parser("train", help="train mapping layers for a pair of models of your own"))
    add_miniature(commands.add_parser("miniature", help="train a pair of small models with all plugins, from nothing"))
    inspect = commands.add_parser("inspect", help="say what a model file is, without loading it whole")
    inspect.add_argument("file", type=Path, metavar="FILE")
    convert = commands.add_parser("convert", help="write an adapter as safetensors")
    convert.add_argument("file", type=Path, metavar="FILE")
    convert.add_argument("out", type=Path, metavar="OUT.safetensors")
    convert.add_argument("--force", action="store_true", help="write over a file that is there")
    convert.add_argument("--dtype", choices=DTYPES, help="type of the weights (default: as in FILE)")
    _add_evaluate(commands.add_parser("evaluate", help="make pictures of captions in several ways and measure them"))
    return parser


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("xadapter-demo"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--ui", action="store_true", help="a page in the browser instead")
    parser.add_argument("--port", type=int, help="of the page (default: the first free one)")
    parser.add_argument("--models-dir", type=Path, metavar="DIR", help="a WebUI's models/, whose files the page offers")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="of your own models, as for generate")


def _add_generate(parser: argparse.ArgumentParser) -> None:
    models = _add_models(parser)
    models.add_argument(
        "--control-image", **SEVERAL, type=Path, metavar="IMAGE", help="its map, or a picture to --annotate"
    )
    models.add_argument(
        "--annotate",
        **SEVERAL,
        metavar="NAME[:PATH]",
        help=f"what makes the map of the picture, given once for each: none, {', '.join(ANNOTATORS)}; those with "
        "weights are given a folder with them",
    )
    models.add_argument(
        "--control-scale",
        action="append",
        nargs="+",
        type=float,
        default=[],
        metavar="X",
        help="and its strength, given once for each; several values make a grid",
    )

    picture = _add_picture(parser)
    picture.add_argument(
        "--prompt",
        default="",
        help="(attention:1.2), [from:to:0.5], [a|b], AND, BREAK and <lora:name:0.8> as in the WebUI",
    )
    picture.add_argument("--num", type=int, metavar="N", help="pictures from each seed on (default: as --batch)")
    picture.add_argument("--batch", type=int, default=1, help="pictures at once; default: %(default)s")
    picture.add_argument("--styles", type=Path, metavar="FILE", help="a WebUI's styles.csv, for --style")
    picture.add_argument("--style", action="extend", nargs="+", default=[], metavar="NAME", help="one or more of them")
    picture.add_argument("--prompt-file", type=Path, metavar="FILE", help="a prompt a line, each for its own pictures")
    picture.add_argument("--init-image", type=Path, metavar="IMAGE", help="a picture to paint over")
    picture.add_argument("--mask", type=Path, metavar="IMAGE", help="white where --init-image is painted anew")
    picture.add_argument(
        "--strength", type=float, default=0.75, help="of painting over --init-image, 0 to 1; default: %(default)s"
    )
    picture.add_argument("--from-png", type=Path, metavar="FILE", help="make a picture again, by what is written in it")
    picture.add_argument("--job", type=Path, metavar="FILE", help="JSON or YAML with the fields of the REST interface")

    _add_joint_stage(parser, [name for name in arguments() if name not in SETTINGS_ELSEWHERE], "make a grid")
    machine = _add_machine(parser)
    machine.add_argument("--resume", action="store_true", help="leave out pictures that --out has already")
    machine.add_argument(
        "--out", type=Path, default=Path("xadapter-pictures"), metavar="DIR", help="default: %(default)s"
    )


def _add_models(parser: argparse.ArgumentParser) -> Any:
    models = parser.add_argument_group("models: single files as in the WebUI, or folders of diffusers")
    models.add_argument("--upgraded", metavar="FILE", help="SDXL checkpoint")
    models.add_argument("--base", "--base-checkpoint", metavar="FILE", help="SD1.5 or SD2 checkpoint")
    models.add_argument("--adapter", metavar="FILE", help="mapping layers, or None for SDEdit + SDXL")
    models.add_argument("--models-dir", type=Path, metavar="DIR", help="a WebUI's models/ folder, to name files from")
    models.add_argument(
        "--embeddings",
        type=Path,
        metavar="DIR",
        help="textual inversions, which prompts name (default: embeddings in --models-dir or beside it)",
    )
    models.add_argument("--tokenizer", type=Path, metavar="DIR", help="CLIP's vocab.json and merges.txt")
    models.add_argument("--lora", **SEVERAL, metavar="FILE[:WEIGHT]", help="of the base or SDXL, one or more")
    models.add_argument(
        "--controlnet",
        **SEVERAL,
        metavar="FILE",
        help="of the base, one or more, or T2I-Adapters (folders of diffusers), each with",
    )
    return models


def _add_picture(parser: argparse.ArgumentParser) -> Any:
    picture = parser.add_argument_group("picture")
    picture.add_argument("--negative-prompt", default="")
    picture.add_argument("--width", type=int, default=1024, help="a multiple of 8, 64 to 4096; default: %(default)s")
    picture.add_argument("--height", type=int, default=1024, help="a multiple of 8, 64 to 4096; default: %(default)s")
    picture.add_argument("--steps", type=int, help="1 to 150; default: 20, with --reference 50")
    picture.add_argument("--cfg", "--cfg-scale", type=float, help="1 to 30; default: 7, with --reference 7.5")
    picture.add_argument("--sampler", default=DEFAULT_SAMPLER, help=f"{', '.join(SAMPLERS)} (default: %(default)s)")
    picture.add_argument("--seed", action="extend", nargs="+", type=int, metavar="SEED", help="one or more; default: 0")
    picture.add_argument("--clip-skip", type=int, default=1, help="of SD1.5, 1 to 12; default: %(default)s, none")
    return picture


def _add_joint_stage(parser: argparse.ArgumentParser, names: Iterable[str], several: str) -> Any:
    group = parser.add_argument_group("X-Adapter")
    group.add_argument(
        "--switch-point",
        nargs="+",
        type=_setting("switch_point"),
        default=[Settings().switch_point],
        metavar="X",
        help=f"{_help_text('switch_point')} Several values {several}.",
    )
    group.add_argument(
        "--weight",
        nargs="+",
        type=_weight,
        default=[Settings().weight],
        metavar="X",
        help=f"{_help_text('weight')} Several values {several}; 1,0.5,0 is one weight a level.",
    )
    for name in names:
        _add_setting(group, name)
    group.add_argument(
        "--reference", action="store_true", help="the released pipeline's rules for the switch and the steps"
    )
    return group


def _add_machine(parser: argparse.ArgumentParser) -> Any:
    machine = parser.add_argument_group("machine")
    machine.add_argument("--dtype", choices=DTYPES, help="default: float16 on a GPU, float32 on the CPU")
    machine.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    machine.add_argument("--low-memory", action="store_true", help="models are on the device only while they work")
    machine.add_argument(
        "--mapping",
        choices=MAPPING_CHOICES,
        default=MAPPING_CHOICES[0],
        help="how the mapping layers run: by torch's kernels, by kernels of our own on an NVIDIA GPU, or auto",
    )
    return machine


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    captions = parser.add_argument_group("captions")
    captions.add_argument(
        "--captions",
        type=Path,
        required=True,
        metavar="PATH",
        help="a text file with a caption a line; COCO's captions JSON, of which each picture's first is taken; or a "
        "folder of pictures with a .txt beside each",
    )
    captions.add_argument("--pictures", type=Path, metavar="DIR", help="where the pictures of COCO's JSON lie")
    captions.add_argument("--limit", type=int, metavar="N", help="the first N captions (default: all)")
    captions.add_argument(
        "--upgraded-captions",
        type=Path,
        metavar="DIR",
        help="what SDXL is told instead: a folder of .txt with the captions' names, which can be empty",
    )

    models = _add_models(parser)
    models.add_argument(
        "--control", **SEVERAL, choices=CONTROLS, help="the map that it is given, made of the caption's picture, and"
    )
    models.add_argument(
        "--control-scale", **SEVERAL, type=float, metavar="X", help="its strength, given once for each; default: 1"
    )
    models.add_argument(
        "--upgraded-controlnet",
        **SEVERAL,
        metavar="FILE",
        help="of SDXL itself, one or more, which act in each of its pictures, each with",
    )
    models.add_argument("--upgraded-control", **SEVERAL, choices=CONTROLS, help="its map, of SDXL's size, and")
    models.add_argument("--upgraded-control-scale", **SEVERAL, type=float, metavar="X", help="its strength; default: 1")

    picture = _add_picture(parser)
    picture.add_argument(
        "--base-prompt",
        default="",
        metavar="TEXT",
        help="what SD1.5 is told, with {prompt} where the caption stands: trigger words belong here",
    )
    joint = _add_joint_stage(parser, SETTINGS_OF_EVALUATE, "are compared")
    joint.add_argument(
        "--single-stage",
        action="store_true",
        help="one more row for each weight: X-Adapter from noise, without a picture of SD1.5 first",
    )
    joint.add_argument(
        "--upgraded-alone",
        action="store_true",
        help="plain SDXL's row and no other, to be put beside those of another evaluation",
    )

    figures = parser.add_argument_group("figures: nothing is downloaded, what has no weights is named and left out")
    figures.add_argument("--metrics", **(SEVERAL | {"default": None}), choices=METRICS, help="default: all")
    figures.add_argument(
        "--inception", type=Path, metavar="FILE", help="torch-fidelity's weights-inception-2015-12-05-6726825d.pth: fid"
    )
    figures.add_argument(
        "--fid-against",
        default=FID_AGAINST[0],
        metavar="{sdxl,captions,DIR}",
        help="the pictures of plain SDXL, those that the captions came with, or those of a folder, in which they have "
        "the captions' names; default: %(default)s",
    )
    figures.add_argument(
        "--fid-features",
        choices=FID_FEATURES,
        default=FID_FEATURES[0],
        help="whose features the Fréchet distance is of: InceptionV3's, or those of --clip; default: %(default)s",
    )
    figures.add_argument("--clip", type=Path, metavar="DIR", help="a CLIP model of transformers: clip, style")
    figures.add_argument(
        "--depth",
        type=Path,
        metavar="DIR",
        help="an estimator of relative depth of transformers, such as DPT or Depth Anything: --control depth",
    )
    figures.add_argument(
        "--beside",
        **SEVERAL,
        metavar="NAME=DIR/FILE",
        help="one more row: the pictures of another evaluation of the same captions and seeds, as in "
        "'other adapter=other-out/x-adapter-0.8-1.png'",
    )
    figures.add_argument(
        "--resamples", type=int, default=1000, metavar="N", help="of the bootstrap, 100 or more; default: %(default)s"
    )

    machine = _add_machine(parser)
    machine.add_argument(
        "--batch", type=int, default=1, help="captions whose pictures are made at once; default: %(default)s"
    )
    machine.add_argument(
        "--memory",
        choices=arguments()["memory"].choices,
        default=RECORDED,
        help=f"{arguments()['memory'].tooltip} Default: recorded, so that the SD1.5 model runs once for all weights.",
    )
    machine.add_argument(
        "--out",
        type=Path,
        default=Path("xadapter-evaluation"),
        metavar="DIR",
        help="where a run goes on with what it has; default: %(default)s",
    )


def _add_setting(group: Any, name: str) -> None:
    option, default = f"--{name.replace('_', '-')}", defaults()[name]
    help_text = _help_text(name)
    if isinstance(default, bool):
        group.add_argument(option, action="store_true", help=help_text)
    elif choices := arguments()[name].choices:
        group.add_argument(option, choices=choices, default=default, help=help_text)
    else:
        group.add_argument(option, type=_setting(name), default=default, metavar="X", help=help_text)


def _help_text(name: str) -> str:
    """What an argument does, what it can be, and what it is where nothing is said."""
    row, default = arguments()[name], defaults()[name]
    tooltip = row.tooltip.replace("%", "%%")
    if isinstance(default, bool) or (isinstance(default, str) and not default):
        return tooltip
    if row.choices:
        return f"{tooltip} Default: {default}."
    return f"{tooltip} {expectation(row, isinstance(default, int)).capitalize()}; default: {default:g}."


def _setting(name: str) -> Callable[[str], Any]:
    """Reads the text of an option as a value of `Settings`."""
    kind = type(defaults()[name])

    def read(text: str) -> Any:
        try:
            return checked(name, text if kind is str else _number(text))
        except WrongArgument as error:
            raise argparse.ArgumentTypeError(str(error).removeprefix(f"'{name}' ")) from None

    return read


def _number(text: str) -> float | int | str:
    try:
        number = float(text)
    except ValueError:
        return text
    return int(number) if number.is_integer() else number


def _weight(text: str) -> float | tuple[float, ...]:
    numbers = [_number(part) for part in text.split(",")]
    try:
        return checked("weight", numbers if len(numbers) > 1 else numbers[0])
    except WrongArgument as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("'weight' ")) from None


def say(text: str) -> None:
    """A line for the user."""
    print(text, file=sys.stdout, flush=True)  # noqa: T201
