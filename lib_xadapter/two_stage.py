"""Two-stage inference: the base alone, the switch, then both models together.

Source: paper, "Inference strategy". Stage 1 is the base's own picture, from T down to 0 with all its plugins. The
switch carries it over, E_up(D_base(z)), and noises it to the switch point. In the joint stage the upgraded model
samples on from there; at each of its model evaluations the base, noised to the same level by noise of its own, is
evaluated too, and its mapped decoder features are added to the upgraded decoder. In a single stage (paper, "single
stage") there is no picture first, and both models start from noise.

The base never depends on the upgraded model. So its evaluations run either in lockstep, one before each of the upgraded
model's, or all of them first, recorded, so that the two models need not be on the device together.

What samples, decodes and moves models is a `Host`: the WebUI or diffusers.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import torch
from PIL import Image
from torch import Tensor

from .errors import XAdapterError
from .evaluations import Evaluation, GuidanceWindow
from .feature_sources import BaseDenoiser, FeatureSource, Lockstep
from .joint_stage import JointStage
from .mapping_paths import MappingPath
from .memory import free_ram, is_out_of_memory
from .overlap import Overlap
from .recording import Playback, Recording, RecordingCache, record
from .trajectory import Trajectory, same_level

logger = logging.getLogger(__name__)

Samples = TypeVar("Samples", covariant=True)


@dataclass(frozen=True)
class StageOne:
    """What the base made alone; nothing in a single stage.

    Attributes:
        latents: its finished latents, (images, 4, h, w); None in a single stage.
        pictures: their pictures, in 8 bits; none in a single stage.
        levels: the noise level of each of its model evaluations, where prompts can change on the way.
    """

    latents: Tensor | None
    pictures: tuple[Image.Image, ...] = ()
    levels: tuple[float, ...] = ()


@dataclass(frozen=True)
class Coupling:
    """How the base's features enter the upgraded model.

    Attributes:
        mapping: runs the mapping layers.
        weights: of each level's residual.
        window: when the base runs and the adapter acts.
        cond_only: only the prompt's rows are mapped.
    """

    mapping: MappingPath
    weights: tuple[float, ...]
    window: GuidanceWindow
    cond_only: bool = False


@dataclass(frozen=True)
class Pass:
    """One sampling of the upgraded model, decided before it begins.

    Attributes:
        coupling: None where only the base's picture is carried over (SDEdit + the upgraded model).
        evaluations: the model evaluations that its sampler will make; None where that depends on what the models say.
        recorded: run the base first and the upgraded model afterwards.
        may_record: go on so if the device's memory does not hold both.
        key: equal for passes with the same base side, whose recording is found again by it; None for none.
        solver_order: of the base in the joint stage, as in `Trajectory`.
    """

    coupling: Coupling | None
    evaluations: tuple[Evaluation, ...] | None
    recorded: bool = False
    may_record: bool = False
    key: Hashable = None
    solver_order: int = 2

    @property
    def base_evaluations(self) -> list[Evaluation]:
        """Those of the base in the joint stage, as far as they are known."""
        if self.coupling is None or self.evaluations is None:
            return []
        return self.coupling.window.base_evaluations(self.evaluations)

    @property
    def uses_time(self) -> bool:
        """Whether the mapping layers take the base's time embedding, which is recorded then."""
        return self.coupling is not None and self.coupling.mapping.adapter.time_channels is not None

    @property
    def recording_key(self) -> Hashable:
        """What its recording is found again by; None for none."""
        return None if self.coupling is None or self.key is None else (self.key, self.uses_time)


@dataclass(frozen=True)
class RecordedBase:
    """The base's side of a pass.

    Attributes:
        stage_one: its picture.
        recording: its features in the joint stage.
        remarks: what else the host wants to find again.
    """

    stage_one: StageOne
    recording: Recording
    remarks: Any = None

    @property
    def size(self) -> int:
        """Bytes of memory, nearly all of them the recording's."""
        pictures = self.stage_one.pictures
        return self.recording.size + sum(len(image.getbands()) * image.width * image.height for image in pictures)


class Host(Protocol[Samples]):
    """What has the models and their samplers. Sizes, prompts, plugins and seeds of the pass are its own matter."""

    @property
    def interrupted(self) -> bool:
        """Whether the user wants no more of this picture."""

    @property
    def device(self) -> torch.device | str:
        """Where the mapping layers run."""

    @property
    def overlap(self) -> Overlap | None:
        """Where the base can run beside the upgraded model; None for one after the other."""

    def base_plugins(self) -> AbstractContextManager[None]:
        """While open, the base has its prompts, LoRAs and ControlNets."""

    def sample_base(self) -> StageOne:
        """Stage 1; in a single stage nothing is sampled."""

    def base_noise(self) -> Tensor:
        """What the base starts from in the joint stage, standard normal, (images, 4, h, w)."""

    def base_denoiser(self, stage_one: StageOne) -> AbstractContextManager[BaseDenoiser]:
        """While open, the base can be evaluated."""

    def sample_upgraded(self, stage_one: StageOne, joint: JointStage | None) -> Samples:
        """The switch and the upgraded model's sampling, each of its evaluations one of the joint stage."""

    def samples_of_base(self, stage_one: StageOne) -> Samples:
        """Stage 1's pictures at the upgraded size, for who wants no more."""

    def base_to_device(self) -> None:
        """The upgraded model leaves the device to the base."""

    def upgraded_to_device(self) -> None:
        """The base leaves the device to the upgraded model."""

    def recording(self, evaluations: int) -> AbstractContextManager[Callable[[], None]]:
        """Around the recording of so many evaluations; what it gives is called before each of them."""

    def remarks(self) -> Any:
        """What else is to be kept with a recording, asked for once the base is through."""

    def recording_found(self, base: RecordedBase) -> None:
        """An earlier pass recorded this base side; it is used again."""

    def notify(self, sentence: str) -> None:
        """Tell the user."""


def run(host: Host[Samples], plan: Pass, recordings: RecordingCache[RecordedBase]) -> Samples:
    """One pass of the upgraded model.

    Args:
        host: has the models.
        plan: what was decided.
        recordings: of earlier passes.

    Returns:
        What the host's sampler gives.
    """
    if plan.recorded:
        return _one_after_the_other(host, plan, recordings)
    try:
        return _in_lockstep(host, plan)
    except RuntimeError as error:
        if not is_out_of_memory(error) or not plan.may_record or plan.evaluations is None:
            raise
        # what its frames hold is what the next attempt needs
        traceback.clear_frames(error.__traceback__)
    host.notify("both models did not fit into video memory, so memory is 'recorded' for this picture")
    return _one_after_the_other(host, replace(plan, recorded=True), recordings)


def _in_lockstep(host: Host[Samples], plan: Pass) -> Samples:
    with host.base_plugins():
        stage_one = host.sample_base()
        if host.interrupted and stage_one.pictures:
            return host.samples_of_base(stage_one)
        if plan.coupling is None:
            return host.sample_upgraded(stage_one, None)
        with _base_beside(host, plan, stage_one) as source:
            return _joint_stage(host, plan.coupling, stage_one, source, host.overlap)


def _one_after_the_other(host: Host[Samples], plan: Pass, recordings: RecordingCache[RecordedBase]) -> Samples:
    key = plan.recording_key
    base = recordings.find(key) if key is not None else None
    if base is not None:
        logger.info("The base's side is that of an earlier picture: its recording is used again")
        host.recording_found(base)
    else:
        base = _record_base(host, plan, recordings)
        if key is not None and not host.interrupted:
            recordings.put(key, base)
    host.upgraded_to_device()
    if host.interrupted and base.stage_one.pictures:
        return host.samples_of_base(base.stage_one)
    if plan.coupling is None or host.interrupted:
        return host.sample_upgraded(base.stage_one, None)
    return _joint_stage(host, plan.coupling, base.stage_one, Playback(base.recording, host.device), None)


def _joint_stage(
    host: Host[Samples], coupling: Coupling, stage_one: StageOne, source: FeatureSource, overlap: Overlap | None
) -> Samples:
    joint = JointStage(source, coupling.mapping, coupling.weights, coupling.window, coupling.cond_only, overlap)
    try:
        return host.sample_upgraded(stage_one, joint)
    finally:
        if overlap is not None:
            overlap.end()


@contextmanager
def _base_beside(host: Host[Any], plan: Pass, stage_one: StageOne) -> Iterator[Lockstep]:
    """The base at the start of the joint stage: its finished latents, noised again."""
    with host.base_denoiser(stage_one) as denoiser:
        yield Lockstep(denoiser, Trajectory(host.base_noise(), stage_one.latents, plan.solver_order))


def _record_base(host: Host[Any], plan: Pass, recordings: RecordingCache[RecordedBase]) -> RecordedBase:
    host.base_to_device()
    with host.base_plugins():
        stage_one = host.sample_base()
        goes_on = plan.coupling is not None and not host.interrupted
        recording = _record_joint_stage(host, plan, stage_one, recordings) if goes_on else Recording(())
    # the joint stage is through: nothing needs the latents any more
    return RecordedBase(replace(stage_one, latents=None), recording, host.remarks())


def _record_joint_stage(
    host: Host[Any], plan: Pass, stage_one: StageOne, recordings: RecordingCache[RecordedBase]
) -> Recording:
    """The base's features at its planned evaluations; none where the user interrupts.

    Raises:
        XAdapterError: there is not enough ordinary memory for them.
    """
    evaluations = plan.base_evaluations
    with _base_beside(host, plan, stage_one) as source, host.recording(len(evaluations)) as step:

        def begin_step() -> None:
            if host.interrupted:
                raise _Interrupted
            step()

        def reserve(size: int) -> None:
            recordings.make_room(size)
            if (missing := size - free_ram()) > 0:
                raise XAdapterError(
                    f"The recording would need {missing / 2**30:.1f} GB more RAM than is free: set 'memory' to "
                    "'lockstep', or make fewer pictures at once."
                )

        try:
            return record(source, evaluations, begin_step, plan.uses_time, reserve)
        except _Interrupted:
            return Recording(())


class _Interrupted(Exception):
    """The user wants no more of this picture."""


def check_plan(planned: Sequence[Evaluation], asked: Sequence[float]) -> None:
    """Whether a sampler asked for the noise levels that were planned, as far as it came.

    Raises:
        XAdapterError: for the first that differs.
    """
    for place, (expected, sigma) in enumerate(zip(planned, asked, strict=False)):
        if not same_level(expected.sigma, sigma):
            raise XAdapterError(
                f"Another extension has changed the sampler's noise levels: evaluation {place} was to be at "
                f"{expected.sigma:g} and was at {sigma:g}."
            )
