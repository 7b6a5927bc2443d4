"""From the pictures in a folder to figures with intervals."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from ..errors import WrongArgument, XAdapterError, first_line
from .evaluate_command import CANNY, CLIP, CONDITION, FID, OF_CLIP, STYLE, Evaluation, Item, Measures, Reference
from .intervals import Compared, MeanOverCaptions, Statistic, compare
from .maps import Extractor, extractor, fitted
from .ways import Folder, Kind, Way, folder_of, measured_ways, ways_of

if TYPE_CHECKING:
    from .figures.clip import Clip

logger = logging.getLogger(__name__)

AT_ONCE = 16
FID_SETTLES = 2048
"""Pictures below which a covariance of 2048 features is singular, and FID much too large."""

Part = TypeVar("Part")

HIGHER, LOWER = "higher", "lower"


@dataclass(frozen=True)
class Figure:
    """A column of the table.

    Attributes:
        name: its heading.
        better: "higher" or "lower".
        description: what it is, in a sentence.
        compared: values, intervals and differences, by the names of the ways.
        values: of each picture, (items,) by way; none where only whole sets have one.
    """

    name: str
    better: str
    description: str
    compared: Compared
    values: Mapping[str, NDArray[numpy.float64]] = field(default_factory=dict)


@dataclass(frozen=True)
class Measured:
    """What the pictures of an evaluation come to.

    Attributes:
        figures: in the order of the table.
        not_computed: figure → reason.
        notes: what a reader has to know.
    """

    figures: tuple[Figure, ...]
    not_computed: Mapping[str, str]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sample:
    """The pictures that are measured: of every caption that has all of its seeds, each way.

    Attributes:
        out: the folder of everything.
        items: caption by caption, each with all seeds.
        seeds: of each caption.
        ways: in the order of the table.
        made: captions that have all pictures of this evaluation itself.
        lacking: how many of those are left out for want of another evaluation's picture, by its row.
    """

    out: Path
    items: tuple[Item, ...]
    seeds: int
    ways: tuple[Way, ...]
    made: int
    lacking: Mapping[str, int]

    @classmethod
    def of(cls, evaluation: Evaluation) -> Sample:
        """As far as the pictures are there."""
        out, ways, seeds = evaluation.out, measured_ways(evaluation), len(evaluation.seeds)
        others = [way for way in ways if way.kind is Kind.OTHER]
        captions = [evaluation.items[start : start + seeds] for start in range(0, len(evaluation.items), seeds)]
        made = [items for items in captions if _have(out, items, ways_of(evaluation))]
        whole = [items for items in made if _have(out, items, others)]
        lacking = {way.name: sum(not _have(out, items, [way]) for items in made) for way in others}
        return cls(out, tuple(item for items in whole for item in items), seeds, ways, len(made), lacking)

    @property
    def captions(self) -> int:
        return len(self.items) // self.seeds

    @cached_property
    def folders(self) -> tuple[Folder, ...]:
        return tuple(folder_of(self.out, item) for item in self.items)

    def of_kind(self, *kinds: Kind) -> tuple[Way, ...]:
        return tuple(way for way in self.ways if way.kind in kinds)

    def per_caption(self, values: NDArray) -> NDArray:
        """(items, …) → (captions, seeds, …)."""
        return values.reshape(self.captions, self.seeds, *values.shape[1:])

    def through(self, measure: Callable[[Sequence[Image.Image]], NDArray], way: Way, description: str) -> NDArray:
        """What is measured of each picture of a way, (items, …)."""
        batches = shown(list(self._batches()), f"{description}: {way.name}")
        return numpy.concatenate([measure([opened(folder.of(way)) for folder in batch]) for batch in batches])

    def _batches(self) -> Iterator[Sequence[Folder]]:
        for start in range(0, len(self.folders), AT_ONCE):
            yield self.folders[start : start + AT_ONCE]


def _have(out: Path, items: Sequence[Item], ways: Sequence[Way]) -> bool:
    return not any(folder_of(out, item).missing(ways) for item in items)


def shown(parts: Sequence[Part], description: str) -> Iterator[Part]:
    """One after the other, with a progress bar."""
    return iter(tqdm(parts, desc=description, dynamic_ncols=True, leave=False))


def opened(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        return picture.convert("RGB")


@dataclass(frozen=True)
class ConditionScores:
    """Of each picture of a way: its map's similarity to the one given, and for edges F1; (items,)."""

    similarities: NDArray[numpy.float64]
    f1s: NDArray[numpy.float64]


class Measuring:
    """Measures a sample.

    Args:
        evaluation: what was asked for.
        sample: of its pictures.
        device: where networks run.
    """

    def __init__(self, evaluation: Evaluation, sample: Sample, device: str = "cpu") -> None:
        self._evaluation, self._sample, self._device = evaluation, sample, device
        self._measures: Measures = evaluation.measures
        self._embedded: dict[Way, NDArray] = {}
        self._scores: dict[str, Mapping[str, ConditionScores]] = {}

    def measured(self) -> Measured:
        """Every figure that was asked for, or the reason why it is not there."""
        figures, not_computed = [], {}
        for description, measure in self._figures():
            try:
                figures.append(measure())
            except XAdapterError as error:
                not_computed[description] = str(error)
            except ModuleNotFoundError as error:
                not_computed[description] = f'the package {error.name} is missing (pip install ".[evaluate]").'
            except Exception as error:
                logger.warning("%s failed:", description, exc_info=True)
                not_computed[description] = f"{type(error).__name__}: {first_line(error)}"
        return Measured(tuple(figures), not_computed, tuple(self._notes(figures)))

    def _figures(self) -> Iterator[tuple[str, Callable[[], Figure]]]:
        metrics = self._measures.metrics
        if FID in metrics:
            yield "FID", self._fid_of_clip if self._measures.fid_features == OF_CLIP else self._fid
        if CLIP in metrics:
            yield "CLIP score", self._clip_score
        if CONDITION in metrics:
            yield from self._conditions()
        if STYLE in metrics:
            yield "Style similarity", self._style

    def _conditions(self) -> Iterator[tuple[str, Callable[[], Figure]]]:
        kinds = self._evaluation.kinds
        if not kinds:
            yield "Condition reconstruction", self._no_condition
        for kind in kinds:
            yield f"SSIM of {kind} maps", lambda kind=kind: self._map_similarity(kind)
            if kind == CANNY:
                yield "F1 of edges", self._edge_f1

    def _notes(self, figures: Sequence[Figure]) -> Iterator[str]:
        for name, captions in self._sample.lacking.items():
            if captions:
                yield f"Not measured: {captions} of {self._sample.made} captions, of which '{name}' has no picture."
        pictures = len(self._sample.items)
        if pictures < FID_SETTLES and any(figure.name == "FID" for figure in figures):
            yield (
                f"FID of {pictures} pictures is far above what it settles to with thousands: compare it within this "
                "table alone."
            )

    # --- figures ------------------------------------------------------------------------------------------------------

    def _fid(self) -> Figure:
        if self._measures.inception is None:
            raise WrongArgument("--inception names no weights of InceptionV3.")
        from .figures.frechet import Inception

        inception = Inception(self._measures.inception, self._device)
        return self._frechet("FID", "Fréchet Inception distance", inception.features)

    def _fid_of_clip(self) -> Figure:
        return self._frechet("Fréchet, CLIP", "Fréchet distance of CLIP's embeddings", self._clip.of_pictures)

    def _frechet(self, name: str, description: str, measure: Callable[[Sequence[Image.Image]], NDArray]) -> Figure:
        if self._sample.captions < 2:
            raise WrongArgument("it takes two captions at least.")
        from .figures.frechet import FrechetDistance

        found = {
            way.name: self._sample.per_caption(self._sample.through(measure, way, name)) for way in self._sample.ways
        }
        if (given := self._measures.fid_against) is not None:
            whose, reference = given.description, self._of_given_pictures(given, measure)
        else:
            (plain,) = self._sample.of_kind(Kind.UPGRADED)
            whose, reference = "of plain SDXL", found.pop(plain.name)
        statistics = {way: FrechetDistance(ours, reference, self._device) for way, ours in found.items()}
        return self._figure(name, LOWER, f"{description} from the pictures {whose}", statistics)

    def _of_given_pictures(self, reference: Reference, measure: Callable[[Sequence[Image.Image]], NDArray]) -> NDArray:
        """What is measured of each caption's picture, at SDXL's size, (captions, …)."""
        paths = [reference.pictures[caption] for caption in dict.fromkeys(item.caption for item in self._sample.items)]
        batches = [paths[start : start + AT_ONCE] for start in range(0, len(paths), AT_ONCE)]
        size = self._evaluation.job.size
        return numpy.concatenate([measure([fitted(opened(path), size) for path in batch]) for batch in batches])

    def _clip_score(self) -> Figure:
        from .figures.clip import similarity

        texts = [item.caption.text for item in self._sample.items]
        of_texts = numpy.concatenate(
            [self._clip.of_texts(texts[start : start + AT_ONCE]) for start in range(0, len(texts), AT_ONCE)]
        )
        values = {way.name: similarity(self._embeddings(way), of_texts) for way in self._sample.ways}
        return self._mean("CLIP score", HIGHER, "cosine of CLIP's embeddings of picture and caption", values)

    def _style(self) -> Figure:
        from .figures.clip import similarity

        if not self._sample.of_kind(Kind.BASE):
            raise WrongArgument("there is no picture of SD1.5 to be like.")
        (base,) = self._sample.of_kind(Kind.BASE)
        others = self._sample.of_kind(Kind.SDEDIT, Kind.ADAPTER, Kind.SINGLE, Kind.UPGRADED, Kind.OTHER)
        values = {way.name: similarity(self._embeddings(way), self._embeddings(base)) for way in others}
        return self._mean(
            "Style similarity", HIGHER, "cosine of CLIP's embeddings of the picture and of SD1.5's own", values
        )

    def _no_condition(self) -> Figure:
        raise WrongArgument("there is no --controlnet whose map could be kept.")

    def _map_similarity(self, kind: str) -> Figure:
        return self._mean(
            f"SSIM, {kind}",
            HIGHER,
            f"structural similarity of the {kind} map of the picture, at SD1.5's size, and the one that was given",
            {way: found.similarities for way, found in self._condition_scores(kind).items()},
        )

    def _edge_f1(self) -> Figure:
        return self._mean(
            "F1, edges",
            HIGHER,
            "F1 of the edges of the picture, at SD1.5's size, and of those given, within two pixels",
            {way: found.f1s for way, found in self._condition_scores(CANNY).items()},
        )

    # --- what they share ----------------------------------------------------------------------------------------------

    @cached_property
    def _clip(self) -> Clip:
        if self._measures.clip is None:
            raise WrongArgument("--clip names no CLIP model.")
        from .figures.clip import Clip

        return Clip(self._measures.clip, self._device)

    def _embeddings(self, way: Way) -> NDArray:
        if way not in self._embedded:
            self._embedded[way] = self._sample.through(self._clip.of_pictures, way, "CLIP")
        return self._embedded[way]

    def _condition_scores(self, kind: str) -> Mapping[str, ConditionScores]:
        """By the names of the ways."""
        if kind not in self._scores:
            extract = extractor(kind, self._measures.depth, self._device)
            self._scores[kind] = {way.name: self._scores_of(way, kind, extract) for way in self._sample.ways}
        return self._scores[kind]

    def _scores_of(self, way: Way, kind: str, extract: Extractor) -> ConditionScores:
        from .figures.condition import edge_f1, map_similarity

        similarities, f1s = [], []
        for folder in shown(self._sample.folders, f"{kind}: {way.name}"):
            given = opened(folder.map_of(kind))
            found = extract(opened(folder.of(way)).resize(given.size, Image.Resampling.LANCZOS))
            similarities.append(map_similarity(found, given))
            if kind == CANNY:
                f1s.append(edge_f1(found, given))
        return ConditionScores(numpy.array(similarities), numpy.array(f1s))

    def _mean(self, name: str, better: str, description: str, values: Mapping[str, NDArray]) -> Figure:
        statistics = {way: MeanOverCaptions(self._sample.per_caption(ours)) for way, ours in values.items()}
        return self._figure(name, better, description, statistics, values)

    def _figure(
        self,
        name: str,
        better: str,
        description: str,
        statistics: Mapping[str, Statistic],
        values: Mapping[str, NDArray] | None = None,
    ) -> Figure:
        compared = compare(statistics, self._sample.captions, self._measures.resamples)
        return Figure(name, better, description, compared, values or {})
