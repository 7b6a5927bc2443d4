"""Inpainting: the base has the same mask at its own latent size, and outside of it nothing is painted."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy
import pytest
from PIL import Image, ImageDraw, ImageFilter

from tests.pictures import grey_levels_apart

from .asking import HALF, USE_BASE, over, plain
from .conftest import PLAIN, same_bytes
from .server import WebUIServer
from .units import picture

FROM_BASE = {"img2img_start": "base"}
MEMORY = [{"memory": "lockstep"}, {"memory": "recorded"}]
SOFT = {"alwayson_scripts": {"Soft inpainting": {"args": [True, 1, 0.5, 4, 0, 0.5, 2]}}}
WHOLE = {"inpaint_full_res": False, "inpainting_fill": 1}
EVERY_WAY = [
    {},
    {"inpainting_fill": 0},
    {"inpainting_fill": 2},
    {"inpainting_fill": 3},
    {"mask_blur": 0},
    {"mask_blur_x": 0, "mask_blur_y": 12},
    {"inpainting_mask_invert": 1},
    {"inpaint_full_res": True, "inpaint_full_res_padding": 16},
    {"resize_mode": 1},
    {"resize_mode": 2},
    {"sampler_name": "DDIM"},
    {"batch_size": 2},
    SOFT,
]


@pytest.fixture(scope="module")
def start() -> Image.Image:
    return picture(PLAIN["width"], PLAIN["height"])


@pytest.fixture(scope="module")
def mask() -> Image.Image:
    image = Image.new("L", (PLAIN["width"], PLAIN["height"]), 0)
    ImageDraw.Draw(image).ellipse((70, 70, 180, 190), fill=255)
    return image


@pytest.fixture(scope="module")
def server(start_webui) -> Iterator[WebUIServer]:
    with start_webui("inpainting") as started:
        yield started


def painted(server: WebUIServer, start, mask, given, **request) -> list[Image.Image]:
    """Pictures whose start was encoded alike: the VAE draws from torch's own generator, wherever that is just then."""
    plain(server)
    return over(server, start, given, mask=mask, **{**WHOLE, **request}).images


def apart(one: Image.Image, other: Image.Image, where: Image.Image) -> int:
    """The largest difference in grey levels where a mask is white."""
    pixels = (numpy.asarray(image.convert("RGB")).astype(int) for image in (one, other))
    return int(abs(numpy.subtract(*pixels))[numpy.asarray(where) > 0].max())


@pytest.mark.parametrize("request_", EVERY_WAY, ids=json.dumps)
def test_without_residuals_it_is_plain_inpainting_to_the_byte(server, start, mask, request_):
    expected, ours = (painted(server, start, mask, given, **request_) for given in (None, {"weight": 0}))
    assert all(same_bytes(one, other) for one, other in zip(ours, expected, strict=True))


@pytest.mark.parametrize("request_", EVERY_WAY[:-1], ids=json.dumps)
def test_outside_the_mask_nothing_differs_and_inside_the_base_guides(server, start, mask, request_):
    expected = painted(server, start, mask, None, **request_)
    in_lockstep, recorded = (painted(server, start, mask, memory, **request_) for memory in MEMORY)
    assert all(same_bytes(one, other) for one, other in zip(in_lockstep, recorded, strict=True))
    # the overlay reaches as far as the blur does
    inside = mask.filter(ImageFilter.MaxFilter(63))
    outside = Image.eval(inside, lambda level: 255 - level)
    if request_.get("inpainting_mask_invert"):
        inside = Image.eval(mask, lambda level: 255 - level)
        outside = mask.filter(ImageFilter.MinFilter(63))
    assert apart(in_lockstep[0], expected[0], outside) == 0
    assert apart(in_lockstep[0], expected[0], inside) > 1


def test_soft_inpainting_shapes_the_bases_part_too(server, start, mask):
    with server.recorded_samplings() as samplings:
        painted(server, start, mask, {**FROM_BASE, "switch_point": 0.5}, **SOFT)
        painted(server, start, mask, {**FROM_BASE, "switch_point": 0.5})
    of_base = [sampling["finished"] for sampling in samplings if len(sampling["finished"][0][0]) == 16]
    assert len(of_base) == 2
    assert of_base[0] != of_base[1]


@pytest.mark.parametrize(
    "request_",
    [{}, {"inpainting_fill": 2}, {"inpainting_mask_invert": 1}, {"inpaint_full_res": True}, SOFT],
    ids=json.dumps,
)
def test_the_bases_picture_is_the_tabs_own(server, start, mask, request_):
    given = {**FROM_BASE, "return_base_image": True, "weight": 0, "switch_point": 0.5}
    _, base = painted(server, start, mask, given, **request_)
    plain(server, **HALF, **USE_BASE)
    theirs = over(server, start, mask=mask, **{**WHOLE, **request_, **HALF, **USE_BASE}).images[0]
    if request_ != SOFT:
        assert grey_levels_apart(base.convert("RGB"), theirs.convert("RGB")) <= 1
    else:
        # Soft inpainting changes the overlay of the finished picture, which is SDXL's to show
        middle = Image.new("L", tuple(HALF.values()), 0)
        ImageDraw.Draw(middle).ellipse((45, 45, 80, 85), fill=255)
        assert apart(base, theirs, middle) <= 1


@pytest.mark.parametrize("memory", MEMORY, ids=json.dumps)
@pytest.mark.parametrize("given", [{}, FROM_BASE], ids=json.dumps)
def test_stopped_it_gives_a_picture_and_leaves_nothing(server, start, mask, given, memory):
    before = plain(server)
    with server.fault("base_unet", 1, "interrupt"):
        answer = over(server, start, {**given, **memory}, mask=mask, seed=61, **WHOLE)
    assert answer.image.size == start.size
    assert server.state()["hooks"] == []
    assert same_bytes(plain(server), before)
