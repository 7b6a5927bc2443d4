"""The pictures and captions that training sees: the usable ones of a source, by number, read when they are asked for.

One pass over the source notes where every picture lies, its size, its caption and a hash of its bytes; that index is an
Arrow file of the `datasets` library, which is mapped into memory and not read into it. So a picture out of millions is
found without reading those before it, and what runs twice or goes on later need not go over the source again.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy
from datasets import Dataset, Features, Value
from datasets.arrow_writer import ArrowWriter
from PIL import Image, ImageOps

from ..errors import WrongArgument, WrongFile
from .samples import PICTURES, Place, Sample, files_below, read_bytes, samples_of, source_files

logger = logging.getLogger(__name__)

INDEX_VERSION = 1
"""Goes up whenever an index of older versions must not be taken for one of this."""

CAPTIONS = ("txt", "text", "caption", "prompt")
"""Columns in which a caption is looked for: a `.txt` beside the picture, Hugging Face's, LAION's and img2dataset's."""
AESTHETICS = ("aesthetic", "aesthetic_score", "aesthetics")
"""LAION-Aesthetics' names (v1, v2)."""
WATERMARK = ("pwatermark", "watermark")
ORIGINAL_WIDTH, ORIGINAL_HEIGHT = ("original_width",), ("original_height",)
"""What a picture measured before img2dataset resized it."""

MISSING, BROKEN, NO_CAPTION = "not there", "broken", "without a caption"
NAMED = 3
"""Skipped pictures that a message names."""

PICTURE_ROW = Features(
    {
        "name": Value("string"),
        "caption": Value("string"),
        "digest": Value("binary"),
        "width": Value("int32"),
        "height": Value("int32"),
        "original_width": Value("int32"),
        "original_height": Value("int32"),
        "file": Value("string"),
        "start": Value("int64"),
        "length": Value("int64"),
        "column": Value("string"),
    }
)
SKIPPED_ROW = Features({"name": Value("string"), "reason": Value("string")})
PICTURES_FILE, SKIPPED_FILE, FACTS_FILE = "pictures.arrow", "skipped.arrow", "facts.json"
ROWS_AT_ONCE = 1000


@dataclass(frozen=True)
class PictureOptions:
    """Which pictures are taken; the defaults take every one that can be read and has a caption.

    Attributes:
        minimum_size: of the shorter side, in pixels.
        minimum_aesthetics: of LAION's column, where it is there.
        maximum_watermark: of LAION's probability, where it is there.
        caption_column: of JSON, metadata.jsonl or parquet; None takes a `.txt`, text, caption or prompt.
        needs_caption: whether those without a caption are left out.
    """

    minimum_size: int = 0
    minimum_aesthetics: float | None = None
    maximum_watermark: float | None = None
    caption_column: str | None = None
    needs_caption: bool = True

    def __post_init__(self) -> None:
        if self.minimum_size < 0:
            raise WrongArgument(f"'minimum_size' is {self.minimum_size}, expected a whole number from 0.")
        watermark = self.maximum_watermark
        if watermark is not None and not 0 <= watermark <= 1:
            raise WrongArgument(f"'maximum_watermark' is {watermark:g}, expected a number from 0 to 1.")


@dataclass(frozen=True)
class Example:
    """A picture, whole, in RGB and upright, and its caption."""

    name: str
    caption: str
    picture: Image.Image


@dataclass(frozen=True)
class Noted:
    """What the index knows of a picture without reading it.

    Attributes:
        name, caption: as in `Example`.
        digest: a hash of its bytes.
        place: where those lie.
    """

    name: str
    caption: str
    digest: bytes
    place: Place


class Pictures(Sequence[Example]):
    """The usable pictures of a source, by number.

    Attributes:
        skipped: names of those that are not usable, by reason.
        fingerprint: a hash of all bytes and captions that are used, in their order.
        sizes: (pictures, 2), width and height of each in pixels.
        columns: names, in small letters, of what stands beside any picture.
        original_sizes: the same before it was resized for the data set, where that is known.
    """

    def __init__(self, folder: Path, owned: tempfile.TemporaryDirectory | None = None) -> None:
        self._owned = owned
        self._rows = Dataset.from_file(str(folder / PICTURES_FILE))
        facts = json.loads((folder / FACTS_FILE).read_text(encoding="utf-8"))
        self.fingerprint: str = facts["fingerprint"]
        self.columns = frozenset(facts["columns"])
        self.sizes: numpy.ndarray = _numbers(self._rows, "width", "height")
        self.original_sizes: numpy.ndarray = _numbers(self._rows, "original_width", "original_height")
        self.skipped: Mapping[str, Sequence[str]] = _skipped(folder)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> Example:
        """Raises: WrongFile: the picture is no longer what it was."""
        noted = self.noted(number)
        data = read_bytes(noted.place)
        if _digest(data) != noted.digest:
            raise WrongFile(f"{noted.name} is no longer the picture that it was when {noted.place.file} was opened.")
        return Example(noted.name, noted.caption, upright(data))

    def noted(self, number: int) -> Noted:
        """What is known of a picture without reading it."""
        if not -len(self) <= number < len(self):
            raise IndexError(f"There is no picture {number}, there are {len(self)}.")
        row = self._rows[int(number)]
        place = Place(row["file"], row["start"], row["length"], row["column"])
        return Noted(row["name"], row["caption"], row["digest"], place)


@dataclass(frozen=True)
class BasePictures:
    """What the base sees in the place of each picture: another of the same name.

    Attributes:
        pictures: those.
        numbers: of each picture's other one.
    """

    pictures: Pictures
    numbers: Sequence[int]

    @classmethod
    def beside(cls, pictures: Pictures, others: Pictures) -> BasePictures:
        """Raises: WrongFile: a picture has none of its name, or there are two of one."""
        by_name: dict[str, int] = {}
        for number in range(len(others)):
            name = others.noted(number).name
            before = by_name.setdefault(_stem(name), number)
            if before != number:
                raise WrongFile(f"{others.noted(before).name} and {name} have one name, so that neither is meant.")
        names = [pictures.noted(number).name for number in range(len(pictures))]
        if missing := [name for name in names if _stem(name) not in by_name]:
            raise WrongFile(f"there is no picture for the base in the place of {_named(missing)}.")
        return cls(others, [by_name[_stem(name)] for name in names])

    def __getitem__(self, number: int) -> Example:
        return self.pictures[self.numbers[number]]

    def noted(self, number: int) -> Noted:
        """As `Pictures.noted`."""
        return self.pictures.noted(self.numbers[number])


def _stem(name: str) -> str:
    """Without the suffix of a picture file; rows of parquet files have none."""
    stem, suffix = os.path.splitext(name)
    return stem if suffix.lower() in PICTURES else name


def open_pictures(source: str, options: PictureOptions | None = None, cache: Path | None = None) -> Pictures:
    """The usable pictures of a source.

    Args:
        source: a folder with captions as `.txt` or in metadata.jsonl; WebDataset shards (.tar) or parquet files with
            bytes, as a path, a folder of them or a pattern.
        options: which of them.
        cache: a folder that keeps the index, so that the source is gone over once; several processes may share it.

    Raises:
        WrongFile: there is no such source, it cannot be read, or none of its pictures is usable.
    """
    options = options or PictureOptions()
    files = source_files(source)
    if cache is None:
        owned = tempfile.TemporaryDirectory(prefix="xadapter-pictures-")
        folder = Path(owned.name)
        _write_index(folder, files, options)
    else:
        owned, folder = None, cache / f"pictures-{_key(files, options)}"
        if not folder.is_dir():
            _write_whole_index(folder, files, options)
    pictures = Pictures(folder, owned)
    _report(source, pictures)
    _report_columns(source, pictures, options)
    return pictures


def upright(data: bytes) -> Image.Image:
    """A picture of its file's bytes: RGB, turned as its EXIF says, over white where it is transparent."""
    with Image.open(io.BytesIO(data)) as opened:
        picture = ImageOps.exif_transpose(opened)
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        return picture.convert("RGB")


# --- the index --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Judged:
    sample: Sample
    reason: str | None
    caption: str = ""
    digest: bytes = b""
    size: tuple[int, int] = (0, 0)

    def row(self) -> dict[str, Any]:
        (width, height), columns = self.size, self.sample.columns
        return {
            "name": self.sample.name,
            "caption": self.caption,
            "digest": self.digest,
            "width": width,
            "height": height,
            "original_width": int(_number(columns, ORIGINAL_WIDTH) or width),
            "original_height": int(_number(columns, ORIGINAL_HEIGHT) or height),
            **asdict(self.sample.place),
        }


def _write_whole_index(folder: Path, files: Sequence[Path], options: PictureOptions) -> None:
    """Beside its place first, so that it is whole or not there; another process may be faster."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise WrongFile(f"{folder.parent} cannot be written to: {error.strerror}.") from error
    try:
        _write_index(beside, files, options)
        try:
            os.rename(beside, folder)
        except OSError:
            if not folder.is_dir():
                raise
    except OSError as error:
        raise WrongFile(f"{folder} cannot be written: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _write_index(folder: Path, files: Sequence[Path], options: PictureOptions) -> None:
    whole = hashlib.sha256()
    columns: set[str] = set()
    samples = (sample for path in files for sample in samples_of(path))
    with (
        ArrowWriter(path=str(folder / PICTURES_FILE), features=PICTURE_ROW, writer_batch_size=ROWS_AT_ONCE) as usable,
        ArrowWriter(path=str(folder / SKIPPED_FILE), features=SKIPPED_ROW, writer_batch_size=ROWS_AT_ONCE) as skipped,
    ):
        for judged in _in_order(lambda sample: _judge(sample, options), samples):
            columns.update(judged.sample.columns)
            if judged.reason is not None:
                skipped.write({"name": judged.sample.name, "reason": judged.reason})
                continue
            usable.write(judged.row())
            whole.update(judged.digest + hashlib.sha256(judged.caption.encode()).digest())
        usable.finalize()
        skipped.finalize()
    facts = {"fingerprint": whole.hexdigest(), "columns": sorted(columns)}
    (folder / FACTS_FILE).write_text(json.dumps(facts), encoding="utf-8")


def _judge(sample: Sample, options: PictureOptions) -> _Judged:
    """Whether a picture is usable, by decoding it."""
    caption = _caption(sample.columns, options)
    if reason := _filtered(sample.columns, options):
        return _Judged(sample, reason)
    if sample.data is None:
        return _Judged(sample, MISSING)
    try:
        size = upright(sample.data).size
    except Exception as error:  # a broken picture can raise anything
        logger.debug("%s is broken: %s", sample.name, error)
        return _Judged(sample, BROKEN)
    if not caption and options.needs_caption:
        return _Judged(sample, NO_CAPTION)
    if min(size) < options.minimum_size:
        return _Judged(sample, f"smaller than {options.minimum_size} pixels")
    return _Judged(sample, None, caption, _digest(sample.data), size)


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def _caption(columns: Mapping[str, Any], options: PictureOptions) -> str:
    names = CAPTIONS if options.caption_column is None else (options.caption_column.lower(),)
    texts = (columns.get(name) for name in names)
    return next((text.strip() for text in texts if isinstance(text, str) and text.strip()), "")


def _filtered(columns: Mapping[str, Any], options: PictureOptions) -> str | None:
    aesthetics, watermark = _number(columns, AESTHETICS), _number(columns, WATERMARK)
    if None not in (aesthetics, options.minimum_aesthetics) and aesthetics < options.minimum_aesthetics:
        return f"with aesthetics below {options.minimum_aesthetics:g}"
    if None not in (watermark, options.maximum_watermark) and watermark > options.maximum_watermark:
        return f"with a watermark likelier than {options.maximum_watermark:g}"
    return None


def _number(columns: Mapping[str, Any], names: Sequence[str]) -> float | None:
    found = (columns[name] for name in names if isinstance(columns.get(name), (int, float)))
    return next(filter(math.isfinite, found), None)


Given, Made = TypeVar("Given"), TypeVar("Made")


def _in_order(make: Callable[[Given], Made], given: Iterable[Given]) -> Iterator[Made]:
    """What is made of each, by several threads, in the order given; only a few are held at once."""
    workers = min(8, os.cpu_count() or 1)
    waiting: deque[Future[Made]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for one in given:
            waiting.append(pool.submit(make, one))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _key(files: Sequence[Path], options: PictureOptions) -> str:
    """Of everything that an index depends on: which files, their sizes and times, the options."""
    key = hashlib.sha256(repr((INDEX_VERSION, options)).encode())
    for path in files:
        for file in files_below(path) if path.is_dir() else (path,):
            stat = file.stat()
            key.update(repr((str(file.absolute()), stat.st_size, stat.st_mtime_ns)).encode())
    return key.hexdigest()[:32]


def _numbers(rows: Dataset, *columns: str) -> numpy.ndarray:
    """(rows, columns) of the index."""
    return numpy.stack([rows.data.column(name).to_numpy() for name in columns], axis=1)


def _skipped(folder: Path) -> Mapping[str, Sequence[str]]:
    rows = Dataset.from_file(str(folder / SKIPPED_FILE))
    names: dict[str, list[str]] = {}
    for name, reason in zip(rows["name"], rows["reason"], strict=True):
        names.setdefault(reason, []).append(name)
    return {reason: tuple(found) for reason, found in names.items()}


def _report(source: str, pictures: Pictures) -> None:
    skipped = sum(map(len, pictures.skipped.values()))
    reasons = ", ".join(f"{len(names)} {reason} ({_named(names)})" for reason, names in pictures.skipped.items())
    if len(pictures):
        if skipped:
            logger.warning(
                "Of %s, %d of %d pictures are skipped: %s.", source, skipped, skipped + len(pictures), reasons
            )
        return
    if not skipped:
        raise WrongFile(f"{source} holds no pictures: expected a folder of them, .tar shards or .parquet files.")
    hint = ""
    if set(pictures.skipped) == {NO_CAPTION}:
        hint = "; a caption stands in a .txt of the picture's name or in a metadata.jsonl"
    raise WrongFile(f"{source} holds no usable picture: {reasons}{hint}.")


def _report_columns(source: str, pictures: Pictures, options: PictureOptions) -> None:
    filters = (
        ("aesthetics", options.minimum_aesthetics, AESTHETICS),
        ("watermark", options.maximum_watermark, WATERMARK),
    )
    for what, limit, names in filters:
        if limit is not None and not pictures.columns.intersection(names):
            logger.warning("Nothing in %s is filtered by %s: it has no column %s.", source, what, " or ".join(names))


def _named(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (", …" if len(names) > NAMED else "")
