"""What each mode needs of the device's memory at once: weights everywhere, and all there is on an NVIDIA GPU.

    python -m benchmarks.peak_memory

Full-size models with random weights walk through a single-stage picture on the diffusers host. Weights are counted
where that host moves them: parameters and buffers of all modules that it holds on the device at the same time. What
UNets make in passing is only known on a GPU, from torch's own counters.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from lib_xadapter.headless.models import Models, Placement
from lib_xadapter.headless.pipeline import TwoStages
from lib_xadapter.memory import Work, size_of
from lib_xadapter.recording import LeastRecentlyUsed
from lib_xadapter.settings import LOCKSTEP, RECORDED, Settings, half

from .random_adapter import picture_size, type_name, type_named, written_size
from .random_models import random_models, random_request
from .reports import Bar, Machine, Plot, Report, name_for, parser_for
from .timing import Spread

ALONE = "SDXL alone"
MODES = {ALONE: Settings(weight=0.0), LOCKSTEP: Settings(memory=LOCKSTEP), RECORDED: Settings(memory=RECORDED)}
GIGABYTE = 1e9


@dataclass
class Held:
    """The modules on the device, and the most that they have been at once."""

    modules: dict[nn.Module, int] = field(default_factory=dict)
    most: int = 0
    together: tuple[str, ...] = ()
    """Classes of the modules that were the most."""

    def come(self, modules: Sequence[nn.Module]) -> None:
        self.modules |= {module: size_of(module) for module in modules}
        now = sum(self.modules.values())
        if now > self.most:
            self.most, self.together = now, tuple(type(module).__name__ for module in self.modules)

    def go(self, modules: Sequence[nn.Module]) -> None:
        for module in modules:
            self.modules.pop(module, None)


@dataclass(frozen=True)
class CountingPlacement(Placement):
    """A placement that counts what it holds."""

    held: Held = field(default_factory=Held)

    @contextmanager
    def holding(self, *modules: nn.Module | None) -> Iterator[None]:
        moved = [module for module in modules if module is not None]
        self.held.come(moved)
        with super().holding(*moved):
            yield
        if self.low_memory:
            self.held.go(moved)


@dataclass(frozen=True)
class Needed:
    """What a mode needs, in bytes.

    Attributes:
        weights: on the device at once.
        together: what they belong to.
        peak: everything on the device, by torch's counter; None where there is none.
        host: recorded features in host memory, for each step.
    """

    weights: int
    together: tuple[str, ...]
    peak: int | None
    host: float


def need(models: Models, mode: str, size: tuple[int, int], steps: int) -> Needed:
    """A mode, walked through; everything is on the CPU before and after."""
    settings = dataclasses.replace(MODES[mode], single_stage=True)
    placement = CountingPlacement(models.placement.device, models.placement.dtype)
    # what `share_the_device` makes of "auto" where not everything fits
    low = mode == RECORDED
    models = dataclasses.replace(models, placement=dataclasses.replace(placement, low_memory=low))
    device = torch.device(placement.device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    stages = TwoStages(models)
    request = random_request(models, size, settings, steps)
    recordings = LeastRecentlyUsed(lambda: 2**40)
    stages.upgraded_latents(request, None, recordings)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    for module in (models.base.unet, models.upgraded.unet, models.adapter):
        module.to("cpu")
    found = recordings.find(stages.plan(request, stages.joint_steps_of(request)).recording_key)
    host = found.size / len(found.steps) if found is not None else 0.0
    return Needed(placement.held.most, placement.held.together, peak, host)


def main(arguments: Sequence[str] | None = None) -> None:
    options = read_options(arguments)
    machine = Machine.here(options.device)
    models = random_models(options.type, Placement(str(options.device), options.type), options.small)
    needed = {mode: need(models, mode, options.size, options.steps) for mode in MODES}
    width, height = options.size
    estimated = Work(2, width * height, half(width) * half(height)).memory(overlapped=True)
    shown = "peak on the GPU" if options.device.type == "cuda" else "weights on the device"
    Report(
        name=name_for("peak_memory", options),
        question=f"Memory of each mode, {written_size(options.size)}, {type_name(options.type)}",
        machine=machine,
        options=vars(options),
        rows=[row(mode, found) for mode, found in needed.items()],
        result={
            "adapter, GB": size_of(models.adapter) / GIGABYTE,
            "recorded beyond SDXL alone, GB": (seen(needed[RECORDED]) - seen(needed[ALONE])) / GIGABYTE,
            "lockstep beyond SDXL alone, GB": (seen(needed[LOCKSTEP]) - seen(needed[ALONE])) / GIGABYTE,
            "estimated for a joint step beside the weights, GB": estimated / GIGABYTE,
            **measured_beside_weights(needed),
            "recorded features, MB for each CFG half and step": needed[RECORDED].host / 2e6,
        },
        plot=Plot("GB", {shown: [bar(mode, seen(found)) for mode, found in needed.items()]}),
        not_run={} if options.device.type == "cuda" else {"peak on the GPU": "needs a GPU"},
    ).publish(options.out)


def measured_beside_weights(needed: Mapping[str, Needed]) -> dict[str, float]:
    """What a joint step made in passing, to hold the estimate against; nothing where that is not known."""
    lockstep = needed[LOCKSTEP]
    if lockstep.peak is None:
        return {}
    return {"measured for a joint step beside the weights, GB": (lockstep.peak - lockstep.weights) / GIGABYTE}


def seen(needed: Needed) -> int:
    """The figure to compare: everything, where that is known, else the weights."""
    return needed.weights if needed.peak is None else needed.peak


def bar(mode: str, size: int) -> Bar:
    return Bar(mode, Spread.of([size / GIGABYTE]))


def row(mode: str, needed: Needed) -> dict[str, object]:
    return {
        "mode": mode,
        "weights on the device, GB": needed.weights / GIGABYTE,
        "of": " + ".join(needed.together),
        "peak on the GPU, GB": "not run" if needed.peak is None else needed.peak / GIGABYTE,
        "host, MB a step": needed.host / 1e6,
    }


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_for(__doc__, rounds=1)
    parser.add_argument("--type", type=type_named, help="default: float16 on a GPU, on the CPU bfloat16: as large")
    parser.add_argument("--size", type=picture_size, metavar="WxH", help="default: 1024x1024")
    parser.add_argument("--steps", type=int, default=2, help="default: %(default)s")
    options = parser.parse_args(arguments)
    gpu = options.device.type == "cuda"
    options.type = options.type or (torch.float16 if gpu else torch.bfloat16)
    options.size = options.size or ((128, 128) if options.small else (1024, 1024))
    return options


if __name__ == "__main__":
    main()
