"""What a source of pictures holds, sample after sample, and where each lies, so that it can be read again alone.

A sample is a picture and what stands beside it under the same name: `a.jpg`, `a.txt`, `a.json`. So kohya's folders, the
folders and shards of img2dataset, and WebDataset's shards are read alike.
"""

from __future__ import annotations

import glob
import json
import os
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from ..errors import WrongFile, first_line

PICTURES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".avif"})
METADATA = "metadata.jsonl"
TAR_BLOCK = 512
PICTURE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "picture", "img", "bytes")
"""Of a parquet file: Hugging Face's name, img2dataset's, which are those of the formats, and others."""
ROWS_AT_ONCE = 16


@dataclass(frozen=True)
class Place:
    """Where a picture's bytes lie.

    Attributes:
        file: the picture itself, a shard, or a parquet file.
        start: first byte in a shard, row in a parquet file.
        length: bytes in a shard.
        column: of a parquet file.
    """

    file: str
    start: int = 0
    length: int = 0
    column: str = ""


@dataclass(frozen=True)
class Sample:
    """A picture as it was found.

    Attributes:
        name: by which a user finds it again.
        place: where it can be read again.
        data: the picture's bytes; None where there are none.
        columns: what stands beside it, by names in small letters; the caption of a `.txt` is "txt".
    """

    name: str
    place: Place
    data: bytes | None
    columns: Mapping[str, Any] = field(default_factory=dict)


def source_files(source: str) -> list[Path]:
    """The shards, the parquet files or the folder that a source names.

    Raises:
        WrongFile: there is no such thing.
    """
    path = Path(source)
    if path.is_dir():
        for ending in ("*.tar", "*.parquet"):
            found = sorted(path.glob(ending))
            if found and not any(path.glob(METADATA)):
                return found
        return [path]
    if path.exists():
        return [path]
    found = sorted(map(Path, glob.glob(source, recursive=True)))
    if not found:
        raise WrongFile(f"There is no {source}: expected a folder, a .tar, a .parquet or a pattern of those.")
    return found


def samples_of(path: Path) -> Iterator[Sample]:
    """The samples of a folder or file, in an order that does not change.

    Raises:
        WrongFile: naming the file that cannot be read as what its name says.
    """
    if path.is_dir():
        yield from _folder(path)
    elif path.suffix == ".tar":
        yield from _tar(path)
    elif path.suffix == ".parquet":
        yield from _parquet(path)
    else:
        raise WrongFile(f"{path} is no source of pictures: expected a folder, a .tar or a .parquet.")


def read_bytes(place: Place) -> bytes:
    """A picture's bytes, once more.

    Raises:
        WrongFile: they are no longer there.
    """
    path = Path(place.file)
    try:
        if place.column:
            return _parquet_bytes(path, place)
        if path.suffix != ".tar":
            return path.read_bytes()
        with path.open("rb") as file:
            file.seek(place.start)
            return file.read(place.length)
    except (OSError, pyarrow.ArrowException, StopIteration) as error:
        raise WrongFile(f"{path} cannot be read any more: {first_line(error)}.") from error


# --- folders ----------------------------------------------------------------------------------------------------------


def files_below(folder: Path) -> Iterator[Path]:
    """All files of a folder and of those in it, in order; hidden ones left out."""
    for here, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(here, name) for name in sorted(names) if not name.startswith("."))


def _folder(folder: Path) -> Iterator[Sample]:
    metadata: dict[Path, Mapping[str, Any]] = {}
    for path in files_below(folder):
        if path.name == METADATA:
            metadata |= _read_metadata(path)
    for path in files_below(folder):
        if path.suffix.lower() in PICTURES:
            columns = _beside(path) | dict(metadata.pop(path, {}))
            yield Sample(os.path.relpath(path, folder), Place(str(path)), _read(path), columns)
    for path, columns in metadata.items():
        data = _read(path) if path.is_file() else None
        yield Sample(os.path.relpath(path, folder), Place(str(path)), data, columns)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise WrongFile(f"{path} cannot be read: {error.strerror}.") from error


def _read_metadata(path: Path) -> dict[Path, Mapping[str, Any]]:
    """Hugging Face's: a line for each picture, an object with `file_name` and what belongs to it."""
    found = {}
    for number, line in enumerate(_text(_read(path)).splitlines(), 1):
        if not line.strip():
            continue
        row = _json_object(line)
        if row is None or not isinstance(row.get("file_name"), str):
            raise WrongFile(f"{path}, line {number}: expected an object with 'file_name', as {METADATA} has them.")
        found[Path(os.path.normpath(path.parent / row["file_name"]))] = row
    return found


def _beside(picture: Path) -> dict[str, Any]:
    columns = {}
    if (path := picture.with_suffix(".json")).is_file():
        columns |= _json_object(_text(_read(path))) or {}
    if (path := picture.with_suffix(".txt")).is_file():
        columns["txt"] = _text(_read(path))
    return columns


def _text(data: bytes) -> str:
    # editors of Windows begin with a byte order mark
    return data.decode("utf-8-sig", "replace")


def _json_object(text: str) -> dict[str, Any] | None:
    """By names in small letters; None where it is no object."""
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return {str(key).lower(): value for key, value in found.items()} if isinstance(found, dict) else None


# --- shards -----------------------------------------------------------------------------------------------------------


def _tar(path: Path) -> Iterator[Sample]:
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            parts: dict[str, tarfile.TarInfo] = {}
            before = None
            while (member := archive.next()) is not None:
                archive.members = []  # which would grow with the shard
                stem, suffix = _split(member.name)
                if stem != before and parts:
                    yield from _tar_sample(path, archive, parts)
                    parts = {}
                before = stem
                if member.isfile():
                    parts[suffix] = member
            yield from _tar_sample(path, archive, parts)
            file.seek(archive.offset)
            if any(file.read(TAR_BLOCK)):
                raise tarfile.ReadError(f"what stands at byte {archive.offset} belongs to no member")
    except tarfile.TarError as error:
        raise WrongFile(
            f"{path} is cut off or is no .tar (compressed ones cannot be read): {first_line(error)}."
        ) from error
    except OSError as error:
        raise WrongFile(f"{path} cannot be read: {error.strerror}.") from error


def _split(name: str) -> tuple[str, str]:
    """WebDataset's rule: a sample is called as far as the first dot of the last part of its path."""
    folder, _, last = name.rpartition("/")
    stem, dot, rest = last.partition(".")
    return f"{folder}/{stem}" if folder else stem, (dot + rest).lower()


def _tar_sample(path: Path, archive: tarfile.TarFile, parts: Mapping[str, tarfile.TarInfo]) -> Iterator[Sample]:
    picture = next((member for suffix, member in parts.items() if suffix in PICTURES), None)
    if picture is None:
        return
    columns = {}
    if ".json" in parts:
        columns |= _json_object(_text(archive.extractfile(parts[".json"]).read())) or {}
    if ".txt" in parts:
        columns["txt"] = _text(archive.extractfile(parts[".txt"]).read())
    place = Place(str(path), picture.offset_data, picture.size)
    yield Sample(f"{path.name}/{picture.name}", place, archive.extractfile(picture).read(), columns)


# --- parquet ----------------------------------------------------------------------------------------------------------


def _parquet(path: Path) -> Iterator[Sample]:
    try:
        with _open_parquet(path) as file:
            column = _picture_column(path, file.schema_arrow)
            others = [name for name in file.schema_arrow.names if name != column and _is_plain(file.schema_arrow, name)]
            for row, found in enumerate(_rows(file, [column, *others])):
                columns = {name.lower(): found[name] for name in others}
                place = Place(str(path), row, column=column)
                yield Sample(f"{path.name}, row {row}", place, _data(found[column]), columns)
    except pyarrow.ArrowException as error:
        raise WrongFile(f"{path} is cut off or is no .parquet: {first_line(error)}") from error
    except OSError as error:
        raise WrongFile(f"{path} cannot be read: {error.strerror or first_line(error)}.") from error


def _open_parquet(path: Path) -> pyarrow.parquet.ParquetFile:
    # a buffer, else a whole column of a row group is read at once
    return pyarrow.parquet.ParquetFile(path, buffer_size=2**16)


def _rows(file: pyarrow.parquet.ParquetFile, columns: list[str]) -> Iterator[dict[str, Any]]:
    # group after group: a reader of several holds on to what it has read
    for group in range(file.metadata.num_row_groups):
        for batch in file.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=columns, use_threads=False):
            yield from batch.to_pylist()


def _picture_column(path: Path, schema: pyarrow.Schema) -> str:
    there = {name.lower(): name for name in schema.names}
    for name in PICTURE_COLUMNS:
        if name in there and _holds_bytes(schema.field(there[name]).type):
            return there[name]
    raise WrongFile(
        f"{path} holds no pictures: expected a column of bytes called {' or '.join(PICTURE_COLUMNS[:3])}, "
        f"it has {', '.join(schema.names)}."
    )


def _holds_bytes(kind: pyarrow.DataType) -> bool:
    if pyarrow.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)


def _is_plain(schema: pyarrow.Schema, name: str) -> bool:
    kind = schema.field(name).type
    text = pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)
    return text or pyarrow.types.is_integer(kind) or pyarrow.types.is_floating(kind)


def _data(value: bytes | Mapping[str, Any] | None) -> bytes | None:
    return value.get("bytes") if isinstance(value, Mapping) else value


def _parquet_bytes(path: Path, place: Place) -> bytes:
    """Of the row's own group alone, and no further than to the row."""
    with _open_parquet(path) as file:
        group, first = 0, 0
        while place.start >= first + file.metadata.row_group(group).num_rows:
            first += file.metadata.row_group(group).num_rows
            group += 1
        wanted = place.start - first
        for batch in file.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=[place.column], use_threads=False):
            if wanted < len(batch):
                return _data(batch.column(0)[wanted].as_py())
            wanted -= len(batch)
    raise WrongFile(f"{path} has no row {place.start} any more.")
