"""The captions that are evaluated, and the pictures that belong to them."""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import WrongArgument, WrongFile

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
EMPTY, NO_PICTURE = "empty caption", "no picture"


@dataclass(frozen=True)
class Caption:
    """A caption and its picture.

    Attributes:
        name: of its line, its picture's id, or its file.
        text: what the models are told.
        picture: what a control map is made of; None where there is none.
    """

    name: str
    text: str
    picture: Path | None = None

    @property
    def key(self) -> str:
        """A file name that no other caption has, also in a longer list."""
        readable = re.sub(r"[^A-Za-z0-9._-]+", "_", self.name)[-48:]
        digest = hashlib.sha1("\n".join((self.name, self.text)).encode()).hexdigest()
        return f"{readable}-{digest[:8]}"


@dataclass(frozen=True)
class Captions:
    """What a source holds.

    Attributes:
        usable: in the order of the source.
        skipped: reason → names of what cannot be used.
    """

    usable: tuple[Caption, ...]
    skipped: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def read_captions(source: Path, pictures: Path | None = None, needs_pictures: bool = False, limit: int = 0) -> Captions:
    """The captions of a text file, of a captions JSON in COCO's form, or of a folder.

    Args:
        source: a text file with a caption a line; a `.json` of COCO, of which the first caption of each picture is
            taken; or a folder of pictures with a `.txt` beside each.
        pictures: the folder that COCO's pictures lie in.
        needs_pictures: captions without a picture are skipped.
        limit: so many at most; 0 for all.

    Raises:
        WrongFile: it cannot be read, or is of another kind.
        WrongArgument: nothing in it can be used.
    """
    if source.is_dir():
        found = _of_folder(source)
    elif source.suffix.lower() == ".json":
        found = _of_coco(source, pictures)
    else:
        found = _of_text(source)
    usable, skipped = [], defaultdict(list)
    for caption in found:
        if not caption.text:
            skipped[EMPTY].append(caption.name)
        elif needs_pictures and caption.picture is None:
            skipped[NO_PICTURE].append(caption.name)
        elif not limit or len(usable) < limit:
            usable.append(caption)
    if not usable:
        reasons = ", ".join(f"{len(names)} with {reason}" for reason, names in skipped.items()) or "it holds none"
        raise WrongArgument(f"--captions: {source} has no caption that can be used ({reasons}).")
    return Captions(tuple(usable), {reason: tuple(names) for reason, names in skipped.items()})


def _text_of(path: Path, option: str = "--captions") -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise WrongFile(f"{option}: {path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise WrongFile(f"{option}: {path} is no text in UTF-8.") from error


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _of_text(path: Path) -> Iterator[Caption]:
    for number, line in enumerate(_text_of(path).splitlines(), start=1):
        if line.strip() and not line.startswith("#"):
            yield Caption(f"{number:06d}", _one_line(line))


def _of_folder(folder: Path) -> Iterator[Caption]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    pictures = [path for path in files if path.suffix.lower() in PICTURE_SUFFIXES]
    pictured = {picture.with_suffix("") for picture in pictures}
    for picture in pictures:
        text = picture.with_suffix(".txt")
        yield Caption(_name_in(folder, picture), _one_line(_text_of(text)) if text.is_file() else "", picture)
    for path in files:
        if path.suffix.lower() == ".txt" and path.with_suffix("") not in pictured:
            yield Caption(_name_in(folder, path), _one_line(_text_of(path)))


def _name_in(folder: Path, path: Path) -> str:
    return path.relative_to(folder).with_suffix("").as_posix()


def picture_named(folder: Path, name: str, option: str) -> Path:
    """The picture of a caption's name in another folder.

    Raises:
        WrongFile: naming the option: there is none.
    """
    paths = (folder / f"{name}{suffix}" for suffix in PICTURE_SUFFIXES)
    if (found := next(filter(Path.is_file, paths), None)) is None:
        raise WrongFile(f"{option}: {folder} has no picture '{name}'.")
    return found


def text_named(folder: Path, name: str) -> str:
    """The text of a caption's name in another folder, in one line; it can be empty.

    Raises:
        WrongFile: there is none, or it cannot be read.
    """
    return _one_line(_text_of(folder / f"{name}.txt", "--upgraded-captions"))


def _of_coco(path: Path, pictures: Path | None) -> Iterator[Caption]:
    try:
        content = json.loads(_text_of(path))
        texts = _first_captions(content["annotations"])
        files = [(int(image["id"]), str(image["file_name"])) for image in content["images"]]
    except (ValueError, KeyError, TypeError) as error:
        raise WrongFile(
            f"--captions: {path.name} is no captions JSON of COCO, which has 'images' with 'id' and 'file_name', and "
            "'annotations' with 'image_id', 'id' and 'caption'."
        ) from error
    if pictures is not None and not pictures.is_dir():
        raise WrongFile(f"--pictures: there is no folder {pictures}.")
    for number, file in sorted(files):
        found = pictures / file if pictures is not None else None
        yield Caption(f"{number:012d}", texts.get(number, ""), found if found is not None and found.is_file() else None)


def _first_captions(annotations: Iterable[Mapping[str, Any]]) -> dict[int, str]:
    """Of each picture, by the annotations' ids."""
    ordered: Sequence[Mapping[str, Any]] = sorted(annotations, key=lambda one: int(one["id"]), reverse=True)
    return {int(one["image_id"]): _one_line(str(one["caption"])) for one in ordered}


def literal(text: str) -> str:
    """A caption in the WebUI's grammar of prompts, where brackets, colons, AND and BREAK mean something.

    CLIP's tokenizers take upper and lower case alike.
    """
    escaped = re.sub(r"([\\()\[\]])", r"\\\1", text.lower())
    # a number behind a last colon would be a weight
    return re.sub(r":(?=\s*[-+.\d])", r":\\", escaped)
