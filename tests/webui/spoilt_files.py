"""Copies of models that a test may spoil, each under a name that only its test uses."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from .server import WebUIServer

NAME = "spoilt"


@dataclass(frozen=True)
class SpoiltFile:
    """A kind of file, and what a request says that uses a copy of it.

    Attributes:
        folder: of models/ that it lies in.
        original: the file that is copied.
        arguments: of X-Adapter, that name the copy.
        request: of the WebUI, that names it.
        usual_request: that names the original.
    """

    folder: str
    original: str
    arguments: Mapping[str, str] = field(default_factory=dict)
    request: Mapping[str, str] = field(default_factory=dict)
    usual_request: Mapping[str, str] = field(default_factory=dict)


SPOILT_FILES = {
    "checkpoint": SpoiltFile("Stable-diffusion", "tiny15.safetensors", {"base_checkpoint": NAME}),
    "adapter": SpoiltFile("X-Adapter", "tiny.safetensors", {"adapter": NAME}),
    "LoRA": SpoiltFile(
        "Lora",
        "style15.safetensors",
        request={"prompt": f"a cat <lora:{NAME}:1>"},
        usual_request={"prompt": "a cat <lora:style15:1>"},
    ),
}


@contextmanager
def copied(server: WebUIServer, models: Path, file: SpoiltFile) -> Iterator[Path]:
    """A copy that the WebUI has listed, with the .yaml of its original; both are gone at the end."""
    source = models / "models" / file.folder / file.original
    path = server.data / "models" / file.folder / f"{NAME}{source.suffix}"
    shutil.copy(source, path)
    if (config := source.with_suffix(".yaml")).is_file():
        shutil.copy(config, path.with_suffix(".yaml"))
    _refresh(server)
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)
        path.with_suffix(".yaml").unlink(missing_ok=True)
        _refresh(server)


def _refresh(server: WebUIServer) -> None:
    for route in ("refresh-checkpoints", "refresh-loras"):
        server.post(f"/sdapi/v1/{route}")
