"""The options of `miniature`. Nothing heavy is imported."""

from __future__ import annotations

import argparse
from pathlib import Path

from .stages import HOURS, STAGES

OUT = "xadapter-miniature"


def add_miniature(parser: argparse.ArgumentParser) -> None:
    """Give a sub-command the options of `miniature`."""
    parser.add_argument("--out", type=Path, default=Path(OUT), metavar="DIR", help="default: %(default)s")
    parser.add_argument(
        "--stage", action="extend", nargs="+", default=[], choices=STAGES, help="these alone, one after the other"
    )
    parser.add_argument("--list", action="store_true", help="say which stages there are and which are done")
    parser.add_argument("--workers", type=int, default=2, help="stages at once, a core each; default: %(default)s")
    parser.add_argument(
        "--hours", type=float, default=HOURS, help="what all may take on two cores; default: %(default)g"
    )
    parser.add_argument(
        "--share", type=float, default=1.0, help="of all steps and pictures, to try it out; default: %(default)g"
    )
    parser.add_argument(
        "--webui",
        type=Path,
        metavar="DIR",
        help="lay the models of --out, or those that come with the package, out for the WebUI whose folder this is",
    )
    parser.add_argument(
        "--held-out",
        type=Path,
        metavar="DIR",
        help="write captions of scenes that no model has seen, with pictures of both worlds, for evaluate --captions",
    )
    parser.add_argument("--pictures", type=int, default=512, metavar="N", help="how many of them; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
