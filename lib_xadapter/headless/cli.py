"""`python -m lib_xadapter`: demo, generate, evaluate, train, miniature, inspect, convert."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys

from ..errors import XAdapterError
from .options import EXIT_WRONG, make_parser, read_options

EXIT_INTERRUPTED = 130


def main(arguments: list[str] | None = None) -> int:
    """Run a command; gives the exit status: 2 where the user can mend what is wrong, 130 after Ctrl-C."""
    options = read_options(arguments)
    logging.basicConfig(format="%(message)s")
    stay_offline()
    try:
        return _run(options)
    except XAdapterError as error:
        sys.stderr.write(f"{make_parser().prog} {options.command}: {' '.join(str(error).split())}\n")
        return EXIT_WRONG
    except KeyboardInterrupt:
        sys.stderr.write("\nInterrupted; what was finished is kept.\n")
        return EXIT_INTERRUPTED


def program() -> None:
    """The program itself; ends with the command's exit status."""
    # whoever ends it gets what Ctrl-C gets: nothing half-written
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())


def stay_offline() -> None:
    """No library may fetch anything, whatever is missing; to be called before any of them is imported."""
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")


def round_alike() -> None:
    """Sums on the CPU are the same wherever tensors lie in memory, and made by as many threads each time, which Intel's
    MKL leaves open unless told before it is loaded: trainings go on to the bit, several processes learn what one does.
    """
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
    os.environ.setdefault("MKL_DYNAMIC", "FALSE")


def _run(options: argparse.Namespace) -> int:
    # each command imports what it needs: inspecting a file takes no diffusers
    if options.command == "inspect":
        from .inspection import inspect_file

        return inspect_file(options)
    if options.command == "convert":
        from .conversion import convert_adapter

        return convert_adapter(options)
    if options.command == "evaluate":
        from ..evaluation.evaluate_command import read_evaluation

        evaluation = read_evaluation(options)
        from ..evaluation.program import evaluate

        return evaluate(options, evaluation)
    if options.command == "generate":
        from .generate_command import read_generate_command

        command = read_generate_command(options)
        from .generate import generate

        return generate(options, command)
    if options.command == "train":
        round_alike()
        from ..training.program import train

        return train(options)
    if options.command == "miniature":
        from ..miniature.program import miniature

        return miniature(options)
    if options.ui:
        from ..demo.page import open_page

        return open_page(options)
    from ..demo.program import run_demo

    return run_demo(options)
