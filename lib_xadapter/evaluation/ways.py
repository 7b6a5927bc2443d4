"""The ways of making a picture of a caption that are compared, and the pictures themselves.

SD1.5 with its plugins, SDEdit + SDXL over its picture, X-Adapter, and plain SDXL: all of them by `XAdapterPipeline`.
The base makes its picture once for all of them, and its part of the joint stage once for all weights. What it finished
stands beside the pictures, so that a run that goes on, or one with more weights, does not ask it again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from ..errors import WrongArgument, WrongFile, XAdapterError
from ..headless.composed import BaseSide
from ..headless.generate import texts_in
from ..headless.grid import save_picture
from ..headless.job import Job, open_picture
from ..headless.jobs import Picture, make_together
from ..headless.models import Models
from ..headless.pipeline import Progress, Rules, no_progress
from ..saving import write_whole
from ..settings import NOISE
from .captions import Caption
from .evaluate_command import Evaluation, Item
from .maps import Extractor, fitted


class UnusablePicture(XAdapterError):
    """A caption's picture that cannot be read: what is wrong is wrong for this caption alone."""


BASE_LATENTS = "base.safetensors"
SOURCE = "source.png"
UPGRADED_CAPTION = "sdxl-caption.txt"


class Kind(Enum):
    """What makes a picture."""

    BASE = "SD1.5"
    SDEDIT = "SDEdit + SDXL"
    ADAPTER = "X-Adapter"
    SINGLE = "X-Adapter, single stage"
    UPGRADED = "SDXL"
    OTHER = "another evaluation"


@dataclass(frozen=True)
class Way:
    """A way of making a picture.

    Attributes:
        kind: what makes it.
        name: for tables.
        file: of its picture, in the folder of each item.
        switch_point, weight: of the joint stage; None where there is none.
        out: the folder of another evaluation that it is from; None for this one.
    """

    kind: Kind
    name: str
    file: str
    switch_point: float | None = None
    weight: float | tuple[float, ...] | None = None
    out: Path | None = None


def ways_of(evaluation: Evaluation) -> tuple[Way, ...]:
    """The base, SDEdit at each switch point, X-Adapter at each of them with each weight, and plain SDXL; where it is
    asked for, X-Adapter from noise with each weight, too."""
    if evaluation.upgraded_alone:
        return (UPGRADED_ALONE,)
    job = evaluation.job
    several_points, several_weights = len(job.switch_points) > 1, len(job.weights) > 2
    joint = []
    for weight in job.weights:
        kind, weights = (Kind.ADAPTER, _shown(weight)) if weight else (Kind.SDEDIT, "")
        for point in job.switch_points:
            changes = [f"switch point {point:g}"] * several_points + [f"weight {weights}"] * (
                several_weights and weight != 0
            )
            stem = "-".join([FILES[kind], f"{point:g}", *([weights.replace(", ", "_")] if weight else [])])
            joint.append(Way(kind, ", ".join([kind.value, *changes]), f"{stem}.png", point, weight))
    single = [_single_way(weight, several_weights) for weight in job.weights if weight and evaluation.single_stage]
    return (BASE_ALONE, *joint, *single, UPGRADED_ALONE)


def _single_way(weight: float | tuple[float, ...], several: bool) -> Way:
    weights = _shown(weight)
    name = f"{Kind.SINGLE.value}, weight {weights}" if several else Kind.SINGLE.value
    return Way(Kind.SINGLE, name, f"single-{weights.replace(', ', '_')}.png", weight=weight)


BASE_ALONE = Way(Kind.BASE, Kind.BASE.value, "base.png")
UPGRADED_ALONE = Way(Kind.UPGRADED, Kind.UPGRADED.value, "sdxl.png")
FILES = {Kind.SDEDIT: "sdedit", Kind.ADAPTER: "x-adapter"}


def measured_ways(evaluation: Evaluation) -> tuple[Way, ...]:
    """Those of this evaluation, and what is put beside them."""
    others = (Way(Kind.OTHER, one.name, one.file, out=one.out) for one in evaluation.beside)
    return (*ways_of(evaluation), *others)


def _shown(weight: float | tuple[float, ...]) -> str:
    return ", ".join(f"{one:g}" for one in weight) if isinstance(weight, tuple) else f"{weight:g}"


@dataclass(frozen=True)
class Folder:
    """Where the pictures of an item are."""

    path: Path

    def missing(self, ways: Sequence[Way]) -> tuple[Way, ...]:
        return tuple(way for way in ways if not self.of(way).is_file())

    def of(self, way: Way) -> Path:
        return (self.path if way.out is None else _pictures(way.out) / self.path.name) / way.file

    def map_of(self, kind: str) -> Path:
        return self.path / f"map-{kind}.png"

    @property
    def source(self) -> Path:
        return self.path / SOURCE

    def note_upgraded_caption(self, caption: Caption, text: str) -> None:
        """Note what SDXL is told for these pictures.

        Raises:
            WrongArgument: they were made of another text.
        """
        path = self.path / UPGRADED_CAPTION
        if not path.is_file():
            write_whole(path, lambda to: to.write_text(text, encoding="utf-8"))
        elif (there := path.read_text(encoding="utf-8", errors="replace")) != text:
            raise WrongArgument(
                f"--upgraded-captions: of '{caption.name}' there are pictures in {self.path} for which SDXL was told "
                f"'{there}', not '{text}'; name another --out."
            )

    @property
    def left_out(self) -> Path:
        """Says why there are pictures missing, where they could not be made."""
        return self.path / "left-out.txt"


def folder_of(out: Path, item: Item) -> Folder:
    return Folder(_pictures(out) / item.key)


def _pictures(out: Path) -> Path:
    return out / "pictures"


@dataclass(frozen=True)
class ItemTask:
    """What an item still lacks.

    Attributes:
        folder: of its pictures.
        missing: ways whose picture is not there.
        job: of all of them.
        side: what the base finished for it; None where it has not.
    """

    folder: Folder
    missing: tuple[Way, ...]
    job: Job
    side: BaseSide | None

    @property
    def needs_joint_stage(self) -> bool:
        return any(way.kind not in (Kind.UPGRADED, Kind.SINGLE) for way in self.missing)

    def needs(self, kind: Kind) -> bool:
        return any(way.kind is kind for way in self.missing)


class Maker:
    """Makes pictures of items.

    Args:
        evaluation: what is asked for.
        models: loaded.
        rules: where the paper leaves a choice.
        extractors: of control maps, by kind.
        progress: called at every step.
    """

    def __init__(
        self,
        evaluation: Evaluation,
        models: Models,
        rules: Rules,
        extractors: Mapping[str, Extractor],
        progress: Progress = no_progress,
    ) -> None:
        self._evaluation, self._models, self._rules = evaluation, models, rules
        self._extractors, self._progress = extractors, progress
        self._ways = ways_of(evaluation)

    def make(self, items: Sequence[Item]) -> None:
        """All pictures of some items that are not there yet, each written as soon as it is finished.

        Items of which as much is there go in one batch.
        """
        tasks = [self._task_of(item) for item in items]
        joint = [one for one in tasks if one.needs_joint_stage]
        groups: dict[tuple[Any, ...], list[ItemTask]] = {}
        for one in joint:
            groups.setdefault((one.missing, one.side is None), []).append(one)
        for together in groups.values():
            self._make_joint(together)
        for kind, change in ((Kind.SINGLE, _single), (Kind.UPGRADED, _plain)):
            if missing := [one for one in tasks if one.needs(kind)]:
                self._make_from_noise(kind, missing, [change(one.job) for one in missing])
        for one in tasks:
            one.folder.left_out.unlink(missing_ok=True)

    def _task_of(self, item: Item) -> ItemTask:
        folder = folder_of(self._evaluation.out, item)
        if (texts := self._evaluation.upgraded_captions) is not None:
            folder.note_upgraded_caption(item.caption, texts[item.caption])
        job = self._evaluation.job_of(item, *self._maps(item, folder))
        return ItemTask(folder, folder.missing(self._ways), job, _load_base_side(folder))

    def _make_joint(self, together: Sequence[ItemTask]) -> None:
        ways = {(way.switch_point, way.weight): way for way in self._ways}
        # the base's picture comes along with the others, which are made again for it
        lost = BASE_ALONE in together[0].missing
        there = set() if lost else {text for one in together for text in texts_in(one.folder.path)}
        for picture in self._pictures([one.job for one in together], there, _sides_of(together)):
            folder, settings = together[picture.job].folder, picture.settings
            if picture.base_image is not None and not folder.of(BASE_ALONE).is_file():
                _save_base_latents(folder, picture.base_latents)
                save_picture(folder.of(BASE_ALONE), picture.base_image)
            way = ways[settings.switch_point, settings.weight]
            save_picture(folder.of(way), picture.image, picture.text)

    def _make_from_noise(self, kind: Kind, tasks: Sequence[ItemTask], jobs: Sequence[Job]) -> None:
        """Of a kind whose ways differ in their weights alone."""
        ways = [way for way in self._ways if way.kind is kind]
        for picture in self._pictures(jobs):
            way = next(way for way in ways if way.weight in (None, picture.settings.weight))
            save_picture(tasks[picture.job].folder.of(way), picture.image, picture.text)

    def _pictures(
        self, jobs: Sequence[Job], there: Collection[str] = (), side: BaseSide | None = None
    ) -> Iterator[Picture]:
        return make_together(self._models, jobs, self._rules, self._progress, there, side)

    def _maps(self, item: Item, folder: Folder) -> tuple[tuple[Image.Image, ...], tuple[Image.Image, ...]]:
        """For the ControlNets of the base and of the upgraded model."""
        evaluation, picture = self._evaluation, item.caption.picture
        if not evaluation.kinds or picture is None:
            return (), ()
        given = _given(picture)
        source = fitted(given, evaluation.job.base_size)
        if not folder.source.is_file():
            save_picture(folder.source, source)
        # of every kind at the base's size, at which pictures are compared
        maps = {kind: self._map(source, kind, folder.map_of(kind)) for kind in evaluation.kinds}
        return (
            tuple(maps[control.kind] for control in evaluation.controls),
            tuple(
                self._extractors[control.kind](fitted(given, evaluation.job.size))
                for control in evaluation.upgraded_controls
            ),
        )

    def _map(self, source: Image.Image, kind: str, path: Path) -> Image.Image:
        if not path.is_file():
            save_picture(path, self._extractors[kind](source))
        return open_picture(path, "--out")


def _given(path: Path) -> Image.Image:
    try:
        return open_picture(path, "--captions")
    except WrongArgument as error:
        raise UnusablePicture(str(error)) from error


def _single(job: Job) -> Job:
    """Both models from noise."""
    alone = dataclasses.replace(job.settings, single_stage=True, base_start=NOISE)
    weights = tuple(weight for weight in job.weights if weight)
    return dataclasses.replace(job, settings=alone, switch_points=job.switch_points[:1], weights=weights)


def _plain(job: Job) -> Job:
    """SDXL alone, from noise."""
    return dataclasses.replace(_single(job), weights=(0.0,), control_images=(), control_scales=(), control_names=())


def _sides_of(together: Sequence[ItemTask]) -> BaseSide | None:
    """What the base finished for items, of all of which or of none it has."""
    latents = [one.side.latents for one in together if one.side is not None]
    return BaseSide(torch.cat(latents)) if latents else None


def _save_base_latents(folder: Folder, latents: Tensor) -> None:
    tensors = {"latents": latents.cpu().contiguous()}
    write_whole(folder.path / BASE_LATENTS, lambda to: to.write_bytes(safetensors.torch.save(tensors)))


def _load_base_side(folder: Folder) -> BaseSide | None:
    """What the base finished for this item; None where it has not."""
    path = folder.path / BASE_LATENTS
    # the latents are written before the picture
    if not (path.is_file() and folder.of(BASE_ALONE).is_file()):
        return None
    try:
        return BaseSide(safetensors.torch.load_file(path)["latents"])
    except (SafetensorError, KeyError) as error:
        raise WrongFile(f"{path} holds no latents of the base; without it and base.png they are made anew.") from error
