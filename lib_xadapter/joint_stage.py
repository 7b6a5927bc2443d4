"""One model evaluation of the joint stage: base features → mapping layers → the upgraded decoder, row by row.

Source: paper, "Inference strategy"; released code, `pipeline/pipeline_sd_xl_adapter_controlnet.py`, its second loop.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from .evaluations import Evaluation, GuidanceWindow
from .feature_sources import FeatureSource, RowFeatures
from .mapping_paths import MappingPath
from .overlap import Overlap
from .rows import Row, match_rows, take_rows
from .settings import Settings
from .taps import FUSIONS, fuse_into, resized_like


@dataclass(frozen=True)
class Coupling:
    """How the base's features enter the upgraded model.

    Attributes:
        mapping: runs the mapping layers.
        weights: of the coarse, middle and fine residuals.
        window: when the base runs and the adapter acts.
        cond_only: map only the base's rows of the prompt, and use them for the negative prompt's rows, too.
        uncond_weight: share of the weights for the negative prompt's rows.
    """

    mapping: MappingPath
    weights: tuple[float, ...]
    window: GuidanceWindow = field(default_factory=GuidanceWindow)
    cond_only: bool = False
    uncond_weight: float = 1.0

    @classmethod
    def from_settings(cls, mapping: MappingPath, settings: Settings) -> Coupling:
        """What a picture's settings say of it."""
        window = GuidanceWindow.from_settings(settings)
        return cls(mapping, settings.weights, window, settings.cond_only, settings.uncond_weight)

    @property
    def level_weights(self) -> tuple[float, ...]:
        """Of the residual of each level of the mapping layers, in the order of their taps."""
        return tuple(self.weights[tap.grain] for tap in self.mapping.adapter.taps)


@dataclass(frozen=True)
class MappedLevel:
    """What the ResNet blocks of a level made of the base's rows, and the event behind that work on a side stream."""

    rows: Tensor
    finished: object = None


@dataclass(frozen=True, eq=False)
class MappedBase:
    """The base's features at one evaluation, and what the mapping layers make of them; each computed once, when needed.

    Attributes:
        source: gives the features.
        evaluation: the one at which the base runs.
        coupling: how they enter the upgraded model.
        overlap: runs this work on a side stream; None for none.
    """

    source: FeatureSource
    evaluation: Evaluation
    coupling: Coupling
    overlap: Overlap | None

    @cached_property
    def levels(self) -> tuple[int, ...]:
        """Those of the mapping layers whose weight is not 0."""
        return tuple(level for level, weight in enumerate(self.coupling.level_weights) if weight)

    def run(self) -> None:
        """Evaluate the base, unless it was; on a side stream this only starts it."""
        _ = self.row_features

    @cached_property
    def row_features(self) -> RowFeatures:
        """The base's features."""
        with self._on_side_stream():
            return self.source.at(self.evaluation)

    @cached_property
    def mapped(self) -> Mapping[int, MappedLevel]:
        """Level → mapped rows, in the order of `rows`."""
        with self._on_side_stream():
            return {level: self._map(level) for level in self.levels}

    @property
    def rows(self) -> tuple[Row, ...]:
        """The base's rows that are mapped."""
        return tuple(self.row_features.rows[place] for place in self._places)

    @property
    def _places(self) -> list[int]:
        cond_only = self.coupling.cond_only
        return [place for place, row in enumerate(self.row_features.rows) if not cond_only or row.cond is not None]

    def _map(self, level: int) -> MappedLevel:
        features, places = self.row_features.features, self._places
        embedding = features.time_embedding
        embedding = None if embedding is None else take_rows(embedding, places)
        rows = self.coupling.mapping.hidden(level, take_rows(features.levels[level], places), embedding)
        return MappedLevel(rows, self.overlap.finished() if self.overlap is not None else None)

    def _on_side_stream(self) -> AbstractContextManager[None]:
        return self.overlap.on_side_stream() if self.overlap is not None else nullcontext()


@dataclass(frozen=True)
class JointEvaluation:
    """One evaluation of the upgraded model, with the base's features that it gets.

    Attributes:
        base: the base's features, of this evaluation or an earlier one; None before there are any.
        rows: of the upgraded model's batch, in its order.
        acts: whether residuals are added at all.
    """

    base: MappedBase | None
    rows: tuple[Row, ...]
    acts: bool

    def fuse(self, level: int, feature: Tensor, rows: slice) -> Tensor:
        """The upgraded feature of a level with its residuals.

        Args:
            level: of the mapping layers.
            feature: (rows, channels, h, w) of the UNet call under way.
            rows: the part of the batch that this call holds.
        """
        if self.base is None:
            return feature
        # where the base runs on a side stream, it is started here and not before
        self.base.run()
        if not self.acts:
            return feature
        mapped = self.base.mapped[level]
        if self.base.overlap is not None:
            self.base.overlap.wait_for(mapped.finished, mapped.rows)
        hidden = _gather(mapped.rows, match_rows(self.rows, self.base.rows)[rows])
        runs = self._equal_runs(rows)
        parts = [self._fuse_run(level, feature[run], hidden[run], weight) for run, weight in runs]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _equal_runs(self, rows: slice) -> list[tuple[slice, float]]:
        """The parts of a call's rows that get the same share of the weights, with that share."""
        of_uncond = self.base.coupling.uncond_weight
        shares = [1.0 if row.cond is not None else of_uncond for row in self.rows[rows]]
        runs, first = [], 0
        for share, equal in itertools.groupby(shares):
            after = first + len(list(equal))
            runs.append((slice(first, after), share))
            first = after
        return runs

    def _fuse_run(self, level: int, feature: Tensor, hidden: Tensor, share: float) -> Tensor:
        coupling = self.base.coupling
        mapping, weight = coupling.mapping, share * coupling.level_weights[level]
        if weight == 0:
            return feature
        fusion = mapping.adapter.fusion
        if fusion == "addition" and hidden.shape == feature.shape:
            return mapping.add(level, feature, hidden, weight)
        return FUSIONS[fusion](feature, resized_like(mapping.residual(level, hidden), feature), weight)

    @contextmanager
    def fused_into(self, upgraded_unet: nn.Module, rows: slice) -> Iterator[None]:
        """While open, a call of the upgraded UNet with these rows of the batch gets its residuals."""
        if self.base is None:
            yield
            return
        taps = self.base.coupling.mapping.adapter.taps
        with fuse_into(upgraded_unet, lambda level, x: self.fuse(level, x, rows), self.base.levels, taps):
            yield


class JointStage:
    """Gives each row of the upgraded model what the mapping layers make of the base's.

    Args:
        source: gives the base's features.
        coupling: how they enter the upgraded model.
        overlap: where the base's work runs beside the upgraded model's; None for one after the other.
    """

    def __init__(self, source: FeatureSource, coupling: Coupling, overlap: Overlap | None = None) -> None:
        self._source = source
        self._coupling = coupling
        self._overlap = overlap
        self._latest: MappedBase | None = None

    def evaluate(self, evaluation: Evaluation, upgraded_rows: Sequence[Row]) -> JointEvaluation:
        """A model evaluation of the upgraded model; the base runs now, or on its side stream at the first residual.

        Args:
            evaluation: the upgraded model's.
            upgraded_rows: the rows of its batch, in their order.
        """
        if self._overlap is not None:
            self._overlap.begin()
        if self._coupling.window.runs_base(evaluation):
            self._latest = MappedBase(self._source, evaluation, self._coupling, self._overlap)
        if self._latest is not None and self._overlap is None:
            self._latest.run()
        return JointEvaluation(self._latest, tuple(upgraded_rows), self._coupling.window.acts(evaluation))


def _gather(hidden: Tensor, sources: Sequence[tuple[int, ...]]) -> Tensor:
    """The mean of its sources for each row; the output convolution that follows is affine, so it may come after."""
    if all(len(places) == 1 for places in sources):
        return take_rows(hidden, [place for (place,) in sources])
    return torch.stack([take_rows(hidden, places).mean(0) for places in sources])
