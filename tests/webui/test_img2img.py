"""The img2img tab: the given picture plays the part of stage 1's, the denoising strength that of the switch point."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from PIL import Image

from tests.pictures import grey_levels_apart

from .asking import BASE, HALF, STRENGTH, UPGRADED, arguments, made, over, plain
from .conftest import PLAIN, is_blank, same_bytes
from .server import WebUIServer
from .units import picture

NOTHING_LED = {"weight": 0}
FROM_BASE = {"img2img_start": "base"}
MEMORY = [{"memory": "lockstep"}, {"memory": "recorded"}]
STYLE = "a cat <lora:style15:1>"
EVERY_WAY = [
    {},
    {"resize_mode": 1},
    {"resize_mode": 2},
    {"resize_mode": 3},
    {"denoising_strength": 0.3},
    {"batch_size": 2},
    {"n_iter": 2},
    {"sampler_name": "DDIM"},
    {"sampler_name": "DPM++ 2M SDE"},
    {"initial_noise_multiplier": 0.8},
    {"include_init_images": True},
    {"subseed": 11, "subseed_strength": 0.4},
    {"override_settings": {"img2img_color_correction": True}},
    {"override_settings": {"img2img_extra_noise": 0.1}},
    {"override_settings": {"img2img_fix_steps": True}},
]
"""Requests of the tab, each in another way."""


@pytest.fixture(scope="module")
def start() -> Image.Image:
    """A picture in another ratio than what is made."""
    return picture(240, 200)


@pytest.fixture(scope="module")
def server(start_webui) -> Iterator[WebUIServer]:
    options = {"img2img_color_correction": False, "img2img_extra_noise": 0.0, "img2img_fix_steps": False}
    with start_webui("img2img", options=options) as started:
        yield started


@pytest.fixture(scope="module")
def usual(server, start) -> Image.Image:
    return over(server, start, {}).image


def drawn_alike(server: WebUIServer, start: Image.Image, given: dict | None, **request) -> list[Image.Image]:
    """Pictures whose start was encoded alike: the VAE draws from torch's own generator, wherever that is just then."""
    plain(server)
    return over(server, start, given, **request).images


class TestGivenPicture:
    """Both models paint over the given picture."""

    @pytest.mark.parametrize("request_", EVERY_WAY, ids=json.dumps)
    @pytest.mark.parametrize("given", [NOTHING_LED, {"adapter": "None"}], ids=json.dumps)
    def test_without_residuals_it_is_the_plain_picture_to_the_byte(self, server, start, given, request_):
        expected, ours = (drawn_alike(server, start, arguments_, **request_) for arguments_ in (None, given))
        assert all(same_bytes(one, other) for one, other in zip(ours, expected, strict=True))

    @pytest.mark.parametrize("request_", EVERY_WAY, ids=json.dumps)
    def test_the_base_guides_it_alike_in_both_memory_modes(self, server, start, request_):
        alone = over(server, start, **request_).images
        in_lockstep, recorded = (drawn_alike(server, start, memory, **request_) for memory in MEMORY)
        assert all(same_bytes(one, other) for one, other in zip(in_lockstep, recorded, strict=True))
        assert not any(is_blank(image) for image in in_lockstep)
        assert grey_levels_apart(in_lockstep[0], alone[0]) > 1

    def test_the_base_paints_nothing_alone(self, server, start):
        with server.recorded() as calls:
            over(server, start, MEMORY[0])
        steps = int(STRENGTH * PLAIN["steps"]) + 1
        assert [call["model"] for call in calls] == [BASE, UPGRADED] * steps

    def test_both_models_are_at_the_same_timestep(self, server, start):
        with server.recorded() as calls:
            over(server, start, MEMORY[0])
        for base, upgraded in zip(calls[::2], calls[1::2], strict=True):
            assert base["timestep"] == pytest.approx(upgraded["timestep"], abs=1e-3)
            assert (base["height"] * 2, base["width"] * 2) == (upgraded["height"], upgraded["width"])

    def test_both_start_from_the_picture(self, server, start):
        """With next to no noise each model's first latent is the picture's own, whatever it predicts."""
        blue, red = (Image.new("RGB", (256, 256), colour) for colour in ("blue", "red"))
        starts = []
        for colour in (blue, red):
            with server.recorded_samplings() as samplings:
                over(server, colour, {}, denoising_strength=0.01)
            starts.append(samplings[0])
        assert starts[0]["start"] != starts[1]["start"]
        assert (
            grey_levels_apart(*(over(server, colour, {}, denoising_strength=0.01).image for colour in (blue, red)))
            > 100
        )

    def test_an_sd15_lora_acts_on_the_base_alone(self, server, start, usual):
        assert grey_levels_apart(over(server, start, {}, prompt=STYLE).image, usual) > 1
        without = over(server, start, prompt="a cat").image
        assert same_bytes(over(server, start, NOTHING_LED, prompt=STYLE).image, without)

    def test_images_of_a_batch_are_those_of_their_seeds(self, server, start):
        together = over(server, start, {}, batch_size=2).images
        alone = [over(server, start, {}, seed=PLAIN["seed"] + place).image for place in range(2)]
        assert all(grey_levels_apart(one, other) <= 1 for one, other in zip(together, alone, strict=True))

    def test_each_picture_of_a_batch_is_the_base_s_own_start(self, server, start):
        other = picture(240, 200, background="green")
        request = {**PLAIN, "denoising_strength": STRENGTH, "do_not_save_grid": True, "batch_size": 2}
        together = made(server.img2img(start, other, **request, **arguments())).images
        alone = over(server, start, {}).image, over(server, other, {}, seed=PLAIN["seed"] + 1).image
        assert all(grey_levels_apart(one, two) <= 1 for one, two in zip(together, alone, strict=True))


class TestBasesPicture:
    """The base repaints the picture first, and SDXL goes on from there at the switch point."""

    @pytest.mark.parametrize(
        "request_",
        [
            {},
            {"resize_mode": 1},
            {"resize_mode": 2},
            {"resize_mode": 3},
            {"prompt": STYLE},
            {"sampler_name": "DDIM"},
            {"denoising_strength": 0.9},
            {"initial_noise_multiplier": 0.8},
            {"override_settings": {"img2img_color_correction": True}},
        ],
        ids=json.dumps,
    )
    def test_it_is_the_tabs_own_and_sdxl_goes_on_as_the_tab_does(self, server, start, request_):
        given = {**FROM_BASE, "return_base_image": True, "weight": 0, "switch_point": 0.5}
        ours, base = over(server, start, given, **request_).images
        options = request_.get("override_settings", {})
        selected = {"override_settings": {**options, "sd_model_checkpoint": "tiny15.safetensors"}}
        assert grey_levels_apart(base, over(server, start, **{**request_, **HALF, **selected}).image) <= 1
        if not options:
            then = {**request_, "prompt": "a cat", "resize_mode": 0, "denoising_strength": 0.5}
            assert grey_levels_apart(ours, over(server, base, **then).image) <= 1

    @pytest.mark.parametrize("memory", MEMORY, ids=json.dumps)
    def test_the_base_paints_then_both_do(self, server, start, memory):
        with server.recorded() as calls:
            over(server, start, {**FROM_BASE, **memory, "switch_point": 0.5})
        stage_one, joint = int(STRENGTH * PLAIN["steps"]) + 1, int(0.5 * PLAIN["steps"]) + 1
        models = [call["model"] for call in calls]
        assert models[:stage_one] == [BASE] * stage_one
        assert models[stage_one:].count(BASE) == models[stage_one:].count(UPGRADED) == joint

    def test_a_single_stage_contradicts_it(self, server, start):
        answer = server.img2img(start, **PLAIN, **arguments(**FROM_BASE, single_stage=True))
        assert answer.status == 422
        assert "img2img_start" in answer.error


def test_a_control_image_to_start_from_is_refused(server, start):
    answer = server.img2img(start, **PLAIN, **arguments(base_start="control image"))
    assert answer.status == 422
    assert "base_start" in answer.error


@pytest.mark.parametrize("how", ["interrupt", "skip"])
@pytest.mark.parametrize(
    ("given", "where", "after"),
    [
        ({}, "base_unet", 1),
        ({}, "upgraded_unet", 1),
        (MEMORY[1], "base_unet", 1),
        (MEMORY[1], "upgraded_unet", 1),
        (FROM_BASE, "base_unet", 1),
        (FROM_BASE, "base_unet", 5),
        ({**FROM_BASE, **MEMORY[1]}, "base_unet", 1),
    ],
    ids=str,
)
def test_stopped_anywhere_a_picture_comes_back_and_nothing_is_left(server, start, how, given, where, after):
    before = plain(server)
    with server.fault(where, after, how):
        # a recording of an earlier test would leave the base nothing to do
        answer = over(server, start, given, seed=51)
    assert answer.image.size == (PLAIN["width"], PLAIN["height"])
    assert server.state()["hooks"] == []
    assert same_bytes(plain(server), before)


@pytest.mark.parametrize(("where", "after"), [("base_unet", 1), ("upgraded_unet", 1)])
@pytest.mark.parametrize("given", [*MEMORY, FROM_BASE], ids=json.dumps)
def test_a_fault_ends_the_job_with_its_message(server, start, given, where, after):
    before = plain(server)
    with server.fault(where, after):
        answer = server.img2img(start, **{**PLAIN, "seed": 52}, denoising_strength=STRENGTH, **arguments(**given))
    assert answer.status == 500
    assert "armed by the probe" in answer.error
    assert server.state()["hooks"] == []
    assert same_bytes(plain(server), before)


def test_every_sampler_runs(server, start):
    for sampler in server.get("/sdapi/v1/samplers").content:
        answer = over(server, start, {}, sampler_name=sampler["name"], steps=8, width=512, height=512)
        assert answer.image.size == (512, 512)
        assert not is_blank(answer.image), sampler["name"]
    assert server.state()["hooks"] == []


def test_the_infotext_tells_what_was_asked(server, start):
    text = over(server, start, {**FROM_BASE, "weight": 0.7}).infotexts[0]
    assert "X-Adapter img2img start: base" in text
    assert "X-Adapter weight: 0.7" in text
