"""Two-stage inference: the base alone, the switch, then both models together.

Source: paper, "Inference strategy". Stage 1 is the base's own picture, from T down to 0 with all its plugins. The
switch carries it over, E_up(D_base(z)), and noises it to the switch point. In the joint stage the upgraded model
samples on from there; at each of its model evaluations the base, noised to the same level by noise of its own, is
evaluated too, and its mapped decoder features are added to the upgraded decoder. In a single stage (paper, "single
stage") there is no picture first, and both models start from noise.

The base never depends on the upgraded model. So its evaluations run either in lockstep, one before each of the upgraded
model's, or all of them first, recorded, so that the two models need not be on the device together. And what it made in
an earlier pass is used again where nothing has changed on its side: stage 1 for as long as its own request is the same,
its features as long as they are asked for at the same evaluations.

What samples, decodes and moves models is a `Host`: the WebUI or diffusers.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import torch
from PIL import Image
from torch import Tensor

from .errors import UnplannedLevel, XAdapterError
from .evaluations import Evaluation, same_level
from .feature_sources import BaseDenoiser, FeatureSource, Lockstep, OncePerLevel
from .joint_stage import Coupling, JointStage
from .memory import free_ram, is_out_of_memory
from .overlap import Overlap
from .recording import LeastRecentlyUsed, Playback, Recorder, Recording, Sized, record
from .taps import Taps
from .trajectory import Trajectory

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
class Pass:
    """One sampling of the upgraded model, decided before it begins.

    Attributes:
        coupling: None where only the base's picture is carried over (SDEdit + the upgraded model).
        evaluations: the model evaluations that its sampler will make; None where that depends on what the models say.
        recorded: run the base first and the upgraded model afterwards.
        may_record: go on so if the device's memory does not hold both.
        key: equal for passes with the same stage 1, which is found again by it; None where nothing is to be found.
        use_cache: find and keep what the base makes in lockstep, too, as other passes are to come that have use for it.
        can_resume: the base's joint stage can begin from a stage 1 that was found. Plugins that take something along
            from their stage 1 must have gone through it.
        solver_order: of the base in the joint stage, as in `Trajectory`.
    """

    coupling: Coupling | None
    evaluations: tuple[Evaluation, ...] | None
    recorded: bool = False
    may_record: bool = False
    key: Hashable = None
    use_cache: bool = False
    can_resume: bool = True
    solver_order: int = 2

    @property
    def recording_key(self) -> Hashable:
        """Equal for passes in which the base runs through the same joint stage."""
        return (self.key, self.solver_order, self.uses_time, self.taps, tuple(self.base_evaluations))

    @property
    def base_evaluations(self) -> list[Evaluation]:
        """Those of the base in the joint stage, as far as they are known."""
        if self.coupling is None or self.evaluations is None:
            return []
        return self.coupling.window.base_evaluations(self.evaluations)

    @property
    def taps(self) -> Taps:
        """Where the base's features are read."""
        return () if self.coupling is None else self.coupling.mapping.adapter.taps

    @property
    def uses_time(self) -> bool:
        """Whether the mapping layers take the base's time embedding, which is recorded then."""
        return self.coupling is not None and self.coupling.mapping.adapter.time_channels is not None


@dataclass(frozen=True)
class CachedStageOne:
    """Stage 1 of an earlier pass.

    Attributes:
        stage_one: its latents in RAM.
        host_data: what else the host wants to find again.
    """

    stage_one: StageOne
    host_data: Sized | None = None

    @property
    def size(self) -> int:
        """Bytes of RAM."""
        latents = self.stage_one.latents
        of_latents = 0 if latents is None else latents.nbytes
        of_host = 0 if self.host_data is None else self.host_data.size
        return size_of_pictures(self.stage_one.pictures) + of_latents + of_host


def size_of_pictures(pictures: Iterable[Image.Image]) -> int:
    """Bytes of pictures in 8 bits."""
    return sum(len(image.getbands()) * image.width * image.height for image in pictures)


BaseCache = LeastRecentlyUsed[CachedStageOne | Recording]
"""Stages 1 by their key, and features by that of their recording."""


@dataclass(frozen=True)
class CachedBase:
    """What earlier passes made of a pass's base side."""

    stage_one: CachedStageOne | None = None
    recording: Recording | None = None

    @classmethod
    def for_pass(cls, plan: Pass, cache: BaseCache) -> CachedBase:
        """What there is that this pass can use."""
        kept = cache.find(plan.key) if plan.key is not None else None
        if kept is None or plan.coupling is None:
            return cls(kept)
        recording = cache.find(plan.recording_key) if plan.evaluations is not None else None
        return cls(kept, recording) if recording is not None or plan.can_resume else cls()

    def suffices_for(self, plan: Pass) -> bool:
        """Whether the base need not run."""
        return self.stage_one is not None and (plan.coupling is None or self.recording is not None)


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

    def base_denoiser(self, stage_one: StageOne, taps: Taps) -> AbstractContextManager[BaseDenoiser]:
        """While open, the base can be evaluated, and its features are read at these taps."""

    def sample_upgraded(
        self, stage_one: StageOne, joint: JointStage | None, planned: Sequence[Evaluation] | None
    ) -> Samples:
        """The switch and the upgraded model's sampling, each of its evaluations one of the joint stage.

        Args:
            stage_one: what it goes on from.
            joint: None where nothing is added.
            planned: its evaluations, where they are known.

        Raises:
            UnplannedLevel: its sampler made others.
        """

    def samples_of_base(self, stage_one: StageOne) -> Samples:
        """Stage 1's pictures at the upgraded size, for who wants no more."""

    def base_to_device(self) -> None:
        """The upgraded model leaves the device to the base."""

    def upgraded_to_device(self) -> None:
        """The base leaves the device to the upgraded model."""

    def both_to_device(self) -> None:
        """Both models are on the device."""

    def recording(self, evaluations: int) -> AbstractContextManager[Callable[[], None]]:
        """Around the recording of so many evaluations; what it gives is called before each of them."""

    def host_data(self) -> Sized | None:
        """What else is to be kept with stage 1, asked for once the base's plugins are closed."""

    def on_stage_one_reused(self, kept: CachedStageOne) -> None:
        """Stage 1 is that of an earlier pass."""

    def on_base_skipped(self, kept: CachedStageOne) -> None:
        """Beside that, the base does not run at all; what its plugins would report stands in `host_data`."""

    def notify(self, sentence: str) -> None:
        """Tell the user."""


def run(host: Host[Samples], plan: Pass, cache: BaseCache) -> Samples:
    """One pass of the upgraded model.

    Args:
        host: has the models.
        plan: what was decided.
        cache: what the base made in earlier passes.

    Returns:
        What the host's sampler gives.
    """
    try:
        return _as_planned(host, plan, cache)
    except UnplannedLevel as error:
        reason = str(error)
        traceback.clear_frames(error.__traceback__)
    host.notify(f"{reason}, so memory is 'lockstep' for this picture")
    unplanned = replace(plan, recorded=False, evaluations=None, use_cache=False)
    return _in_lockstep(host, unplanned, cache, CachedBase.for_pass(unplanned, cache))


def _as_planned(host: Host[Samples], plan: Pass, cache: BaseCache) -> Samples:
    if plan.recorded:
        return _one_after_the_other(host, plan, cache)
    try:
        return _in_lockstep(host, plan, cache, CachedBase.for_pass(plan, cache) if plan.use_cache else CachedBase())
    except RuntimeError as error:
        if not is_out_of_memory(error) or not plan.may_record or plan.evaluations is None:
            raise
        # what its frames hold is what the next attempt needs
        traceback.clear_frames(error.__traceback__)
    host.notify("both models did not fit into video memory, so memory is 'recorded' for this picture")
    return _one_after_the_other(host, replace(plan, recorded=True), cache)


def _in_lockstep(host: Host[Samples], plan: Pass, cache: BaseCache, found: CachedBase) -> Samples:
    if found.suffices_for(plan):
        return _without_base(host, plan, found)
    host.both_to_device()
    with host.base_plugins():
        stage_one = _stage_one(host, found)
        if host.interrupted and stage_one.pictures:
            return host.samples_of_base(stage_one)
        samples, recording = _sample_in_lockstep(host, plan, stage_one, cache)
    if plan.use_cache:
        _cache_results(host, plan, cache, stage_one, recording)
    return samples


def _sample_in_lockstep(
    host: Host[Samples], plan: Pass, stage_one: StageOne, cache: BaseCache
) -> tuple[Samples, Recording | None]:
    """The upgraded model with the base beside it, and a recording of the base where one is kept."""
    if plan.coupling is None:
        return host.sample_upgraded(stage_one, None, plan.evaluations), None
    with _lockstep_source(host, plan, stage_one) as source:
        if not plan.use_cache or plan.key is None or plan.evaluations is None:
            return _joint_stage(host, plan, stage_one, source, host.overlap), None
        recorder = Recorder(source, plan.base_evaluations, cache.has_room, plan.uses_time)
        samples = _joint_stage(host, plan, stage_one, recorder, host.overlap)
        return samples, recorder.recording()


def _one_after_the_other(host: Host[Samples], plan: Pass, cache: BaseCache) -> Samples:
    found = CachedBase.for_pass(plan, cache)
    if not found.suffices_for(plan):
        found = _run_base(host, plan, found, cache)
        host.upgraded_to_device()
        return _from_base(host, plan, found.stage_one.stage_one, found.recording)
    host.upgraded_to_device()
    return _without_base(host, plan, found)


def _run_base(host: Host[Any], plan: Pass, found: CachedBase, cache: BaseCache) -> CachedBase:
    """The base before the upgraded model."""
    host.base_to_device()
    with host.base_plugins():
        stage_one = _stage_one(host, found)
        goes_on = plan.coupling is not None and not host.interrupted
        recording = _record_joint_stage(host, plan, stage_one, cache) if goes_on else None
    _cache_results(host, plan, cache, stage_one, recording)
    return CachedBase(CachedStageOne(stage_one), recording)


def _without_base(host: Host[Samples], plan: Pass, found: CachedBase) -> Samples:
    logger.info("The base's side is that of an earlier picture: it is used again")
    kept = found.stage_one
    host.on_stage_one_reused(kept)
    host.on_base_skipped(kept)
    return _from_base(host, plan, kept.stage_one, found.recording)


def _from_base(host: Host[Samples], plan: Pass, stage_one: StageOne, recording: Recording | None) -> Samples:
    """The upgraded model once the base is through."""
    if host.interrupted and stage_one.pictures:
        return host.samples_of_base(stage_one)
    if plan.coupling is None or recording is None or host.interrupted:
        return host.sample_upgraded(stage_one, None, plan.evaluations)
    return _joint_stage(host, plan, stage_one, OncePerLevel(Playback(recording, host.device)), None)


def _stage_one(host: Host[Any], found: CachedBase) -> StageOne:
    if found.stage_one is None:
        return host.sample_base()
    host.on_stage_one_reused(found.stage_one)
    return found.stage_one.stage_one


def _cache_results(
    host: Host[Any], plan: Pass, cache: BaseCache, stage_one: StageOne, recording: Recording | None
) -> None:
    """Put away what the base made, for later passes; nothing of what the user interrupted."""
    if plan.key is None or host.interrupted:
        return
    latents = None if stage_one.latents is None else stage_one.latents.cpu()
    cache.put(plan.key, CachedStageOne(replace(stage_one, latents=latents), host.host_data()))
    if recording is not None:
        cache.put(plan.recording_key, recording)


def _joint_stage(
    host: Host[Samples], plan: Pass, stage_one: StageOne, source: FeatureSource, overlap: Overlap | None
) -> Samples:
    joint = JointStage(source, plan.coupling, overlap)
    try:
        return host.sample_upgraded(stage_one, joint, plan.evaluations)
    finally:
        if overlap is not None:
            overlap.end()


@contextmanager
def _lockstep_source(host: Host[Any], plan: Pass, stage_one: StageOne) -> Iterator[FeatureSource]:
    """The base at the start of the joint stage: its finished latents, noised again."""
    with host.base_denoiser(stage_one, plan.taps) as denoiser:
        noise, latents = host.base_noise(), stage_one.latents
        clean = None if latents is None else latents.to(noise.device)
        yield OncePerLevel(Lockstep(denoiser, Trajectory(noise, clean, plan.solver_order)))


def _record_joint_stage(host: Host[Any], plan: Pass, stage_one: StageOne, cache: BaseCache) -> Recording | None:
    """The base's features at its planned evaluations; None where the user interrupts.

    Raises:
        XAdapterError: there is not enough RAM for them.
    """
    evaluations = plan.base_evaluations
    with _lockstep_source(host, plan, stage_one) as source, host.recording(len(evaluations)) as step:

        def begin_step() -> None:
            if host.interrupted:
                raise _Interrupted
            step()

        def reserve(size: int) -> None:
            cache.make_room(size)
            if (missing := size - free_ram()) > 0:
                raise XAdapterError(
                    f"The recording would need {missing / 2**30:.1f} GB more RAM than is free: set 'memory' to "
                    "'lockstep', or make fewer pictures at once."
                )

        try:
            return record(source, evaluations, begin_step, plan.uses_time, reserve)
        except _Interrupted:
            return None


class _Interrupted(Exception):
    """The user wants no more of this picture."""


def check_plan(planned: Sequence[Evaluation], asked: Sequence[float]) -> None:
    """Whether a sampler asked for the noise levels that were planned, as far as it came.

    Raises:
        UnplannedLevel: for the first that differs.
    """
    for place, (expected, sigma) in enumerate(zip(planned, asked, strict=False)):
        if not same_level(expected.sigma, sigma):
            raise UnplannedLevel(
                f"another extension has changed the sampler's noise levels: evaluation {place} was to be at "
                f"{expected.sigma:g} and was at {sigma:g}"
            )
