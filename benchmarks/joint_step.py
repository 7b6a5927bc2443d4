"""A joint step at full size with random weights, beside SDXL alone and beside the sum of its parts.

    python -m benchmarks.joint_step

A step is one model evaluation of SDXL with CFG, with what X-Adapter asks for beside it: the base with CFG at half the
size, and the mapping layers. The sampler's own arithmetic is left out everywhere.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from lib_xadapter.evaluations import Evaluation
from lib_xadapter.feature_sources import BaseStep, FeatureSource, Lockstep
from lib_xadapter.headless.models import Models, Placement, noise_schedule_of
from lib_xadapter.headless.pipeline import Request
from lib_xadapter.joint_stage import Coupling, JointStage
from lib_xadapter.mapping_paths import MappingPath
from lib_xadapter.overlap import Overlap, SideStream
from lib_xadapter.recording import Playback, Recording, record
from lib_xadapter.settings import Settings
from lib_xadapter.taps import read_features
from lib_xadapter.trajectory import Trajectory
from tests.guided_unets import GuidedUnet, LockstepBase

from .mapping_candidates import AS_USED, CANDIDATES, candidate
from .mapping_layers import Case, OneStep
from .random_adapter import picture_size, type_name, type_named, written_size
from .random_models import GUIDANCE, random_models, random_prompts, random_request
from .reports import Bar, Machine, Plot, Report, name_for, parser_for, turns_of
from .timing import Times, Work

UPGRADED, BASE, MAPPING = "SDXL alone", "SD1.5 alone", "mapping layers alone"
SERIAL, OVERLAPPED = "joint, one after the other", "joint, overlapped"
BEFORE, AFTER = "recorded: SD1.5 before", "recorded: SDXL after"
TIMESTEPS = range(960, 0, -40)
"""Where the steps of a picture stand in the noise schedule; taken again from the first when they are through."""


class SameStream:
    """An `Overlap` of which nothing is left but the order in which work is queued: what a stream of its own gains."""

    def begin(self) -> None:
        """There is one stream."""

    def on_side_stream(self) -> AbstractContextManager[None]:
        return nullcontext()

    def finished(self) -> None:
        """What comes later is later."""

    def wait_for(self, event: object, tensor: Tensor) -> None:
        """What comes later is later."""

    def end(self) -> None:
        """There is one stream."""


class Steps:
    """Works that each do one step, or a part of one, at the next noise level every time.

    Args:
        models: on their device.
        request: one picture.
        mapping: how the mapping layers are run.
    """

    def __init__(self, models: Models, request: Request, mapping: MappingPath) -> None:
        self._models = models
        self._device = torch.device(models.placement.device)
        self._mapping = mapping
        self._weights = request.settings.weights
        base, upgraded = random_prompts(models, request.size, images=request.images)
        self._upgraded = GuidedUnet(models.upgraded.unet, upgraded, GUIDANCE)
        self._base = GuidedUnet(models.base.unet, base, GUIDANCE)
        self._schedule = noise_schedule_of(models.upgraded)
        self._noise = request.noise.base().to(self._device)
        self._latent = request.noise.upgraded().to(self._device)
        self._recording: Recording | None = None

    def works(self, case: Case) -> dict[str, Work]:
        """By name; `case` is what the mapping layers get alone."""
        joint = {SERIAL: self.joint(overlapped=False)}
        if self._device.type == "cuda":
            joint[OVERLAPPED] = self.joint(overlapped=True)
        alone = {
            UPGRADED: lambda: self._upgraded.predict(self._latent, TIMESTEPS[0]),
            BASE: lambda: self._base.predict(self._noise, TIMESTEPS[0]),
            MAPPING: OneStep(self._mapping, case, self._device),
        }
        return {**alone, **joint, BEFORE: self.recorded(), AFTER: self.played_back}

    def joint(self, overlapped: bool) -> Work:
        """Base and upgraded model in lockstep."""
        evaluations, source = self._evaluations(), self._lockstep()
        overlap = self._overlap(overlapped)
        stage = self._stage(source, overlap)

        def work() -> None:
            self._step(stage, next(evaluations))
            if overlap is not None:
                overlap.end()

        return work

    def _overlap(self, overlapped: bool) -> Overlap | None:
        if self._device.type != "cuda":
            return None
        return SideStream(self._device) if overlapped else SameStream()

    def recorded(self) -> Work:
        """The base alone, its features brought into host memory."""
        evaluations, source = self._evaluations(), self._lockstep()

        def work() -> None:
            self._recording = record(source, [next(evaluations)])

        return work

    def played_back(self) -> None:
        """The upgraded model with what was recorded last."""
        if self._recording is None:
            self.recorded()()
        evaluation = Evaluation(self._recording.steps[0].sigma, 0, 0.5)
        self._step(self._stage(Playback(self._recording, self._device), None), evaluation)

    def _stage(self, source: FeatureSource, overlap: Overlap | None) -> JointStage:
        return JointStage(source, Coupling(self._mapping, self._weights), overlap)

    @torch.no_grad()
    def _step(self, stage: JointStage, evaluation: Evaluation) -> Tensor:
        rows = self._upgraded.rows
        with stage.evaluate(evaluation, rows).fused_into(self._models.upgraded.unet, slice(0, len(rows))):
            scaled = self._latent / math.sqrt(1 + evaluation.sigma**2)
            return self._upgraded.predict(scaled, self._schedule.timestep_at(evaluation.sigma))

    def _lockstep(self) -> Lockstep:
        return Lockstep(self._evaluate_base, Trajectory(self._noise))

    def _evaluate_base(self, latent: Tensor, evaluation: Evaluation) -> BaseStep:
        # the reader is taken away again, so that the base alone is measured without it
        with read_features(self._models.base.unet) as reader:
            return LockstepBase(self._base, self._schedule, "epsilon", reader)(latent, evaluation)

    def _evaluations(self) -> Iterator[Evaluation]:
        for timestep in itertools.cycle(TIMESTEPS):
            yield Evaluation(self._schedule.sigma_at(timestep), 0, 0.5)


def modes(times: Mapping[str, Times]) -> dict[str, Times]:
    """What a step costs in each mode, everything counted."""
    joint = {name: times[name] for name in (SERIAL, OVERLAPPED) if name in times}
    return {**joint, "joint, recorded": times[BEFORE] + times[AFTER], "joint, recorded before": times[AFTER]}


def measure(case: Case, options: argparse.Namespace) -> dict[str, Times]:
    """The works of one case in turns; models are given up at the end."""
    models = random_models(case.dtype, Placement(str(options.device), case.dtype), options.small)
    request = random_request(models, case.size, Settings(), steps=len(TIMESTEPS), images=case.rows // 2)
    with models.placement.holding(models.base.unet, models.upgraded.unet, models.adapter):
        steps = Steps(models, request, candidate(options.mapping, models.adapter))
        return turns_of(options).times(steps.works(case))


def main(arguments: Sequence[str] | None = None) -> None:
    options = read_options(arguments)
    machine, rows, result, groups = Machine.here(options.device), [], {}, {}
    for dtype, size, images in itertools.product(options.types, options.sizes, options.images):
        case = Case(size, 2 * images, dtype)
        times = measure(case, options)
        parts = times[UPGRADED] + times[BASE] + times[MAPPING]
        counted = {**{name: times[name] for name in (UPGRADED, BASE, MAPPING)}, "sum of these": parts, **modes(times)}
        rows += [row(case, name, taken, times[UPGRADED], parts) for name, taken in counted.items()]
        result |= {f"{name}, {case.title}: of the sum": taken.over(parts) for name, taken in modes(times).items()}
        groups[case.title] = [Bar(name, taken.spread) for name, taken in counted.items()]
        report = Report(
            name=name_for("joint_step", options, *(type_name(dtype) for dtype in options.types)),
            question="One joint step with CFG",
            machine=machine,
            options=vars(options),
            rows=rows,
            result=result,
            plot=Plot("seconds", groups),
            not_run={} if options.device.type == "cuda" else {OVERLAPPED: "needs a GPU"},
        )
        report.write(options.out)
    report.publish(options.out)


def row(case: Case, name: str, taken: Times, upgraded: Times, parts: Times) -> dict[str, object]:
    return {
        "size": written_size(case.size),
        "type": type_name(case.dtype),
        "rows": case.rows,
        "step": name,
        "seconds": taken.spread,
        "of SDXL alone": taken.over(upgraded),
        "of the sum": taken.over(parts),
    }


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_for(__doc__, rounds=5)
    parser.add_argument("--types", nargs="+", type=type_named, help="default: float16 on a GPU, float32 on the CPU")
    parser.add_argument("--sizes", nargs="+", type=picture_size, metavar="WxH", help="default: 1024x1024, CPU 512x512")
    parser.add_argument("--images", nargs="+", type=int, help="in a batch (default: 1 4, on the CPU 1)")
    parser.add_argument("--mapping", choices=CANDIDATES, default=AS_USED, help="default: %(default)s")
    options = parser.parse_args(arguments)
    gpu = options.device.type == "cuda"
    options.types = options.types or [torch.float16 if gpu else torch.float32]
    # a large batch keeps a large card as busy as one picture keeps a small one, which launches do not hold up
    options.images = options.images or ([1, 4] if gpu and not options.small else [1])
    options.sizes = options.sizes or [(128, 128) if options.small else (1024, 1024) if gpu else (512, 512)]
    return options


if __name__ == "__main__":
    main()
