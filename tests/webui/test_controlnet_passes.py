"""ControlNet units of the base over a given picture, and in the two passes of Hires. fix."""

from __future__ import annotations

import json

import pytest
from PIL import Image, ImageDraw

from tests.pictures import grey_levels_apart

from .asking import HALF, STRENGTH, TITLE, made, plain
from .conftest import PLAIN, same_bytes
from .server import WebUIServer
from .units import LINES, LINES_XL, SMALL, ask, final, of_the_base, picture, unit

STEPS = {"steps": 4}
WITHOUT_PICTURE = {name: value for name, value in LINES.items() if name != "image"}
CANNY_WITHOUT_PICTURE = {**WITHOUT_PICTURE, "module": "canny", "processor_res": 128}
HIRES = {
    "enable_hr": True,
    "hr_scale": 2,
    "hr_upscaler": "Lanczos",
    "denoising_strength": 0.6,
    "hr_second_pass_steps": 3,
}
ONLY_MASKED = {"inpaint_full_res": True, "inpaint_full_res_padding": 8}
MEMORY = [{"memory": "lockstep"}, {"memory": "recorded"}]


@pytest.fixture(scope="module")
def webui(controlnet_webui: WebUIServer) -> WebUIServer:
    return controlnet_webui


def part_of_picture() -> Image.Image:
    """A mask of the picture that is painted over."""
    mask = Image.new("L", picture().size, 0)
    ImageDraw.Draw(mask).rectangle((100, 40, 170, 100), fill=255)
    return mask


def over(server: WebUIServer, units: list[dict], given: dict | None, **request):
    """A request of the img2img tab, over a picture in another ratio than what is made.

    The VAE encodes it by torch's own generator, which the picture before leaves in one place.
    """
    plain(server)
    scripts = {"ControlNet": {"args": units}} if units else {}
    if given is not None:
        scripts[TITLE] = {"args": [{**SMALL, **given}]}
    asked = {**PLAIN, **STEPS, "denoising_strength": STRENGTH, "do_not_save_grid": True, **request}
    return made(server.img2img(picture(), **asked, alwayson_scripts=scripts))


class TestOverAPicture:
    @pytest.mark.parametrize(
        "units", [[LINES], [WITHOUT_PICTURE], [CANNY_WITHOUT_PICTURE]], ids=["own", "input", "canny"]
    )
    @pytest.mark.parametrize("request_", [{}, {"resize_mode": 1}, {"resize_mode": 2}], ids=json.dumps)
    def test_the_base_is_controlled_as_in_the_tab(self, webui, units, request_):
        given = {"img2img_start": "base", "weight": 0, "switch_point": 0.5, "return_base_image": True}
        ours = of_the_base(over(webui, units, given, **request_))[0]
        webui.post("/sdapi/v1/options", {"sd_model_checkpoint": "tiny15"})
        try:
            theirs = of_the_base(over(webui, units, None, **{**request_, **HALF}))[0]
            without = of_the_base(over(webui, [], None, **{**request_, **HALF}))[0]
        finally:
            webui.post("/sdapi/v1/options", {"sd_model_checkpoint": "tinyxl"})
        assert grey_levels_apart(ours.convert("RGB"), theirs.convert("RGB")) <= 1
        assert grey_levels_apart(theirs.convert("RGB"), without.convert("RGB")) > 1

    @pytest.mark.parametrize("module", ["inpaint", "inpaint_only"])
    @pytest.mark.parametrize("area", [{"inpaint_full_res": False}, ONLY_MASKED], ids=json.dumps)
    def test_inpainting_units_see_the_tabs_mask_as_in_the_tab(self, webui, module, area):
        units = [{**WITHOUT_PICTURE, "module": module}]
        given = {"img2img_start": "base", "weight": 0, "switch_point": 0.5, "return_base_image": True}
        masked = {"mask": part_of_picture(), "mask_blur": 0, **area}
        ours = of_the_base(over(webui, units, given, **masked))[0]
        webui.post("/sdapi/v1/options", {"sd_model_checkpoint": "tiny15"})
        try:
            theirs = of_the_base(over(webui, units, None, **masked, **HALF))[0]
        finally:
            webui.post("/sdapi/v1/options", {"sd_model_checkpoint": "tinyxl"})
        assert grey_levels_apart(ours.convert("RGB"), theirs.convert("RGB")) <= 1

    @pytest.mark.parametrize("module", ["inpaint", "inpaint_only"])
    def test_inpainting_units_act_inside_the_mask_alike_in_both_memory_modes(self, webui, module):
        before, masked = plain(webui), {"mask": part_of_picture(), "inpaint_full_res": False}
        units = [{**WITHOUT_PICTURE, "module": module}]
        beside, recorded = (over(webui, units, memory, **masked).images[0] for memory in MEMORY)
        assert same_bytes(beside, recorded)
        without = over(webui, [], {}, **masked).images[0]
        assert grey_levels_apart(beside, without) > 1
        assert same_bytes(beside.crop((0, 0, 64, 256)), without.crop((0, 0, 64, 256)))
        assert same_bytes(plain(webui), before)

    @pytest.mark.parametrize("units", [[WITHOUT_PICTURE], [LINES, LINES_XL]], ids=["the base's", "both"])
    def test_they_act_beside_sdxl_alike_in_both_memory_modes(self, webui, units):
        # the extension loads a unit's model at its first use, for which torch's generator is drawn from
        over(webui, units, {})
        before = plain(webui)
        beside, recorded = (over(webui, units, memory).images[0] for memory in MEMORY)
        assert same_bytes(beside, recorded)
        assert grey_levels_apart(beside, over(webui, units[1:], {}).images[0]) > 1
        assert same_bytes(plain(webui), before)
        assert webui.state()["hooks"] == []

    def test_only_masked_they_see_the_whole_picture_or_the_part_as_the_extension_has_it(self, webui):
        masked = {**ONLY_MASKED, "mask": part_of_picture()}
        cropped, whole = ({**WITHOUT_PICTURE, "inpaint_crop_input_image": crop} for crop in (True, False))
        one, other = (over(webui, [units], {}, **masked).images[0] for units in (cropped, whole))
        assert grey_levels_apart(one, other) > 1


class TestHiresFix:
    def enlarged(self, server: WebUIServer, units: list[dict], given: dict | None = None, **request) -> Image.Image:
        return made(ask(server, units, {**SMALL, **(given or {})}, **{**HIRES, **STEPS, **request})).images[0]

    def test_units_act_in_both_passes_alike_in_both_memory_modes(self, webui):
        beside, recorded = (self.enlarged(webui, [LINES], memory) for memory in MEMORY)
        assert same_bytes(beside, recorded)
        assert grey_levels_apart(beside, self.enlarged(webui, [])) > 1

    def test_a_unit_for_one_pass_acts_in_that_alone(self, webui):
        low, high, both = (
            self.enlarged(webui, [{**LINES, "hr_option": option}])
            for option in ("Low res only", "High res only", "Both")
        )
        none, low_without_second, high_without_second, none_without_second = (
            self.enlarged(webui, units, {"hires": False})
            for units in ([], [{**LINES, "hr_option": "Low res only"}], [{**LINES, "hr_option": "High res only"}], [])
        )
        assert same_bytes(high_without_second, none_without_second)
        assert grey_levels_apart(low_without_second, none) > 1
        assert len({image.tobytes() for image in (low, high, both)}) == 3

    def test_afterwards_everything_is_as_it_was(self, webui):
        before, alone = plain(webui), final(webui, [LINES], SMALL, **STEPS)
        self.enlarged(webui, [LINES, LINES_XL])
        assert same_bytes(plain(webui), before)
        assert same_bytes(final(webui, [LINES], SMALL, **STEPS), alone)
        assert webui.state()["hooks"] == []


def test_a_unit_without_a_picture_is_refused_in_txt2img(webui):
    answer = ask(webui, [unit("lines", "none", image=None)], SMALL)
    assert answer.status == 422
    assert "has no image" in answer.error
