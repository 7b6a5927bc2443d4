"""A plain picture after X-Adapter's jobs is, to the byte, the one before them, whatever attention the WebUI runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from .asking import plain, with_xadapter
from .conftest import same_bytes
from .server import WebUIServer

REQUEST = {"width": 512, "height": 512, "sampler_name": "DPM++ 2M", "steps": 8}
ATTENTION = "cross_attention_optimization"
# The first, the WebUI's choice on a CPU, leaves the VAE's attention alone; the tests' other servers run the second.
OPTIMIZATIONS = ["InvokeAI", "sdp - scaled dot product"]
JOBS = {
    "lockstep": ({"memory": "lockstep"}, "a cat"),
    "recorded": ({"memory": "recorded"}, "a cat"),
    "lockstep with LoRAs": ({"memory": "lockstep"}, "a cat <lora:style15:1> <lora:stylexl:1>"),
    "recorded with LoRAs": ({"memory": "recorded"}, "a cat <lora:style15:1> <lora:stylexl:1>"),
}
VAE = "first_stage_model."


@pytest.fixture(scope="module", params=OPTIMIZATIONS)
def server(start_webui: Callable[..., WebUIServer], request) -> Iterator[WebUIServer]:
    """A fresh one, in which nothing but its first checkpoint was loaded."""
    with start_webui("plain-bytes", options={ATTENTION: request.param}) as server:
        yield server


@pytest.fixture(scope="module")
def before(server: WebUIServer) -> Image.Image:
    """The plain picture before any job."""
    return plain(server, **REQUEST)


@pytest.fixture
def vae_of_the_base(server: WebUIServer, models) -> Iterator[None]:
    """A VAE file that the WebUI finds by the SD1.5 checkpoint's name."""
    weights = load_file(models / "models/Stable-diffusion/tiny15.safetensors")
    file = server.data / "models/VAE/tiny15.vae.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({key.removeprefix(VAE): value for key, value in weights.items() if key.startswith(VAE)}, file)
    server.post("/sdapi/v1/refresh-vae")
    yield
    file.unlink()
    server.post("/sdapi/v1/refresh-vae")


@pytest.mark.parametrize("job", JOBS)
def test_a_plain_picture_after_a_job_is_the_one_before_to_the_byte(server, before, job):
    given, prompt = JOBS[job]
    with_xadapter(server, given, **REQUEST, prompt=prompt)
    assert same_bytes(plain(server, **REQUEST), before)


def test_a_vae_that_is_loaded_for_the_base_changes_no_plain_picture(server, before, vae_of_the_base):
    with_xadapter(server, **REQUEST)
    assert same_bytes(plain(server, **REQUEST), before)


def test_a_base_that_is_loaded_anew_changes_no_plain_picture(server, before):
    server.post("/sdapi/v1/options", {"xadapter_keep_models": "Unload after each job"})
    with_xadapter(server, **REQUEST)
    server.post("/sdapi/v1/options", {"xadapter_keep_models": "Keep on the GPU"})
    assert same_bytes(plain(server, **REQUEST), before)
