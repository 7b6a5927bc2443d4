"""Hires. fix: in the second pass both models go on from the enlarged picture."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from PIL import Image

from tests.pictures import grey_levels_apart

from .asking import BASE, STRENGTH, UPGRADED, arguments, plain, sdedit, with_xadapter
from .conftest import PLAIN, is_blank, same_bytes
from .server import WebUIServer

STEPS = 4
HIRES = {
    "enable_hr": True,
    "hr_scale": 1.5,
    "hr_upscaler": "Lanczos",
    "denoising_strength": STRENGTH,
    "hr_second_pass_steps": STEPS,
}
SIZE = (PLAIN["width"] * 3 // 2, PLAIN["height"] * 3 // 2)
MEMORY = [{"memory": "lockstep"}, {"memory": "recorded"}]
OFF = {"hires": False}
EVERY_WAY = [
    {},
    {"hr_upscaler": "Latent"},
    {"hr_upscaler": "Latent (nearest-exact)"},
    {"hr_scale": 2},
    {"hr_resize_x": 320, "hr_resize_y": 384},
    {"hr_second_pass_steps": 0},
    {"hr_sampler_name": "DDIM", "hr_scheduler": "Automatic"},
    {"hr_scheduler": "Karras"},
    {"hr_prompt": "a dog", "hr_negative_prompt": "a bird"},
    {"batch_size": 2},
    {"n_iter": 2},
]


@pytest.fixture(scope="module")
def server(start_webui) -> Iterator[WebUIServer]:
    with start_webui(
        "hires",
        options={"save_images_before_highres_fix": False, "img2img_fix_steps": False, "upscaler_for_img2img": "None"},
    ) as started:
        yield started


def enlarged(server: WebUIServer, given: dict | None = None, **request):
    return with_xadapter(server, given, do_not_save_grid=True, **{**HIRES, **request})


@pytest.mark.parametrize("request_", EVERY_WAY, ids=json.dumps)
def test_the_base_guides_both_passes_alike_in_both_memory_modes(server, request_):
    in_lockstep, recorded = (enlarged(server, memory, **request_).images for memory in MEMORY)
    without = enlarged(server, {**OFF, **MEMORY[0]}, **request_).images
    assert all(same_bytes(one, other) for one, other in zip(in_lockstep, recorded, strict=True))
    assert not any(is_blank(image) for image in in_lockstep)
    assert all(grey_levels_apart(one, other) > 1 for one, other in zip(in_lockstep, without, strict=True))


def test_the_base_runs_before_each_evaluation_at_half_the_size(server):
    with server.recorded() as calls:
        enlarged(server, MEMORY[0])
    second = [call for call in calls if call["width"] in (SIZE[0] // 8, SIZE[0] // 16)][-2 * STEPS :]
    assert [call["model"] for call in second] == [BASE, UPGRADED] * STEPS
    for base, upgraded in zip(second[::2], second[1::2], strict=True):
        assert base["timestep"] == pytest.approx(upgraded["timestep"], abs=1e-3)
        assert base["width"] * 2 == upgraded["width"]


def test_switched_off_it_is_the_webuis_own_second_pass(server):
    first = with_xadapter(server, {}).image
    with server.recorded() as calls:
        whole = enlarged(server, OFF).image
    assert [call["model"] for call in calls[-STEPS:]] == [UPGRADED] * STEPS
    assert grey_levels_apart(whole, second_pass(server, first)) <= 1


@pytest.mark.parametrize("nothing", [{"weight": 0}, {"adapter": "None"}], ids=json.dumps)
def test_without_residuals_it_is_the_chain_of_plain_steps(server, nothing):
    """SDXL over the base's picture, then the WebUI's own second pass."""
    first = with_xadapter(server, nothing).image
    assert grey_levels_apart(enlarged(server, nothing).image, second_pass(server, first)) <= 1


def second_pass(server: WebUIServer, first: Image.Image) -> Image.Image:
    """What the img2img tab makes of a finished first pass by the second one's rules: all steps, enlarged by Lanczos."""
    size = {"width": SIZE[0], "height": SIZE[1]}
    all_steps = {"override_settings": {"img2img_fix_steps": True, "upscaler_for_img2img": "None"}}
    return sdedit(server, first, STRENGTH, **size, steps=STEPS, **all_steps)


def test_a_lora_of_the_hires_prompt_acts_on_the_base_in_the_second_pass_alone(server):
    usual = enlarged(server, MEMORY[0]).image
    styled = {"hr_prompt": "a cat <lora:style15:1>"}
    assert grey_levels_apart(enlarged(server, MEMORY[0], **styled).image, usual) > 1
    assert same_bytes(enlarged(server, OFF, **styled).image, enlarged(server, OFF).image)


def test_tokens_of_both_models_are_merged_by_each_pass_own_ratio(server):
    ratios = {"token_merging_ratio": 0.1, "token_merging_ratio_hr": 0.4}
    with server.recorded() as calls:
        enlarged(server, MEMORY[0], override_settings=ratios)
    first, second = calls[: -2 * STEPS], calls[-2 * STEPS :]
    assert {(call["model"], call["merged"]) for call in first} == {(BASE, 0.1), (UPGRADED, 0.1)}
    assert {(call["model"], call["merged"]) for call in second} == {(BASE, 0.4), (UPGRADED, 0.4)}


@pytest.mark.parametrize("how", ["interrupt", "skip"])
@pytest.mark.parametrize("memory", MEMORY, ids=json.dumps)
@pytest.mark.parametrize(
    ("where", "after"),
    [("base_unet", 2), ("base_unet", 8), ("upgraded_unet", 2), ("upgraded_unet", 6), ("base_unet", 12)],
)
def test_stopped_in_any_pass_a_picture_comes_back_and_nothing_is_left(server, memory, where, after, how):
    before = plain(server)
    # a recording of another case would leave the base too little to do
    seed = 70 + after + 100 * (how == "skip")
    with server.fault(where, after, how):
        answer = enlarged(server, memory, seed=seed)
    assert not is_blank(answer.image)
    assert server.state()["hooks"] == []
    assert same_bytes(plain(server), before)


@pytest.mark.parametrize("memory", MEMORY, ids=json.dumps)
@pytest.mark.parametrize(("where", "after"), [("base_unet", 12), ("upgraded_unet", 6), ("vae_decode", 2)])
def test_a_fault_in_the_second_pass_ends_the_job_with_its_message(server, memory, where, after):
    before = plain(server)
    with server.fault(where, after):
        answer = server.txt2img(**{**PLAIN, **HIRES, "seed": 90 + after}, **arguments(**memory))
    assert answer.status == 500
    assert "armed by the probe" in answer.error
    assert server.state()["hooks"] == []
    assert same_bytes(plain(server), before)


def test_every_sampler_runs_in_both_passes(server):
    for sampler in server.get("/sdapi/v1/samplers").content:
        request = {"width": 256, "height": 256, "hr_scale": 2, "steps": 5, "hr_second_pass_steps": 4}
        answer = enlarged(server, {}, sampler_name=sampler["name"], **request)
        assert answer.image.size == (512, 512)
        assert not is_blank(answer.image), sampler["name"]
    assert server.state()["hooks"] == []


def test_the_picture_before_is_saved_as_the_webui_saves_it(server):
    saved = {"save_images": True, "override_settings": {"save_images_before_highres_fix": True}}
    enlarged(server, {}, **saved)
    assert list((server.data / "outputs").rglob("*-before-highres-fix.png"))
