"""One model evaluation of the joint stage: base features → mapping layers → the upgraded decoder, row by row.

Source: paper, "Inference strategy"; released code, `pipeline/pipeline_sd_xl_adapter_controlnet.py`, its second loop.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .feature_sources import FeatureSource, RowFeatures
from .mapping_paths import MappingPath
from .overlap import Overlap
from .rows import Row, match_rows, take_rows
from .settings import Settings
from .taps import Fusion, addition, fuse_into, like


@dataclass(frozen=True)
class Moment:
    """Where a model evaluation of the joint stage stands.

    Attributes:
        sigma: the noise level that the upgraded model is asked for, as in `trajectory`.
        step: the sampling step that it belongs to, from 0.
        progress: how much of the joint stage has gone, 0..1.
    """

    sigma: float
    step: int
    progress: float


@dataclass(frozen=True)
class Course:
    """When in the joint stage the base runs and the adapter acts.

    Attributes:
        start, end: the part in which the adapter acts, as fractions of the steps; the base follows up to the end.
        refresh_every: the base runs at every n-th step, and its features serve until the next.
    """

    start: float = 0.0
    end: float = 1.0
    refresh_every: int = 1

    @classmethod
    def asked_for(cls, settings: Settings) -> Course:
        """As the user wants it."""
        return cls(settings.guidance_start, settings.guidance_end, settings.refresh_every)

    def acts(self, moment: Moment) -> bool:
        """Whether residuals are added."""
        return self.start <= moment.progress <= self.end

    def runs_base(self, moment: Moment) -> bool:
        """Whether features are asked for."""
        return moment.progress <= self.end and moment.step % self.refresh_every == 0

    def base_levels(self, moments: Iterable[Moment]) -> list[float]:
        """The noise levels at which features are asked for, in their order."""
        return [moment.sigma for moment in moments if self.runs_base(moment)]


@dataclass(frozen=True)
class Hidden:
    """What the blocks of a level made of the base's rows, and the mark behind that work where it was put aside."""

    rows: Tensor
    mark: object = None


class JointStage:
    """Hands each row of the upgraded model what the mapping layers make of the base's.

    A host calls `advance` before each model evaluation, `select` before each UNet call in it, and keeps
    `coupled_to(unet)` open around its sampler.

    Args:
        source: gives the base's features.
        mapping: runs the mapping layers.
        weights: weight of each level's residual.
        course: when the base runs and the adapter acts.
        cond_only: only the base's rows of the prompt are mapped, and lead the negative prompt's rows, too.
        overlap: where the base's work goes beside the upgraded model's; None for one after the other.
        fuse: how a residual enters a feature.
    """

    def __init__(
        self,
        source: FeatureSource,
        mapping: MappingPath,
        weights: Sequence[float],
        course: Course | None = None,
        cond_only: bool = False,
        overlap: Overlap | None = None,
        fuse: Fusion = addition,
    ) -> None:
        self._source = source
        self._mapping = mapping
        self._weights = tuple(weights)
        self._course = course or Course()
        self._cond_only = cond_only
        self._overlap = overlap
        self._fuse = fuse
        self._forget()

    def _forget(self) -> None:
        self._moment: Moment | None = None
        self._due = False
        self._found: RowFeatures | None = None
        self._hidden: dict[int, Hidden] = {}
        self._upgraded_rows: tuple[Row, ...] = ()
        self._rows: slice | None = None

    @contextmanager
    def coupled_to(self, upgraded_unet: nn.Module) -> Iterator[None]:
        """While open, the upgraded UNet gets the residuals of the rows that were selected."""
        weighted = [level for level, weight in enumerate(self._weights) if weight]
        try:
            with fuse_into(upgraded_unet, self._enter, weighted):
                yield
        finally:
            if self._overlap is not None:
                self._overlap.end()
            self._forget()

    def advance(self, moment: Moment, upgraded_rows: Sequence[Row]) -> None:
        """A model evaluation begins; the base is brought there, or will be when the first residual is asked for.

        Args:
            moment: where the evaluation stands.
            upgraded_rows: the rows of the upgraded model's batch, in its order.
        """
        self._moment, self._upgraded_rows, self._rows = moment, tuple(upgraded_rows), None
        self._due = self._course.runs_base(moment)
        if self._overlap is not None:
            self._overlap.begin()
        else:
            self._follow()

    def select(self, rows: slice | None) -> None:
        """The rows of the upgraded batch that the next UNet call holds; None for a call that gets no residuals."""
        self._rows = rows

    @torch.no_grad()
    def _follow(self) -> None:
        """Ask for features if they are due, and map them if they are wanted and not mapped yet."""
        with self._overlap.aside() if self._overlap is not None else nullcontext():
            if self._due:
                self._found, self._hidden, self._due = self._source.at(self._moment.sigma), {}, False
            if self._found is not None and not self._hidden and self._course.acts(self._moment):
                self._hidden = {level: self._map(level) for level, weight in enumerate(self._weights) if weight}

    def _map(self, level: int) -> Hidden:
        features, places = self._found.features, self._mapped_places()
        feature, time_embedding = take_rows(features.levels[level], places), take_rows(features.time_embedding, places)
        rows = self._mapping.hidden(level, feature, time_embedding)
        return Hidden(rows, self._overlap.finished() if self._overlap is not None else None)

    def _mapped_places(self) -> list[int]:
        """Which of the base's rows are mapped."""
        return [place for place, row in enumerate(self._found.rows) if not self._cond_only or row.cond is not None]

    @torch.no_grad()
    def _enter(self, level: int, feature: Tensor) -> Tensor:
        """The feature of a level with its residuals, for the rows of the UNet call under way."""
        if self._rows is None:
            return feature
        self._follow()
        if not self._hidden or not self._course.acts(self._moment):
            return feature
        hidden = self._hidden[level]
        if self._overlap is not None:
            self._overlap.wait_for(hidden.mark, hidden.rows)
        mapped = [self._found.rows[place] for place in self._mapped_places()]
        sources = match_rows(self._upgraded_rows, mapped)[self._rows]
        return self._fused(level, feature, _gather(hidden.rows, sources))

    def _fused(self, level: int, feature: Tensor, hidden: Tensor) -> Tensor:
        weight = self._weights[level]
        if self._fuse is addition and hidden.shape == feature.shape:
            return self._mapping.add(level, feature, hidden, weight)
        return self._fuse(feature, like(self._mapping.residual(level, hidden), feature), weight)


def _gather(hidden: Tensor, sources: Sequence[tuple[int, ...]]) -> Tensor:
    """The mean of its sources for each row; the output convolution that follows is affine, so it may come after."""
    if all(len(places) == 1 for places in sources):
        return take_rows(hidden, [place for (place,) in sources])
    return torch.stack([take_rows(hidden, places).mean(0) for places in sources])
