"""What a file was found to be is looked up once, and again where the file or X-Adapter is another one."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from .server import WebUIServer

NAME = "known"
OF_SD15, OF_SDXL = f"LoRA {NAME} to SD1.5", f"LoRA {NAME} to SDXL"
THEN = (1_700_000_000, 1_700_000_000)
LONG_BEFORE = (1_000_000_000, 1_000_000_000)


@pytest.fixture
def lora(webui) -> Path:
    """Where a LoRA of that name lies."""
    path = webui.data / "models/Lora" / f"{NAME}.safetensors"
    yield path
    path.unlink(missing_ok=True)


def found(server: WebUIServer) -> str:
    """Where the LoRA goes."""
    server.post("/sdapi/v1/refresh-loras")
    return server.post("/xadapter/v1/plan", {"prompt": f"a cat <lora:{NAME}:1>"}).content["summary"]


def of_size(content: bytes, size: int) -> bytes:
    """A file of tensors with as many blanks behind its header as the size needs."""
    (header,) = struct.unpack("<Q", content[:8])
    blanks = size - len(content)
    return struct.pack("<Q", header + blanks) + content[8 : 8 + header] + b" " * blanks + content[8 + header :]


def write(path: Path, content: bytes, times: tuple[int, int]) -> None:
    path.write_bytes(content)
    os.utime(path, times)


def test_an_older_file_in_its_place_is_looked_at(webui, models, lora):
    write(lora, (models / "models/Lora/style15.safetensors").read_bytes(), THEN)
    assert found(webui) == OF_SD15
    write(lora, (models / "models/Lora/stylexl.safetensors").read_bytes(), LONG_BEFORE)
    assert found(webui) == OF_SDXL


def test_another_version_looks_at_a_file_again(webui, models, lora):
    contents = [(models / f"models/Lora/{name}.safetensors").read_bytes() for name in ("style15", "stylexl")]
    first, second = (of_size(content, max(map(len, contents))) for content in contents)
    write(lora, first, THEN)
    assert found(webui) == OF_SD15
    # nothing but its content tells that it is another file
    write(lora, second, THEN)
    assert found(webui) == OF_SD15
    with webui.pretending("a later version"):
        assert found(webui) == OF_SDXL
