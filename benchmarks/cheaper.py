"""What `refresh_every` and `cond_only` save, and how far from the full result they end.

    python -m benchmarks.cheaper                    whole pictures by the demo's small models
    python -m benchmarks.cheaper --full-size        UNets at full size with random weights, latents only
    python -m benchmarks.cheaper --upgraded FILE --base FILE --adapter FILE     your own models

Time is that of the joint stage. Distances are to the same picture at `refresh_every: 1`, beside that of a picture
without an adapter. Random weights tell what is saved; how much of a real picture is kept, trained ones alone can tell.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy
import torch
from PIL import Image
from torch import Tensor

from lib_xadapter import load_adapter
from lib_xadapter.headless.job import Job
from lib_xadapter.headless.jobs import request_of
from lib_xadapter.headless.model_files import load_base, load_upgraded
from lib_xadapter.headless.models import Models, Placement
from lib_xadapter.headless.pipeline import Request, TwoStages
from lib_xadapter.settings import Settings
from tests.small_models import make_small_models

from .random_adapter import picture_size, type_name, type_named, written_size
from .random_models import random_models, random_request
from .reports import Bar, Machine, Plot, Report, name_for, parser_for, turns_of
from .timing import Spread, Times

FULL, WITHOUT = "refresh_every 1", "no adapter"
VARIANTS: Mapping[str, Settings] = {
    FULL: Settings(),
    "refresh_every 2": Settings(refresh_every=2),
    "refresh_every 3": Settings(refresh_every=3),
    "refresh_every 5": Settings(refresh_every=5),
    "cond_only": Settings(cond_only=True),
    "refresh_every 2, cond_only": Settings(refresh_every=2, cond_only=True),
    WITHOUT: Settings(weight=0.0),
}


@dataclass(frozen=True)
class Subject:
    """Something to be made in every variant.

    Attributes:
        stages: with its models.
        finished: of the base; None for a single stage.
        size: in pixels.
        request: makes a new request, for its noise generators move on.
        has_pictures: whether latents can be decoded.
    """

    stages: TwoStages
    finished: Tensor | None
    size: tuple[int, int]
    request: Callable[[Settings], Request]
    has_pictures: bool

    def latents(self, settings: Settings) -> Tensor:
        """The finished latents, (1, 4, h, w)."""
        return self.stages.upgraded_latents(self.request(settings), self.finished)

    def picture(self, latents: Tensor) -> Image.Image | None:
        return self.stages.upgraded_pictures(latents)[0] if self.has_pictures else None


@dataclass(frozen=True)
class Made:
    """What came out."""

    latents: Tensor
    picture: Image.Image | None


@dataclass(frozen=True)
class Distance:
    """From one result to another.

    Attributes:
        latents: relative L2 distance.
        mean, largest: difference of the pictures in grey levels, None without pictures.
    """

    latents: float
    mean: float | None = None
    largest: float | None = None

    @classmethod
    def between(cls, made: Made, full: Made) -> Distance:
        latents = float((made.latents - full.latents).norm() / full.latents.norm())
        if made.picture is None or full.picture is None:
            return cls(latents)
        levels = abs(numpy.asarray(made.picture, dtype=float) - numpy.asarray(full.picture, dtype=float))
        return cls(latents, float(levels.mean()), float(levels.max()))


def distances(subject: Subject) -> dict[str, Distance]:
    """Each variant's distance from the full result."""
    made = {}
    for name, settings in VARIANTS.items():
        latents = subject.latents(replace(settings, single_stage=subject.finished is None))
        made[name] = Made(latents, subject.picture(latents))
    return {name: Distance.between(variant, made[FULL]) for name, variant in made.items()}


def joint_stage_times(subject: Subject, options: argparse.Namespace) -> dict[str, Times]:
    """Of each variant; the base's picture, its way through the VAEs and the prompts are left out."""
    works = {}
    for name, settings in VARIANTS.items():
        settings = replace(settings, single_stage=subject.finished is None)
        works[name] = lambda settings=settings: _joint_stage(subject, settings)
    return turns_of(options).times(works)


def _joint_stage(subject: Subject, settings: Settings) -> None:
    request = subject.request(settings)
    steps = subject.stages.joint_steps_of(request)
    latents = request.noise.upgraded() * steps.scheduler.init_noise_sigma
    subject.stages.joint_stage(request, subject.finished, latents.to(steps.timesteps.device), steps)


def at_full_size(options: argparse.Namespace) -> list[Subject]:
    """A single stage from noise for each seed: there are no VAEs that a first picture could go through."""
    models = random_models(options.type, Placement(str(options.device), options.type), options.small)

    def subject(seed: int) -> Subject:
        def request(settings: Settings) -> Request:
            return random_request(models, options.size, settings, options.steps, options.sampler, seed)

        return Subject(TwoStages(models), None, options.size, request, has_pictures=False)

    return [subject(seed) for seed in range(options.seeds)]


def whole_pictures(models: Models, options: argparse.Namespace) -> list[Subject]:
    """Both stages for each seed."""
    width, height = options.size

    def subject(seed: int) -> Subject:
        job = Job("a cat", "fog", Settings(), width, height, options.steps, sampler=options.sampler, seed=seed)
        stages = TwoStages(models)

        def request(settings: Settings) -> Request:
            return request_of(models, job, settings)

        return Subject(stages, stages.base_latents(request(Settings())), options.size, request, has_pictures=True)

    return [subject(seed) for seed in range(options.seeds)]


def loaded(options: argparse.Namespace) -> Models:
    """The user's models, or the demo's small ones."""
    placement = Placement(str(options.device), options.type)
    if options.upgraded:
        upgraded, base = load_upgraded(options.upgraded, options.type), load_base(options.base, options.type)
        return Models(base, upgraded, load_adapter(options.adapter, dtype=options.type), placement=placement)
    with tempfile.TemporaryDirectory() as folder:
        small = make_small_models(Path(folder))
        base, upgraded = (
            load(path, options.type, small.tokenizer)
            for load, path in ((load_base, small.base), (load_upgraded, small.upgraded))
        )
        return Models(base, upgraded, load_adapter(small.adapter, dtype=options.type), placement=placement)


def main(arguments: Sequence[str] | None = None) -> None:
    options = read_options(arguments)
    machine = Machine.here(options.device)
    subjects = at_full_size(options) if options.full_size else whole_pictures(loaded(options), options)
    found = [distances(subject) for subject in subjects]
    times = joint_stage_times(subjects[0], options)
    kind = "full-size" if options.full_size else "own-models" if options.upgraded else "small-models"
    Report(
        name=name_for("cheaper", options, kind),
        question=f"What cheaper settings save and keep: {kind.replace('-', ' ')}, {written_size(options.size)}, "
        f"{options.steps} steps, {type_name(options.type)}",
        machine=machine,
        options=vars(options),
        rows=[row(name, times, [each[name] for each in found]) for name in VARIANTS],
        result={f"{name}: time of the joint stage": times[name].over(times[FULL]) for name in VARIANTS},
        plot=Plot(
            "",
            {
                "time of the joint stage, of that at refresh_every 1": [
                    Bar(name, times[name].over(times[FULL])) for name in VARIANTS
                ],
                "relative L2 distance of the latents": [
                    Bar(name, Spread.of(each[name].latents for each in found)) for name in VARIANTS
                ],
            },
        ),
    ).publish(options.out)


def row(name: str, times: Mapping[str, Times], found: Sequence[Distance]) -> dict[str, object]:
    cells: dict[str, object] = {
        "variant": name,
        "joint stage, seconds": times[name].spread,
        "of the full time": times[name].over(times[FULL]),
        "latents apart": Spread.of(each.latents for each in found),
    }
    if found[0].mean is None:
        return cells
    return {
        **cells,
        "grey levels apart, mean": Spread.of(each.mean for each in found),
        "at most": max(each.largest for each in found),
    }


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_for(__doc__, rounds=5)
    parser.add_argument("--full-size", action="store_true", help="UNets at full size with random weights")
    parser.add_argument("--upgraded", metavar="FILE", help="SDXL checkpoint, with")
    parser.add_argument("--base", metavar="FILE", help="an SD1.5 checkpoint and")
    parser.add_argument("--adapter", metavar="FILE", help="an adapter")
    parser.add_argument("--type", type=type_named, help="default: float16 on a GPU, float32 on the CPU")
    parser.add_argument("--size", type=picture_size, metavar="WxH", help="default: 1024x1024, small models 512x512")
    parser.add_argument("--steps", type=int, help="default: 20")
    parser.add_argument("--sampler", default="DPM++ 2M", help="default: %(default)s")
    parser.add_argument("--seeds", type=int, help="pictures (default: 8)")
    options = parser.parse_args(arguments)
    if options.upgraded and not (options.base and options.adapter):
        parser.error("--upgraded needs --base and --adapter")
    large = options.full_size or options.upgraded
    usual = {
        "type": torch.float16 if options.device.type == "cuda" else torch.float32,
        "size": (128, 128) if options.small else (1024, 1024) if large else (512, 512),
        "steps": 6 if options.small else 20,
        "seeds": 1 if options.small else 8,
    }
    for name, value in usual.items():
        setattr(options, name, getattr(options, name) or value)
    return options


if __name__ == "__main__":
    main()
