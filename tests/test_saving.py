"""A file that cannot be written is told with the reason, and what was there before stays."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from lib_xadapter.errors import WrongFile
from lib_xadapter.saving import write_tensors, write_whole

ALLOWED = 4096
"""Bytes of a file, while files are short."""
WRITERS = {
    "bytes": lambda path, count: write_whole(path, lambda to: to.write_bytes(bytes(count))),
    "tensors": lambda path, count: write_tensors(path, {"weight": torch.zeros(count // 4)}, {}),
}


@pytest.fixture(params=WRITERS)
def write(request):
    return WRITERS[request.param]


@contextmanager
def files_are_short() -> Iterator[None]:
    """The system itself lets no file grow; not a fixture, as pytest writes between a test and its fixtures' ends."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (ALLOWED, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_one_that_grows_too_long_leaves_the_earlier_one(write, tmp_path):
    path = tmp_path / "folder" / "file.safetensors"
    write(path, ALLOWED // 2)
    before = path.read_bytes()
    with files_are_short(), pytest.raises(WrongFile, match=r"file.safetensors cannot be written: .*File too large"):
        write(path, ALLOWED * 2)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_in_whose_place_is_a_file_is_told(write, tmp_path):
    (tmp_path / "folder").write_text("no folder")
    with pytest.raises(WrongFile, match=r"file.safetensors cannot be written: File exists"):
        write(tmp_path / "folder" / "file.safetensors", 1)


def test_others_may_read_what_is_written(write, tmp_path):
    ordinary = tmp_path / "ordinary"
    ordinary.touch()
    written = write(tmp_path / "file.safetensors", ALLOWED)
    assert Path(written).stat().st_mode == ordinary.stat().st_mode
