"""Real WebUI servers for the tests: each starts when a test first asks for it and lives until the session ends."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from PIL import Image

from tests.pictures import mean_difference

from .server import Installation, WebUIServer, small_models

PLAIN: Mapping[str, Any] = MappingProxyType(
    {
        "prompt": "a cat",
        "width": 256,
        "height": 256,
        "steps": 6,
        "seed": 7,
        "sampler_name": "Euler",
        "cfg_scale": 7,
    }
)
"""A request for one small picture: `webui.txt2img(**PLAIN)`, or `webui.txt2img(**PLAIN | {"seed": 8})`."""


def is_between(picture: Image.Image, one: Image.Image, other: Image.Image) -> bool:
    """Whether a picture is nearer to each of the two than they are to each other, and equal to neither."""
    return all(0 < mean_difference(picture, end) < mean_difference(one, other) for end in (one, other))


def same_bytes(one: Image.Image, other: Image.Image) -> bool:
    """Whether the two have the same pixels, to the bit."""
    return (one.size, one.mode, one.tobytes()) == (other.size, other.mode, other.tobytes())


def is_blank(image: Image.Image) -> bool:
    """Whether the picture is of one colour, or nearly so."""
    return max(high - low for low, high in image.convert("RGB").getextrema()) <= 8


@pytest.fixture(scope="session")
def installation() -> Installation:
    """The WebUI on this machine; the test is skipped where there is none."""
    found = Installation.from_environment()
    if found is None:
        pytest.skip("needs an AUTOMATIC1111 WebUI: set WEBUI_DIR to its folder (and WEBUI_PYTHON to its Python)")
    return found


@pytest.fixture(scope="session")
def models(installation: Installation) -> Path:
    """The folder of the small checkpoints and plugins."""
    return small_models(installation)


@pytest.fixture(scope="session")
def start_webui(
    installation: Installation, models: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., WebUIServer]:
    """Makes a server with the small models; arguments are WebUIServer's. It is to be entered by who asked for it."""

    def make(name: str, **arguments: Any) -> WebUIServer:
        data = tmp_path_factory.mktemp(name) / "data"
        return WebUIServer(installation, data, **({"models": [models]} | arguments))

    return make


@pytest.fixture(scope="session")
def webui(start_webui: Callable[..., WebUIServer]) -> Iterator[WebUIServer]:
    """A WebUI with X-Adapter installed."""
    with start_webui("webui") as server:
        yield server


@pytest.fixture(scope="session")
def plain_webui(start_webui: Callable[..., WebUIServer]) -> Iterator[WebUIServer]:
    """A WebUI without X-Adapter."""
    with start_webui("plain-webui", extension=False) as server:
        yield server


@pytest.fixture(scope="session")
def controlnet_webui(
    models: Path, start_webui: Callable[..., WebUIServer], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[WebUIServer]:
    """A WebUI with X-Adapter and the ControlNet extension, and small files for that."""
    from . import small_controls, units

    more, annotators = tmp_path_factory.mktemp("controls"), tmp_path_factory.mktemp("annotators")
    small_controls.write_controls(models, more)
    small_controls.write_annotators(annotators)
    options = {"control_net_modules_path": str(annotators)}
    folders = {"models": [models, more], "more_extensions": [units.extension()]}
    with start_webui("controlnet", **folders, options=options) as server:
        yield server
