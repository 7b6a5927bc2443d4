"""A ControlNet does the same to the base in the diffusers host as by its extension in the real WebUI."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from .server import WebUIServer, encode_image, small_models
from .units import CONTROLNET, extension, unit

os.environ["HF_HUB_OFFLINE"] = "1"
pytest.importorskip("diffusers", reason="needs the extra 'headless'")

from lib_xadapter import load_adapter
from lib_xadapter.headless.model_files import load_base, load_controlnet, load_upgraded
from lib_xadapter.headless.models import Models, with_controls
from tests.pictures import control_map

from .test_headless_agreement import JOB, TOLERANCE, check, headless, in_the_webui, relative_error

MAP = control_map(64)


@pytest.fixture(scope="module")
def wide(installation) -> Path:
    """ControlNets exist at full width only."""
    return small_models(installation, full_width_base=True)


@pytest.fixture(scope="module")
def server(models, wide, start_webui) -> Iterator[WebUIServer]:
    with start_webui("headless-controlnet", models=[models, wide], more_extensions=[extension()]) as started:
        yield started


@pytest.fixture(scope="module")
def led(models, wide) -> Models:
    of_upgraded, of_base = models / "models", wide / "models"
    base = load_base(of_base / "Stable-diffusion/wide15.safetensors", torch.float32, of_base / "wide-clip")
    net = load_controlnet(of_base / f"ControlNet/{CONTROLNET}.safetensors", base.unet, torch.float32)
    upgraded = of_upgraded / "Stable-diffusion/tinyxl.safetensors"
    return Models(
        with_controls(base, [net]),
        load_upgraded(upgraded, torch.float32, of_upgraded / "tiny-clip"),
        load_adapter(of_base / "X-Adapter/wide.safetensors"),
    )


def test_a_controlnet_does_the_same_in_both_hosts(server, led):
    small = replace(JOB, width=128, height=128, steps=4, sampler="Euler")
    job = replace(small, control_images=(MAP,), control_scales=((0.8,),), control_names=(CONTROLNET,))
    units = [unit(CONTROLNET, "none", image=encode_image(MAP), weight=0.8)]
    ours = headless(led, job)
    check(ours, in_the_webui(server, job, size="wide", units=units))
    off = headless(led, replace(job, control_scales=((0.0,),)))
    assert relative_error(ours.base, off.base) > 10 * TOLERANCE
