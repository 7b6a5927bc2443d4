"""The options of `train`: what is learned from, and the tables of `recipe`. Nothing heavy is imported."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..settings import expectation
from .recipe import Course, Recipe, defaults, flag, rows

OUT = "xadapter-training"


def add_train(parser: argparse.ArgumentParser) -> None:
    """Give a sub-command the options of `train`."""
    source = parser.add_argument_group("models and pictures")
    source.add_argument("--base", required=True, metavar="FILE", help="SD1.5 checkpoint, or a folder of diffusers")
    source.add_argument("--upgraded", required=True, metavar="FILE", help="SDXL checkpoint, or a folder of diffusers")
    source.add_argument(
        "--data",
        required=True,
        metavar="SOURCE",
        help="a folder of pictures with .txt captions or metadata.jsonl, WebDataset shards (a path or a pattern in "
        "quotes), or parquet files",
    )
    source.add_argument(
        "--base-data",
        metavar="SOURCE",
        help="pictures of the same names that SD1.5 sees in their place, where it paints another world than SDXL",
    )
    source.add_argument("--out", type=Path, default=Path(OUT), metavar="DIR", help="default: %(default)s")
    source.add_argument("--init", metavar="FILE", help="mapping layers to go on from, instead of ones that add nothing")
    source.add_argument("--controlnet", metavar="FILE", help="of SD1.5, which --controlled pictures are seen with")
    source.add_argument("--depth", type=Path, metavar="DIR", help="an estimator of depth of transformers, for its maps")
    source.add_argument("--models-dir", type=Path, metavar="DIR", help="a WebUI's models/ folder, to name files from")
    source.add_argument("--tokenizer", type=Path, metavar="DIR", help="CLIP's vocab.json and merges.txt")
    source.add_argument("--cache", type=Path, metavar="DIR", help="keep latents and text embeddings here")
    source.add_argument("--minimum-size", type=int, default=0, metavar="N", help="pixels of a picture's shorter side")
    source.add_argument("--minimum-aesthetics", type=float, metavar="X", help="of LAION's column, where it is there")
    source.add_argument("--maximum-watermark", type=float, metavar="X", help="of LAION's column, where it is there")
    source.add_argument("--caption-column", metavar="NAME", help="where captions stand (default: the usual names)")
    _add_table(parser.add_argument_group("recipe: the defaults are the paper's"), Recipe)
    course = parser.add_argument_group("on the way")
    course.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out, to the bit")
    course.add_argument("--cpu", action="store_true", help="train on the CPU, whatever else there is")
    course.add_argument(
        "--validation-prompt", action="extend", nargs="+", default=[], metavar="TEXT", help="one or more"
    )
    course.add_argument("--validation-lora", metavar="FILE[:WEIGHT]", help="of SD1.5, for the base in validation grids")
    _add_table(course, Course)


def _add_table(group: Any, table: type) -> None:
    """An option for each field of a table of training."""
    for name, default in defaults(table).items():
        row = rows(table)[name]
        text = row.tooltip.replace("%", "%%")
        if isinstance(default, bool):
            group.add_argument(flag(name), action="store_true", help=text)
        elif row.choices:
            group.add_argument(flag(name), choices=row.choices, default=default, help=f"{text} Default: {default}.")
        elif isinstance(default, str):
            group.add_argument(flag(name), default=default, metavar="NAME", help=f"{text} Default: {default}.")
        else:
            expected = expectation(row, isinstance(default, int)).capitalize()
            group.add_argument(
                flag(name), type=_number, default=default, metavar="X", help=f"{text} {expected}; default: {default:g}."
            )


def _number(text: str) -> float | int:
    number = float(text)
    return int(number) if number.is_integer() else number
