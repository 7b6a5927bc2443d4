"""ControlNet units of sd-webui-controlnet on the base, on the real WebUI, beside SDXL's own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file

from .asking import TITLE, made
from .conftest import PLAIN, grey_levels_apart, same_bytes
from .server import Answer, WebUIServer, encode_image, small_models

CONTROLNET = "control_v11p_sd15_canny"
T2I_ADAPTER = "t2iadapter_canny_sd15"
# what no name tells: the extension takes neither for SD1.5, and its files are read
T2I_WITHOUT_NAME = "lines"
T2I_OF_SDXL = "linesxl"

REQUEST = {**PLAIN, "steps": 4, "prompt": "a cat"}
HALF = {"width": PLAIN["width"] // 2, "height": PLAIN["height"] // 2}
SMALL = {"base_checkpoint": "tiny15", "adapter": "tiny"}
STAGE_ONE = {"weight": 0, "switch_point": 0.2, "return_base_image": True}
"""Little more than the base's own picture."""
WIDE = {"base_checkpoint": "wide15", "adapter": "wide"}


def picture(width: int = 200, height: int = 136) -> Image.Image:
    """Something with edges, in another ratio than what is made."""
    image = Image.new("RGB", (width, height), "navy")
    drawing = ImageDraw.Draw(image)
    drawing.rectangle((20, 20, 90, 110), fill="orange")
    drawing.ellipse((100, 30, 180, 110), fill="white")
    return image


def mask(width: int = 200, height: int = 136) -> Image.Image:
    image = Image.new("RGB", (width, height), "black")
    ImageDraw.Draw(image).rectangle((60, 0, 140, height), fill="white")
    return image


def unit(model: str | None, module: str = "canny", **given: Any) -> dict[str, Any]:
    """A unit as the ControlNet extension takes it over REST."""
    image = {} if "image" in given else {"image": encode_image(picture())}
    return {"enabled": True, "module": module, "model": model or "None", "processor_res": 128, **image, **given}


T2I = unit(T2I_ADAPTER, "none")
LINES = unit(T2I_WITHOUT_NAME, "none")
LINES_XL = unit(T2I_OF_SDXL, "none")
REFERENCE = unit(None, "reference_only", threshold_a=0.5)
CANNY = unit(CONTROLNET)
QUICK = {"steps": 2}
FIRMLY = {"control_mode": "ControlNet is more important"}

SMALL_CASES: dict[str, tuple[list[dict], dict]] = {
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
WIDE_CASES: dict[str, tuple[list[dict], dict]] = {
    "no unit": ([], QUICK),
    "ControlNet": ([CANNY], QUICK),
    "two units": (
        [CANNY, unit(CONTROLNET, "none", **FIRMLY, resize_mode="Resize and Fill")],
        QUICK | {"batch_size": 2},
    ),
}


@pytest.fixture(scope="module")
def more_models(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """T2I-Adapters that no name tells apart, and files that cannot work."""
    folder = tmp_path_factory.mktemp("more") / "models/ControlNet"
    folder.mkdir(parents=True)
    source = models / f"models/ControlNet/{T2I_ADAPTER}.safetensors"
    weights = load_file(source)
    stronger = {name: 2 * tensor if "block2" in name else tensor for name, tensor in weights.items()}
    save_file(stronger, folder / f"{T2I_WITHOUT_NAME}.safetensors")
    first = torch.randn((32, 3 * 16 * 16, 3, 3), generator=torch.Generator().manual_seed(3)) / 83
    save_file({**weights, "conv_in.weight": first}, folder / f"{T2I_OF_SDXL}.safetensors")
    (folder / "cut_sd15.safetensors").write_bytes(source.read_bytes()[:20000])
    (folder / "text_sd15.pth").write_text("no model")
    odd = {name: tensor for name, tensor in weights.items() if not name.startswith("body.7")}
    odd["body.0.block1.weight"] = torch.zeros(8, 8, 3, 3)
    save_file(odd, folder / "odd_sd15.safetensors")
    return folder.parents[1]


@pytest.fixture(scope="module")
def webui(installation, models, more_models, start_webui) -> Iterator[WebUIServer]:
    """A WebUI with X-Adapter and the ControlNet extension."""
    if not os.environ.get("CONTROLNET_DIR"):
        pytest.skip("needs the ControlNet extension: set CONTROLNET_DIR to the folder of sd-webui-controlnet")
    extension = Path(os.environ["CONTROLNET_DIR"]).resolve()
    folders = [models, more_models, small_models(installation, full_width_base=True)]
    with start_webui("controlnet", models=folders, more_extensions=[extension]) as server:
        yield server


def ask(server: WebUIServer, units: list[dict], given: dict | None = None, **request: Any) -> Answer:
    """Pictures with these units; `given` are X-Adapter's arguments, None for none."""
    scripts: dict[str, Any] = {"ControlNet": {"args": units}} if units else {}
    if given is not None:
        scripts[TITLE] = {"args": [given]}
    return server.txt2img(**{**REQUEST, **request}, alwayson_scripts=scripts)


def of_the_base(answer: Answer) -> list[Image.Image]:
    """Pictures of the base's size: its own, then the detected maps."""
    return [image for image in made(answer).images if image.size == (HALF["width"], HALF["height"])]


def of_sdxl(answer: Answer) -> list[Image.Image]:
    """Pictures of SDXL's size, without grids."""
    return [image for image in made(answer).images if image.size == (PLAIN["width"], PLAIN["height"])]


def natively(server: WebUIServer, checkpoint: str, cases: dict[str, tuple[list[dict], dict]]) -> dict[str, list]:
    """What the WebUI and the extension make of each case with the SD1.5 checkpoint selected, at the base's size."""
    server.post("/sdapi/v1/options", {"sd_model_checkpoint": checkpoint})
    try:
        made_natively = {}
        for name, (units, request) in cases.items():
            made_natively[name] = of_the_base(ask(server, units, **HALF, **request))
            without = f"without units: {request}"
            if without not in made_natively:
                made_natively[without] = of_the_base(ask(server, [], **HALF, **request))
        return made_natively
    finally:
        server.post("/sdapi/v1/options", {"sd_model_checkpoint": "tinyxl"})


@pytest.fixture(scope="module")
def small_pictures(webui):
    return natively(webui, "tiny15", SMALL_CASES)


@pytest.fixture(scope="module")
def wide_pictures(webui):
    return natively(webui, "wide15", WIDE_CASES)


def check(server: WebUIServer, natively_made: dict[str, list], case: tuple[list[dict], dict], given: dict, name: str):
    units, request = case
    answer = ask(server, units, {**given, **STAGE_ONE}, **request)
    ours = of_the_base(answer)
    assert len(ours) == len(natively_made[name]) == request.get("batch_size", 1) + len(units)
    assert all(len(image.getcolors(2**16)) > 99 for image in ours[: request.get("batch_size", 1)]), "a blank picture"
    for one, other in zip(ours, natively_made[name], strict=True):
        assert grey_levels_apart(one, other) <= 1
    if units:
        assert grey_levels_apart(ours[0], natively_made[f"without units: {request}"][0]) > 1


class TestTheBasesPicture:
    """It is the WebUI's own, with the SD1.5 checkpoint selected and the same units; detected maps come with it."""

    @pytest.mark.parametrize("name", SMALL_CASES)
    def test_small(self, webui, small_pictures, name):
        check(webui, small_pictures, SMALL_CASES[name], SMALL, name)

    @pytest.mark.parametrize("name", WIDE_CASES)
    def test_full_width(self, webui, wide_pictures, name):
        check(webui, wide_pictures, WIDE_CASES[name], WIDE, name)

    def test_batch_count_makes_the_same_pictures_and_one_map(self, webui):
        counted = of_the_base(ask(webui, [LINES], {**SMALL, **STAGE_ONE}, n_iter=2))
        assert len(counted) == 3
        for place, image in enumerate(counted[:2]):
            alone = of_the_base(ask(webui, [LINES], {**SMALL, **STAGE_ONE}, seed=PLAIN["seed"] + place))
            assert grey_levels_apart(image, alone[0]) <= 1


def final(server: WebUIServer, units: list[dict], given: dict, **request: Any) -> Image.Image:
    """SDXL's picture."""
    return of_sdxl(ask(server, units, given, **request))[0]


def img2img(server: WebUIServer, start: Image.Image, units: list[dict]) -> Image.Image:
    """What the img2img tab makes of a picture, with SDXL's own units."""
    scripts = {"alwayson_scripts": {"ControlNet": {"args": units}}} if units else {}
    return made(server.img2img(start, **REQUEST, denoising_strength=0.8, **scripts)).images[0]


@pytest.fixture(scope="module")
def without(webui):
    return final(webui, [], SMALL)


class TestSDXL:
    """It follows the base in the joint stage, and keeps its own units."""

    @pytest.mark.parametrize("units", [[T2I], [REFERENCE], [LINES, LINES_XL]], ids=["T2I", "reference", "both"])
    def test_a_unit_changes_the_picture(self, webui, without, units):
        assert grey_levels_apart(final(webui, units, SMALL), without) > 1

    def test_a_full_width_controlnet_does(self, webui):
        assert grey_levels_apart(final(webui, [CANNY], WIDE, **QUICK), final(webui, [], WIDE, **QUICK)) > 1

    def test_without_weight_the_bases_units_do_not_touch_it(self, webui):
        answer = ask(webui, [LINES], {**SMALL, "weight": 0, "return_base_image": True})
        (ours,), start = of_sdxl(answer), of_the_base(answer)[0]
        assert grey_levels_apart(ours, img2img(webui, start, [])) <= 1

    @pytest.mark.parametrize("units", [[LINES_XL], [LINES, LINES_XL]], ids=["alone", "beside one of the base"])
    def test_its_own_unit_stays_with_it(self, webui, small_pictures, units):
        answer = ask(webui, units, {**SMALL, "weight": 0, "return_base_image": True})
        (ours, *maps), (start, *_) = of_sdxl(answer), of_the_base(answer)
        case = "no name" if LINES in units else "no unit"
        assert grey_levels_apart(start, small_pictures[case][0]) <= 1
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
        assert grey_levels_apart(final(webui, [], None), before) <= 1
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
        ],
        ids=["image", "model", "unknown model", "cut file", "no file of tensors", "wrong shapes"],
    )
    def test_it_is_told(self, webui, units, named):
        answer = ask(webui, units, SMALL)
        assert answer.status == 422
        assert all(word in answer.error for word in named), answer.error

    @pytest.mark.parametrize(("given", "named"), [({"module": "unheard_of"}, "unheard_of"), ({"weight": 7}, "weight")])
    def test_what_the_extension_itself_refuses_is_told(self, webui, given, named):
        answer = ask(webui, [{**T2I, **given}], SMALL)
        assert answer.status != 200
        assert named in answer.error

    def test_the_next_job_works(self, webui):
        without = final(webui, [], SMALL)
        ask(webui, [T2I, unit("odd_sd15")], SMALL)
        assert same_bytes(final(webui, [], SMALL), without)
