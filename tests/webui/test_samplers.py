"""Every sampler and scheduler that the WebUI lists runs, at any size and batch."""

from __future__ import annotations

import pytest

from .asking import with_xadapter
from .conftest import is_blank, same_bytes

SHAPES = [
    {"width": 512, "height": 512},
    {"width": 512, "height": 768},
    {"width": 512, "height": 512, "batch_size": 3},
]
STEPS = 5
"""UniPC, of order 3, wants more than three steps in the joint stage; the img2img tab has the same bound."""


@pytest.fixture(scope="module")
def samplers(webui) -> list[str]:
    return [sampler["name"] for sampler in webui.get("/sdapi/v1/samplers").content]


@pytest.fixture(scope="module")
def schedulers(webui) -> list[str]:
    return [scheduler["label"] for scheduler in webui.get("/sdapi/v1/schedulers").content]


def is_a_picture(image, shape) -> bool:
    return image.size == (shape["width"], shape["height"]) and not is_blank(image)


def check_pictures(webui, shape, given=None, **request) -> None:
    """Every image of the batch is a picture of its size."""
    answer = with_xadapter(webui, given, steps=STEPS, do_not_save_grid=True, **request, **shape)
    for image in answer.images[-shape.get("batch_size", 1) :]:
        assert is_a_picture(image, shape), request


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_sampler_runs(webui, samplers, shape):
    for sampler in samplers:
        check_pictures(webui, shape, sampler_name=sampler)
    assert webui.state()["hooks"] == []


def test_every_sampler_runs_in_a_single_stage(webui, samplers):
    for sampler in samplers:
        check_pictures(webui, {"width": 256, "height": 256}, {"single_stage": True}, sampler_name=sampler)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_scheduler_runs(webui, schedulers, shape):
    for scheduler in schedulers:
        check_pictures(webui, shape, scheduler=scheduler)


@pytest.mark.parametrize("size", [(520, 392), (64, 128), (1000, 256)], ids=lambda size: f"{size[0]}x{size[1]}")
def test_odd_sizes_run(webui, size):
    answer = with_xadapter(webui, width=size[0], height=size[1], steps=2)
    assert answer.image.size == size


def test_a_base_of_another_ratio_runs(webui):
    given = {"base_width": 200, "base_height": 328}
    once, again = (with_xadapter(webui, given, steps=2).image for _ in range(2))
    assert same_bytes(once, again)


@pytest.mark.parametrize("switch_point", [0, 0.01, 0.999, 1])
def test_the_ends_of_the_switch_point_run(webui, switch_point):
    assert with_xadapter(webui, {"switch_point": switch_point}, steps=4).image
