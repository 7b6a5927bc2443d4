"""Plain pictures after X-Adapter's jobs are, to the byte, those before them, whatever attention the WebUI runs.

Of txt2img and img2img, with and without a LoRA and a textual inversion of SDXL; after every success, refusal, interrupt
and fault.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from .asking import arguments, over, plain, with_xadapter
from .conftest import PLAIN, same_bytes
from .server import WebUIServer

REQUEST = {"width": 512, "height": 512, "sampler_name": "DPM++ 2M", "steps": 8}
ATTENTION = "cross_attention_optimization"
# The first, the WebUI's choice on a CPU, leaves the VAE's attention alone; the tests' other servers run the second.
OPTIMIZATIONS = ["InvokeAI", "sdp - scaled dot product"]
LORAS = "a cat <lora:style15:1> <lora:stylexl:1>"
SDXL_PLUGINS = "an upgradedxl cat <lora:stylexl:1>"
GIVEN = Image.linear_gradient("L").resize((512, 512)).convert("RGB")
LOCKSTEP, RECORDED = {"memory": "lockstep"}, {"memory": "recorded"}
HIRES = {"enable_hr": True, "hr_scale": 1.5, "hr_upscaler": "Latent", "denoising_strength": 0.6}

Job = Callable[[WebUIServer], object]


def refused(server: WebUIServer) -> None:
    answer = server.txt2img(**PLAIN, **arguments(base_checkpoint="nobody"))
    assert answer.status == 422


def stopped(where: str, after: int) -> Job:
    """Interrupted in a call of a model."""

    def job(server: WebUIServer) -> None:
        with server.fault(where, after, "interrupt"):
            with_xadapter(server, LOCKSTEP, prompt=LORAS)

    return job


def failing(where: str, after: int, memory: dict) -> Job:
    def job(server: WebUIServer) -> None:
        with server.fault(where, after):
            answer = server.txt2img(**{**PLAIN, "prompt": LORAS}, **arguments(**memory))
        assert answer.status == 500

    return job


JOBS: dict[str, Job] = {
    "lockstep": lambda server: with_xadapter(server, LOCKSTEP, **REQUEST),
    "recorded": lambda server: with_xadapter(server, RECORDED, **REQUEST),
    "lockstep with LoRAs": lambda server: with_xadapter(server, LOCKSTEP, **REQUEST, prompt=LORAS),
    "recorded with LoRAs": lambda server: with_xadapter(server, RECORDED, **REQUEST, prompt=LORAS),
    "img2img": lambda server: over(server, GIVEN, LOCKSTEP, prompt=LORAS),
    "hires": lambda server: with_xadapter(server, LOCKSTEP, **HIRES, prompt=LORAS),
    "refused": refused,
    "interrupted in the base": stopped("base_unet", 2),
    "interrupted in SDXL": stopped("upgraded_unet", 2),
    "fault in the base": failing("base_unet", 8, LOCKSTEP),
    "fault in SDXL": failing("upgraded_unet", 1, RECORDED),
    "fault while decoding": failing("vae_decode", 1, LOCKSTEP),
}
VAE = "first_stage_model."


@pytest.fixture(scope="module", params=OPTIMIZATIONS)
def server(start_webui: Callable[..., WebUIServer], request) -> Iterator[WebUIServer]:
    """A fresh one, in which nothing but its first checkpoint was loaded."""
    with start_webui("plain-bytes", options={ATTENTION: request.param}) as server:
        yield server


def plain_pictures(server: WebUIServer) -> dict[str, Image.Image]:
    """Without X-Adapter."""
    small = {**PLAIN, "steps": 4}
    return {
        "txt2img": plain(server, **REQUEST),
        "txt2img with plugins of SDXL": plain(server, **{**small, "prompt": SDXL_PLUGINS}),
        "img2img": over(server, GIVEN, **small).image,
        "img2img with plugins of SDXL": over(server, GIVEN, **{**small, "prompt": SDXL_PLUGINS}).image,
    }


def others(server: WebUIServer, before: dict[str, Image.Image]) -> list[str]:
    """Which plain pictures are not what they were."""
    return [name for name, picture in plain_pictures(server).items() if not same_bytes(picture, before[name])]


@pytest.fixture(scope="module")
def before(server: WebUIServer) -> dict[str, Image.Image]:
    """The plain pictures before any job."""
    return plain_pictures(server)


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
def test_plain_pictures_after_a_job_are_those_before_to_the_byte(server, before, job):
    JOBS[job](server)
    assert not others(server, before)


def test_a_vae_that_is_loaded_for_the_base_changes_no_plain_picture(server, before, vae_of_the_base):
    with_xadapter(server, **REQUEST)
    assert not others(server, before)


def test_a_base_that_is_loaded_anew_changes_no_plain_picture(server, before):
    server.post("/sdapi/v1/options", {"xadapter_keep_models": "Unload after each job"})
    with_xadapter(server, **REQUEST)
    server.post("/sdapi/v1/options", {"xadapter_keep_models": "Keep on the GPU"})
    assert not others(server, before)
