"""What is shown beside the pictures: each has a text in its place, and one in its file where the user wants it."""

from __future__ import annotations

import pytest

from tests.pictures import grey_levels_apart

from .asking import HALF, with_xadapter
from .conftest import PLAIN
from .units import LINES, LINES_XL, SMALL, ask, made

SHOWN = {"return_base_image": True}


@pytest.mark.parametrize(
    ("units", "told"),
    [
        ([LINES_XL], ["tinyxl", "tinyxl", "tiny15"]),
        ([LINES], ["tinyxl", "tiny15", "tinyxl"]),
        ([LINES, LINES_XL], ["tinyxl", "tinyxl", "tiny15", "tinyxl"]),
    ],
    ids=["map of SDXL", "map of the base", "both"],
)
def test_the_bases_picture_has_its_text_and_maps_have_the_first_pictures(controlnet_webui, units, told):
    answer = made(ask(controlnet_webui, units, {**SMALL, **SHOWN}, steps=2))
    assert len(answer.images) == len(answer.infotexts)
    assert list(map(model_of, answer.infotexts)) == told


def model_of(infotext: str) -> str:
    """The model behind the size; ControlNet names its own elsewhere."""
    return infotext.partition("Size: ")[2].partition("Model: ")[2].partition(",")[0]


@pytest.fixture
def without_metadata(webui):
    webui.post("/sdapi/v1/options", {"enable_pnginfo": False})
    yield
    webui.post("/sdapi/v1/options", {"enable_pnginfo": True})


@pytest.mark.usefixtures("without_metadata")
def test_the_bases_picture_has_no_metadata_where_the_user_wants_none(webui):
    answer = with_xadapter(webui, SHOWN, steps=2)
    assert [image.size for image in answer.images] == [(PLAIN["width"], PLAIN["height"]), tuple(HALF.values())]
    assert [image.info.get("parameters") for image in answer.images] == [None, None]
    assert "Model: tiny15" in answer.infotexts[1]


def test_also_where_it_was_recorded_when_the_user_wanted_some(webui, request):
    recorded = {**SHOWN, "memory": "recorded"}
    with_text = with_xadapter(webui, recorded, steps=2, seed=31).images[1]
    assert "Model: tiny15" in with_text.info["parameters"]
    request.getfixturevalue("without_metadata")
    without = with_xadapter(webui, {**recorded, "weight": 0.5}, steps=2, seed=31).images[1]
    assert "parameters" not in without.info
    assert grey_levels_apart(with_text, without) == 0
