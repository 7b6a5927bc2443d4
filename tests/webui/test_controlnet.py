"""ControlNet units of sd-webui-controlnet on the base, on the real WebUI, beside SDXL's own."""

from __future__ import annotations

import pytest
from PIL import Image

from tests.pictures import grey_levels_apart

from .asking import made
from .conftest import PLAIN, is_between, same_bytes
from .server import WebUIServer, encode_image
from .units import (
    FIRMLY,
    LINES,
    LINES_XL,
    REFERENCE,
    REQUEST,
    SMALL,
    STAGE_ONE,
    T2I,
    T2I_ADAPTER,
    T2I_OF_SDXL,
    T2I_WITHOUT_NAME,
    Case,
    ask,
    check_base_picture,
    final,
    mask,
    natively,
    of_sdxl,
    of_the_base,
    picture,
    unit,
)

CASES: dict[str, Case] = {
    "no unit": ([], {}),
    "T2I-Adapter": ([T2I], {}),
    "no name": ([LINES], {}),
    "batch": ([T2I], {"batch_size": 2}),
    "two units": ([T2I, unit(T2I_ADAPTER, weight=0.5, resize_mode="Resize and Fill")], {}),
    "late": ([{**LINES, "guidance_start": 0.1, "weight": 2}], {"steps": 12}),
    "early": ([{**LINES, "guidance_end": 0.1}], {}),
    "firmly": ([{**T2I, **FIRMLY}], {}),
    "pixel perfect": ([unit(T2I_ADAPTER, pixel_perfect=True, resize_mode="Just Resize")], {}),
    "Heun": ([{**LINES, "guidance_end": 0.2}], {"sampler_name": "Heun"}),
    "DDIM": ([{**LINES, "guidance_end": 0.3}], {"sampler_name": "DDIM"}),
    "reference": ([REFERENCE], {}),
    "inpaint": ([unit(T2I_ADAPTER, "inpaint_only", mask=encode_image(mask()))], {}),
    "tile": ([unit(T2I_ADAPTER, "tile_colorfix", threshold_a=8)], {}),
    "AdaIN": ([unit(None, "reference_adain+attn", threshold_a=0.5)], {"batch_size": 2}),
}


@pytest.fixture(scope="module")
def webui(controlnet_webui: WebUIServer) -> WebUIServer:
    return controlnet_webui


@pytest.fixture(scope="module")
def native_pictures(webui):
    return natively(webui, "tiny15", CASES)


class TestTheBasesPicture:
    """It is the WebUI's own, with the SD1.5 checkpoint selected and the same units; detected maps come with it."""

    @pytest.mark.parametrize("name", CASES)
    def test_case(self, webui, native_pictures, name):
        check_base_picture(webui, native_pictures, name, CASES[name], SMALL)

    def test_batch_count_makes_the_same_pictures_and_one_map(self, webui):
        counted = of_the_base(ask(webui, [LINES], {**SMALL, **STAGE_ONE}, n_iter=2))
        assert len(counted) == 3
        for place, image in enumerate(counted[:2]):
            alone = of_the_base(ask(webui, [LINES], {**SMALL, **STAGE_ONE}, seed=PLAIN["seed"] + place))
            assert grey_levels_apart(image, alone[0]) <= 1


def img2img(server: WebUIServer, start: Image.Image, units: list[dict]) -> Image.Image:
    """What the img2img tab makes of a picture, with SDXL's own units."""
    scripts = {"alwayson_scripts": {"ControlNet": {"args": units}}} if units else {}
    return made(server.img2img(start, **REQUEST, denoising_strength=0.8, **scripts)).images[0]


@pytest.fixture(scope="module")
def without(webui):
    return final(webui, [], SMALL)


class TestSDXL:
    """It follows the base in the joint stage, and keeps its own units."""

    @pytest.mark.parametrize("units", [[REFERENCE], [LINES, LINES_XL]], ids=["reference", "both"])
    def test_a_unit_changes_the_picture(self, webui, without, units):
        assert grey_levels_apart(final(webui, units, SMALL), without) > 1

    def test_half_a_units_weight_is_between_none_and_all(self, webui, without):
        half, whole = (final(webui, [{**T2I, "weight": weight}], SMALL) for weight in (0.5, 1))
        assert is_between(half, without, whole)

    def test_without_weight_the_bases_units_do_not_touch_it(self, webui):
        answer = ask(webui, [LINES], {**SMALL, "weight": 0, "return_base_image": True})
        (ours,), start = of_sdxl(answer), of_the_base(answer)[0]
        assert grey_levels_apart(ours, img2img(webui, start, [])) <= 1

    @pytest.mark.parametrize("units", [[LINES_XL], [LINES, LINES_XL]], ids=["alone", "beside one of the base"])
    def test_its_own_unit_stays_with_it(self, webui, native_pictures, units):
        answer = ask(webui, units, {**SMALL, "weight": 0, "return_base_image": True})
        (ours, *maps), (start, *_) = of_sdxl(answer), of_the_base(answer)
        case = "no name" if LINES in units else "no unit"
        assert grey_levels_apart(start, native_pictures[case][0]) <= 1
        assert grey_levels_apart(ours, img2img(webui, start, [LINES_XL])) <= 1
        assert grey_levels_apart(ours, img2img(webui, start, [])) > 1
        assert len(maps) == 1

    def test_a_reference_without_weight_leaves_the_features_alone(self, webui, without):
        assert grey_levels_apart(final(webui, [{**REFERENCE, "weight": 0}], SMALL), without) <= 1

    def test_a_unit_stands_where_it_stood_at_the_noise_level_in_stage_1(self, webui):
        """A stage 1 of one step has the unit's start before it at every noise level."""
        one_step = {**SMALL, "base_steps": 1}
        later = final(webui, [{**LINES, "guidance_start": 0.3}], one_step)
        assert same_bytes(later, final(webui, [], one_step))
        assert grey_levels_apart(later, final(webui, [LINES], one_step)) > 1

    def test_in_a_single_stage_a_unit_follows_sdxls_progress(self, webui):
        single = {**SMALL, "single_stage": True}
        unit_free, whole, late, never = (
            final(webui, units, single)
            for units in ([], [LINES], [{**LINES, "guidance_start": 0.2}], [{**LINES, "guidance_start": 0.9}])
        )
        assert grey_levels_apart(whole, unit_free) > 1
        assert not same_bytes(late, unit_free)
        assert not same_bytes(late, whole)
        assert same_bytes(never, unit_free)

    def test_the_infotext_has_all_units_as_the_panel_numbers_them(self, webui):
        infotext = ask(webui, [LINES, LINES_XL], SMALL).infotexts[0]
        assert infotext.index("ControlNet 0") < infotext.index(T2I_WITHOUT_NAME)
        assert f"Model: {T2I_WITHOUT_NAME}," in infotext.split("ControlNet 0")[1].split("ControlNet 1")[0]
        assert f"Model: {T2I_OF_SDXL}," in infotext.split("ControlNet 1")[1]


class TestAfterwards:
    """Nothing of a unit is left."""

    @pytest.mark.parametrize("units", [[T2I], [REFERENCE], [LINES, LINES_XL]], ids=["T2I", "reference", "both"])
    def test_pictures_and_state_are_as_before(self, webui, units):
        before, without, state = final(webui, [], None), final(webui, [], SMALL), webui.state()
        made(ask(webui, units, SMALL))
        assert same_bytes(final(webui, [], SMALL), without)
        assert same_bytes(final(webui, [], None), before)
        assert webui.state() == state

    @pytest.mark.parametrize("where", ["base_unet", "vae_decode"])
    def test_also_after_a_job_that_failed(self, webui, where):
        without, state = final(webui, [], SMALL), webui.state()
        with webui.fault(where, after=1):
            assert ask(webui, [T2I], SMALL).status == 500
        assert same_bytes(final(webui, [], SMALL), without)
        assert webui.state()["callbacks"] == state["callbacks"]


class TestWhatCannotWork:
    """The job ends with a message that names the unit and its file; the picture is not silently plain."""

    @pytest.mark.parametrize(
        ("units", "named"),
        [
            ([unit(T2I_ADAPTER, image=None)], ["unit 0", T2I_ADAPTER, "no image"]),
            ([T2I, unit(None, "canny")], ["unit 1", "canny", "no model"]),
            ([unit("nowhere")], ["unit 0", "nowhere", "no such model"]),
            ([unit("cut_sd15")], ["cut_sd15.safetensors", "cut off"]),
            ([unit("text_sd15")], ["text_sd15.pth"]),
            ([T2I, unit("odd_sd15")], ["unit 1", "odd_sd15"]),
            ([T2I, {**LINES_XL, "image": None}], ["unit 1", T2I_OF_SDXL, "no image"]),
            ([{**LINES_XL, "image": None}], ["unit 0", T2I_OF_SDXL, "no image"]),
            ([T2I, unit("odd_sdxl")], ["unit 1", "odd_sdxl", "SDXL", "log"]),
            ([{**T2I, "mask": encode_image(mask(64, 64))}], ["unit 0", "not aligned"]),
            ([{**T2I, "input_mode": "merge"}], ["unit 0", T2I_ADAPTER, "merges a list of images"]),
        ],
        ids=[
            "image",
            "model",
            "unknown model",
            "cut file",
            "no file of tensors",
            "wrong shapes",
            "image for SDXL",
            "image for SDXL alone",
            "wrong shapes for SDXL",
            "mask of another size",
            "no list to merge",
        ],
    )
    def test_it_is_told(self, webui, units, named):
        answer = ask(webui, units, SMALL)
        assert answer.status == 422
        assert all(word in answer.error for word in named), answer.error

    @pytest.mark.parametrize("units", [[T2I], [LINES_XL]], ids=["the base's", "SDXL's"])
    def test_a_folder_of_images_is_refused(self, webui, tmp_path, units):
        picture().save(tmp_path / "one.png")
        folder = {"input_mode": "batch", "batch_images": str(tmp_path)}
        answer = ask(webui, [{**units[0], **folder}], SMALL)
        assert answer.status == 422
        assert "ControlNet unit 0" in answer.error
        assert "a batch of images, which does not work together with X-Adapter" in answer.error

    @pytest.mark.parametrize(("given", "named"), [({"module": "unheard_of"}, "unheard_of"), ({"weight": 7}, "weight")])
    def test_what_the_extension_itself_refuses_is_told(self, webui, given, named):
        answer = ask(webui, [{**T2I, **given}], SMALL)
        assert answer.status != 200
        assert named in answer.error

    def test_what_the_user_has_no_part_in_is_an_error_whose_place_the_log_tells(self, webui):
        told = webui.log.count("in read_units")
        with webui.pretending("another ControlNet"):
            answer = ask(webui, [T2I], SMALL)
        assert answer.status == 500
        assert "args_from" in answer.error
        assert webui.log.count("in read_units") > told

    def test_the_next_job_works(self, webui):
        without = final(webui, [], SMALL)
        ask(webui, [T2I, unit("odd_sd15")], SMALL)
        assert same_bytes(final(webui, [], SMALL), without)
