"""The text under stage 1's picture: what the WebUI would write for it with the SD1.5 checkpoint selected."""

from __future__ import annotations

import pytest

from tests.pictures import grey_levels_apart

from .asking import USE_BASE, made, with_xadapter
from .conftest import PLAIN
from .server import Answer, WebUIServer

SHOWN = {"return_base_image": True}
OWN = {
    **SHOWN,
    "base_prompt": "a dog, (soft:1.2) <lora:style15:0.5>",
    "base_negative_prompt": "fog",
    "base_width": 192,
    "base_height": 128,
    "base_steps": 5,
    "base_cfg_scale": 4.5,
    "base_seed": 40,
}


def text_of_base(answer: Answer, place: int = -1) -> str:
    """Under the picture, and in its file."""
    assert answer.images[place].info["parameters"] == answer.infotexts[place]
    return answer.infotexts[place]


def by_the_webui(server: WebUIServer, infotext: str) -> Answer:
    """What the WebUI makes of the text alone, with the SD1.5 checkpoint selected."""
    return made(server.txt2img(infotext=infotext, **USE_BASE))


@pytest.mark.parametrize(
    ("given", "request_"),
    [
        (SHOWN, {}),
        (OWN, {}),
        (SHOWN, {"prompt": "a base15 cat, upgradedxl <lora:style15:0.5:model=base> <lora:stylexl:1>"}),
        (SHOWN, {"prompt": "a cat", "negative_prompt": "fog", "subseed": 3, "subseed_strength": 0.5}),
        (SHOWN, {"sampler_name": "DPM++ 2M", "scheduler": "Karras", "tiling": True}),
    ],
    ids=["as SDXL", "its own", "plugins", "variation", "sampler"],
)
def test_the_text_alone_makes_the_picture_again(webui, given, request_):
    answer = with_xadapter(webui, given, **request_)
    text = text_of_base(answer)
    again = by_the_webui(webui, text)
    assert grey_levels_apart(again.image, answer.images[-1]) <= 1
    # the WebUI writes no seed of its own making, no other model and nothing of X-Adapter
    assert again.infotexts[0] == text


def test_it_names_the_bases_model_and_lora_and_nothing_of_sdxl(webui):
    text = text_of_base(with_xadapter(webui, SHOWN, prompt="a cat, upgradedxl <lora:style15:0.5> <lora:stylexl:1>"))
    for part in ("a cat", "<lora:style15:0.5>", "Size: 128x128", "Model: tiny15", f"Seed: {PLAIN['seed']}"):
        assert part in text
    for part in ("X-Adapter", "stylexl", "upgradedxl", "tinyxl"):
        assert part not in text


def test_each_image_of_a_batch_has_its_own(webui):
    answer = with_xadapter(webui, SHOWN, batch_size=2, n_iter=2, do_not_save_grid=True)
    seeds = [f"Seed: {PLAIN['seed'] + place}," for place in range(4)]
    assert len(answer.images) == 8
    for place, seed in enumerate(seeds, start=4):
        assert seed in text_of_base(answer, place)


@pytest.mark.parametrize("memory", ["lockstep", "recorded"])
def test_a_recording_keeps_it(webui, memory):
    given = {**OWN, "memory": memory, "base_seed": 77}
    one, other = (text_of_base(with_xadapter(webui, {**given, "weight": weight})) for weight in (1, 0.5))
    assert one == other
