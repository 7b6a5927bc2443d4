"""On a real WebUI: seconds for a joint step beside the host's own steps, and what X-Adapter costs while it is off.

    WEBUI_DIR=... WEBUI_PYTHON=... python -m benchmarks.webui_step

Starts three servers in data folders of their own: with the extension, and twice without it, so that two equal servers
show how alike two ratios can be here. Time for a step is that of a long picture less that of a short one. With --models
and --gpu the servers run your own checkpoints on the GPU; otherwise the tests' small ones on the CPU.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib_xadapter.settings import LOCKSTEP
from tests.webui.server import (
    BASE_CHECKPOINT,
    UPGRADED_CHECKPOINT,
    Installation,
    WebUIError,
    WebUIServer,
    small_models,
)

from .reports import Bar, Machine, Plot, Report, name_for, parser_for
from .timing import PROCESSOR, Times

ON_CPU_ONLY = ("--skip-torch-cuda-test", "--use-cpu", "all", "--no-half", "--precision", "full")
INSTALLED, NOT_INSTALLED, AGAIN = "installed, off", "not installed", "not installed, again"
UPGRADED, BASE, JOINT = "SDXL", "SD1.5", "joint"


class GpuServer(WebUIServer):
    """A WebUI that may use the GPU."""

    def command(self) -> list[str]:
        return [part for part in super().command() if part not in ON_CPU_ONLY]


@dataclass(frozen=True)
class Asked:
    """A server, and what it is asked for.

    Attributes:
        server: started.
        clock: "wall" for the time that its answer takes, "processor" for what its process was given.
        payload: of every request.
    """

    server: WebUIServer
    clock: str
    payload: Mapping[str, Any]

    def seconds(self, **more: Any) -> float:
        """What a picture takes."""
        begin = self._now()
        answer = self.server.txt2img(**{**self.payload, **more})
        if answer.status != 200:
            raise WebUIError(f"the WebUI answered {answer.status}: {answer.error}")
        return self._now() - begin

    def seconds_a_step(self, few: int, many: int) -> float:
        short = self.seconds(steps=few)
        return (self.seconds(steps=many) - short) / (many - few)

    def _now(self) -> float:
        if self.clock != PROCESSOR:
            return time.perf_counter()
        return time.clock_gettime(processor_clock_of(self.server.process.pid))


def processor_clock_of(process: int) -> int:
    """The clock of the processor time of all of a process's threads, as Linux numbers it (clock_getcpuclockid)."""
    return (~process << 3) | 2


def in_turns(works: Mapping[str, Callable[[], float]], rounds: int, warm_up: int) -> dict[str, Times]:
    """Each work once a round, beginning with another one each time; a work tells itself how long it took."""
    taken: dict[str, list[float]] = {name: [] for name in works}
    names = list(works)
    for turn in range(-warm_up, rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            seconds = works[name]()
            if turn >= 0:
                taken[name].append(seconds)
    return {name: Times(tuple(seconds)) for name, seconds in taken.items()}


def off_or_not_there(servers: Mapping[str, WebUIServer], options: argparse.Namespace) -> dict[str, Times]:
    """The same picture from every server, X-Adapter not asked for."""
    payload = picture(options.cheap_size, options.cheap_steps)
    asked = {name: Asked(server, options.clock, payload) for name, server in servers.items()}
    return in_turns({name: each.seconds for name, each in asked.items()}, options.cheap_rounds, options.warm_up)


def steps(servers: Mapping[str, WebUIServer], options: argparse.Namespace) -> dict[str, Times]:
    """A step of SDXL, of SD1.5 at half the size, and a joint one, each as the WebUI takes it."""
    arguments = {"base_checkpoint": options.base, "adapter": options.adapter, "single_stage": True, "memory": LOCKSTEP}
    joint = {"alwayson_scripts": {"X-Adapter": {"args": [arguments]}}}
    # a server of its own, for changing checkpoints takes longer than any step
    base_alone = {
        "override_settings": {"sd_model_checkpoint": options.base},
        "override_settings_restore_afterwards": False,
    }
    asked = {
        UPGRADED: Asked(servers[NOT_INSTALLED], options.clock, picture(options.size)),
        BASE: Asked(servers[AGAIN], options.clock, {**picture(options.size // 2), **base_alone}),
        JOINT: Asked(servers[INSTALLED], options.clock, {**picture(options.size), **joint}),
    }
    works = {name: lambda each=each: each.seconds_a_step(*options.steps) for name, each in asked.items()}
    return in_turns(works, options.rounds, options.warm_up)


def picture(size: int, number_of_steps: int = 1) -> dict[str, Any]:
    return {
        "prompt": "a cat",
        "width": size,
        "height": size,
        "steps": number_of_steps,
        "seed": 7,
        "sampler_name": "Euler",
        "cfg_scale": 7,
        "save_images": False,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    options = read_options(arguments)
    installation = Installation.from_environment()
    if installation is None:
        raise SystemExit("WEBUI_DIR names no WebUI")
    machine = Machine.here(options.device)
    models = options.models or small_models(installation)
    kind = GpuServer if options.gpu else WebUIServer
    with ExitStack() as scope:
        folder = Path(scope.enter_context(tempfile.TemporaryDirectory()))
        servers = {
            name: scope.enter_context(
                kind(
                    installation,
                    folder / name.replace(", ", "-").replace(" ", "-"),
                    [models],
                    extension=name == INSTALLED,
                    options={"sd_model_checkpoint": options.upgraded},
                )
            )
            for name in (INSTALLED, NOT_INSTALLED, AGAIN)
        }
        # before anything makes the one load what the others have not
        off = off_or_not_there(servers, options)
        taken = steps(servers, options)
    parts = taken[UPGRADED] + taken[BASE]
    taken = {**taken, "SDXL + SD1.5": parts}
    Report(
        name=name_for("webui_step", options, *(["processor-time"] if options.clock == PROCESSOR else [])),
        question="On the real WebUI: a step, and a whole picture with X-Adapter off",
        machine=machine,
        options=vars(options),
        rows=[
            *({"what": f"a step: {name}", "seconds": each.spread} for name, each in taken.items()),
            *({"what": f"a picture: {name}", "seconds": each.spread} for name, each in off.items()),
        ],
        result={
            "off over not installed": off[INSTALLED].over(off[NOT_INSTALLED]),
            "not installed again over not installed": off[AGAIN].over(off[NOT_INSTALLED]),
            "off over not installed, of all rounds together": total(off[INSTALLED]) / total(off[NOT_INSTALLED]),
            "not installed again, of all rounds together": total(off[AGAIN]) / total(off[NOT_INSTALLED]),
            "joint step over SDXL's": taken[JOINT].over(taken[UPGRADED]),
            "joint step over SDXL's and SD1.5's": taken[JOINT].over(parts),
        },
        plot=Plot(
            "seconds",
            {
                "a step": [Bar(name, each.spread) for name, each in taken.items()],
                "a picture with X-Adapter off": [Bar(name, each.spread) for name, each in off.items()],
            },
        ),
    ).publish(options.out)


def total(times: Times) -> float:
    return sum(times.seconds)


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_for(__doc__, rounds=5)
    parser.add_argument("--gpu", action="store_true", help="let the WebUI use the GPU")
    parser.add_argument("--models", type=Path, metavar="DIR", help="laid out as a WebUI's folder: models/, embeddings/")
    parser.add_argument("--upgraded", default=UPGRADED_CHECKPOINT, help="SDXL checkpoint (default: %(default)s)")
    parser.add_argument("--base", default=BASE_CHECKPOINT, help="SD1.5 checkpoint (default: %(default)s)")
    parser.add_argument("--adapter", default="tiny.safetensors", help="default: %(default)s")
    parser.add_argument("--size", type=int, default=256, help="of pictures that steps are timed in (default: 256)")
    parser.add_argument("--steps", type=int, nargs=2, default=(2, 12), help="of these (default: 2 12)")
    parser.add_argument("--cheap-size", type=int, default=64, help="of pictures made with X-Adapter off (default: 64)")
    parser.add_argument("--cheap-steps", type=int, default=4, help="of these (default: 4)")
    parser.add_argument("--cheap-rounds", type=int, default=60, help="of these (default: 60)")
    options = parser.parse_args(arguments)
    if options.small:
        options.rounds, options.cheap_rounds = 1, 3
    return options


if __name__ == "__main__":
    main()
