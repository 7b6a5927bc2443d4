"""The mapping layers at full size by every path there is, beside the fastest that this machine multiplies matrices.

    python -m benchmarks.mapping_layers

One piece of work is what a joint step asks for: all three levels, from the base's features to their addition into the
upgraded model's. The floating-point operations are those of its convolutions.
"""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lib_xadapter.mapping import MappingLayers
from lib_xadapter.mapping_paths import MappingPath

from .mapping_candidates import CANDIDATES, ON_CPU, RELEASED_FORM, NotHere, candidate
from .random_adapter import picture_size, random_adapter, type_name, type_named, written_size
from .reports import Bar, Machine, Plot, Report, name_for, parser_for, turns_of
from .timing import Times

CEILING = "matrix product"
PIXELS_PER_FEATURE = (32, 16, 16)
"""Of the upgraded picture, to one of each level's base features."""
GROWTH = (1, 1, 2)
"""How much larger than its base feature a level's upgraded feature is."""
TIME_CHANNELS = 1280
WEIGHT = 0.01
"""Small, for some paths add into the same feature round after round."""


@dataclass(frozen=True)
class Case:
    """What is mapped: a batch of base features for pictures of one size, in one type."""

    size: tuple[int, int]
    rows: int
    dtype: torch.dtype

    @property
    def title(self) -> str:
        return f"{written_size(self.size)}, {self.rows} rows, {type_name(self.dtype)}"

    def base_features(self, channels: Sequence[int], device: torch.device | str) -> list[Tensor]:
        return [self._features(level, width, 1, device) for level, width in enumerate(channels)]

    def upgraded_features(self, channels: Sequence[int], device: torch.device | str) -> list[Tensor]:
        return [self._features(level, width, GROWTH[level], device) for level, width in enumerate(channels)]

    def _features(self, level: int, channels: int, growth: int, device: torch.device | str) -> Tensor:
        width, height = (growth * (pixels // PIXELS_PER_FEATURE[level]) for pixels in self.size)
        return torch.randn(self.rows, channels, height, width, dtype=self.dtype, device=device)


class OneStep:
    """What a joint step asks of a mapping path."""

    def __init__(self, path: MappingPath, case: Case, device: torch.device) -> None:
        self._path = path
        self._base = case.base_features(path.adapter.in_channels, device)
        self._upgraded = case.upgraded_features(path.adapter.out_channels, device)
        self._time_embedding = torch.zeros(case.rows, TIME_CHANNELS, dtype=case.dtype, device=device)

    @torch.no_grad()
    def __call__(self) -> None:
        for level, (base, upgraded) in enumerate(zip(self._base, self._upgraded, strict=True)):
            self._path.add(level, upgraded, self._path.hidden(level, base, self._time_embedding), WEIGHT)


class Product:
    """A product of square matrices, large enough that nothing but the multiplying takes time."""

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self._factors = [torch.randn(size, size, dtype=dtype, device=device) for _ in range(2)]
        self._product = torch.empty_like(self._factors[0])
        self.operations = 2 * size**3

    def __call__(self) -> None:
        torch.mm(*self._factors, out=self._product)


def operations(adapter: MappingLayers, case: Case) -> int:
    """Floating-point operations of a step."""
    on_meta = copy.deepcopy(adapter).to("meta")
    with FlopCounterMode(display=False) as counter:
        on_meta(case.base_features(adapter.in_channels, "meta"))
    return counter.get_total_flops()


@torch.no_grad()
def apart(path: MappingPath, other: MappingPath, case: Case, device: torch.device) -> float:
    """How far two paths' residuals are from each other: the largest relative L2 distance of any level."""
    time_embedding = torch.zeros(case.rows, TIME_CHANNELS, dtype=case.dtype, device=device)
    distances = []
    for level, feature in enumerate(case.base_features(path.adapter.in_channels, device)):
        ours, theirs = (
            each.residual(level, each.hidden(level, feature, time_embedding)).float() for each in (path, other)
        )
        distances.append(float((ours - theirs).norm() / theirs.norm()))
    return max(distances)


@dataclass(frozen=True)
class Measured:
    """A case, measured.

    Attributes:
        operations: of a step.
        product_operations: of the matrix product.
        times: by path, and of the matrix product.
        distances: from the released form, by path.
    """

    case: Case
    operations: int
    product_operations: int
    times: Mapping[str, Times]
    distances: Mapping[str, float]

    @property
    def ceiling(self) -> float:
        """TFLOP/s of the matrix product."""
        return self.product_operations / self.times[CEILING].spread.median / 1e12

    @property
    def paths(self) -> list[str]:
        return [name for name in self.times if name != CEILING]

    def speed(self, path: str) -> float:
        """TFLOP/s."""
        return self.operations / self.times[path].spread.median / 1e12

    def rows(self) -> list[dict[str, object]]:
        return [
            {
                "case": self.case.title,
                "path": path,
                "seconds": self.times[path].spread,
                "TFLOP/s": self.speed(path),
                "of the ceiling": self.speed(path) / self.ceiling,
                "times as fast": self.times[RELEASED_FORM].over(self.times[path]),
                "apart": self.distances[path],
            }
            for path in self.paths
        ]

    def bars(self) -> list[Bar]:
        return [Bar(path, self.times[path].spread) for path in self.paths]


def measure(case: Case, adapter: MappingLayers, options: argparse.Namespace, not_run: dict[str, str]) -> Measured:
    """One case; what cannot run is noted with its reason."""
    # what was compiled for the last case would count against how often torch.compile is ready to compile
    torch._dynamo.reset()
    paths: dict[str, MappingPath] = {}
    for name in dict.fromkeys([RELEASED_FORM, *options.paths]):
        try:
            paths[name] = candidate(name, adapter)
        except NotHere as reason:
            not_run[f"{name}, {type_name(case.dtype)}"] = str(reason)
    distances = {name: apart(path, paths[RELEASED_FORM], case, options.device) for name, path in paths.items()}
    product = Product(options.product, case.dtype, options.device)
    works = {name: OneStep(path, case, options.device) for name, path in paths.items()} | {CEILING: product}
    times = turns_of(options).times(works)
    return Measured(case, operations(adapter, case), product.operations, times, distances)


def main(arguments: Sequence[str] | None = None) -> None:
    options = read_options(arguments)
    machine, not_run, measured = Machine.here(options.device), {}, []
    for dtype in options.types:
        adapter = random_adapter(dtype, options.small).to(options.device)
        for size, rows in itertools.product(options.sizes, options.rows):
            measured.append(measure(Case(size, rows, dtype), adapter, options, not_run))
            report_of(measured, not_run, machine, options).write(options.out)
    report_of(measured, not_run, machine, options).publish(options.out)


def report_of(
    measured: Sequence[Measured], not_run: Mapping[str, str], machine: Machine, options: argparse.Namespace
) -> Report:
    return Report(
        name=name_for("mapping_layers", options),
        question="Mapping layers for one joint step, by path",
        machine=machine,
        options=vars(options),
        rows=[row for found in measured for row in found.rows()],
        result={f"ceiling, {found.case.title}, TFLOP/s": found.ceiling for found in measured},
        plot=Plot("seconds", {found.case.title: found.bars() for found in measured}),
        not_run=not_run,
    )


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_for(__doc__, rounds=5)
    parser.add_argument("--paths", nargs="+", choices=CANDIDATES, help="default: all that could run on the device")
    parser.add_argument("--types", nargs="+", type=type_named, help="default: halves on a GPU, float32 on the CPU")
    parser.add_argument("--sizes", nargs="+", type=picture_size, metavar="WxH", help="default: 1024x1024 832x1216")
    parser.add_argument("--rows", nargs="+", type=int, help="in the batch, CFG included (default: 2 8, on the CPU 2)")
    parser.add_argument("--product", type=int, metavar="SIZE", help="of the matrices (default: 8192, on the CPU 2048)")
    options = parser.parse_args(arguments)
    gpu = options.device.type == "cuda"
    options.paths = options.paths or list(CANDIDATES if gpu else ON_CPU)
    options.types = options.types or ([torch.float16, torch.bfloat16] if gpu else [torch.float32])
    options.sizes = options.sizes or ([(128, 128)] if options.small else [(1024, 1024), (832, 1216)])
    options.rows = options.rows or ([2, 8] if gpu and not options.small else [2])
    options.product = options.product or (8192 if gpu else 512 if options.small else 2048)
    return options


if __name__ == "__main__":
    main()
