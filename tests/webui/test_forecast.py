"""What is told before a run is what the run does."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from PIL import Image

from .asking import arguments, made
from .conftest import PLAIN
from .server import WebUIServer

MODELS = {"base": "LatentDiffusion", "upgraded": "DiffusionEngine"}
LATENT_PIXEL = 8


def told(server: WebUIServer, given: dict[str, Any] | None = None, **asked: Any) -> dict[str, Any]:
    reply = server.post("/xadapter/v1/plan", {**asked, "args": [given or {}]})
    assert reply.status == 200, reply.content
    return reply.content


def evaluations_told(plan: dict[str, Any]) -> Counter:
    """How often each model is evaluated at each size, by the plan."""
    counted: Counter = Counter()
    for one in plan["passes"]:
        for name, model in MODELS.items():
            if (size := one[name]) is not None:
                counted[model, size["width"], size["height"]] += one["steps"]
    return counted


def evaluations_made(calls: list[dict[str, Any]]) -> Counter:
    """The same of a run with a sampler that evaluates a model once a step."""
    return Counter((call["model"], call["width"] * LATENT_PIXEL, call["height"] * LATENT_PIXEL) for call in calls)


@pytest.mark.parametrize(
    ("given", "request_"),
    [
        ({}, {}),
        ({"switch_point": 0.35, "base_steps": 4, "base_width": 192}, {"height": 320}),
        ({"single_stage": True}, {}),
        ({"adapter": "None"}, {}),
        ({"weight": [0, 0, 0], "switch_point": 0}, {}),
        ({"switch_point": 1}, {}),
    ],
    ids=["defaults", "sizes and steps", "single stage", "no adapter", "no weight", "everything anew"],
)
def test_the_plan_is_what_txt2img_does(webui, given, request_):
    asked = {name: {**PLAIN, **request_}[name] for name in ("width", "height", "steps")}
    with webui.recorded() as calls:
        made(webui.txt2img(**{**PLAIN, **request_}, **arguments(**given)))
    assert evaluations_made(calls) == evaluations_told(told(webui, given, **asked))


@pytest.mark.parametrize(
    ("given", "request_"),
    [
        ({}, {}),
        ({"hires": False}, {}),
        ({"base_width": 192, "weight": 0.5}, {"hr_second_pass_steps": 3}),
        ({"adapter": "None"}, {"hr_scale": 1, "hr_resize_x": 384, "hr_resize_y": 320}),
    ],
    ids=["defaults", "first pass alone", "sizes and steps", "no adapter"],
)
def test_the_plan_is_what_hires_fix_does(webui, given, request_):
    hires = {"enable_hr": True, "hr_scale": 1.5, "denoising_strength": 0.5, **request_}
    with webui.recorded() as calls:
        made(webui.txt2img(**PLAIN, **hires, hr_upscaler="Latent", **arguments(**given)))
    asked = {name: PLAIN[name] for name in ("width", "height", "steps")}
    assert evaluations_made(calls) == evaluations_told(told(webui, given, **asked, **hires))


@pytest.mark.parametrize(
    ("given", "strength"),
    [({}, 0.75), ({}, 0.3), ({"img2img_start": "base"}, 0.5), ({"img2img_start": "base", "base_steps": 4}, 0.5)],
    ids=str,
)
def test_the_plan_is_what_img2img_does(webui, given, strength):
    start = Image.effect_noise((320, 256), 50).convert("RGB")
    with webui.recorded() as calls:
        made(webui.img2img(start, **PLAIN, denoising_strength=strength, **arguments(**given)))
    asked = {name: PLAIN[name] for name in ("width", "height", "steps")}
    plan = told(webui, given, **asked, tab="img2img", denoising_strength=strength)
    assert evaluations_made(calls) == evaluations_told(plan)


def test_steps_are_exact_where_the_webui_takes_exact_ones(webui):
    webui.post("/sdapi/v1/options", {"img2img_fix_steps": True})
    try:
        with webui.recorded() as calls:
            made(webui.txt2img(**PLAIN, **arguments()))
        plan = told(webui, width=PLAIN["width"], height=PLAIN["height"], steps=PLAIN["steps"])
        assert plan["passes"][1]["steps"] == PLAIN["steps"]
        assert evaluations_made(calls) == evaluations_told(plan)
    finally:
        webui.post("/sdapi/v1/options", {"img2img_fix_steps": False})


class TestTheLine:
    def line(self, webui, given: dict[str, Any] | None = None, **asked: Any) -> str:
        return told(webui, given, **{"width": 1024, "height": 768, "steps": 20, **asked})["line"]

    def test_it_tells_passes_sizes_steps_and_memory(self, webui):
        assert self.line(webui) == (
            "SD1.5 (512×384) samples 20 steps from noise. Then SD1.5 (512×384) and SDXL (1024×768) sample the last 17 "
            "of 20 steps together over that picture (switch point 0.8). Memory: lockstep (auto)."
        )
        assert self.line(webui, {"memory": "recorded"}).endswith("Memory: recorded.")

    def test_without_the_adapter_sdxl_is_alone_after_the_switch(self, webui):
        line = self.line(webui, {"adapter": "None"})
        assert "Then SDXL (1024×768) samples the last 17 of 20 steps over that picture" in line

    def test_in_img2img_both_start_from_the_given_picture(self, webui):
        line = self.line(webui, tab="img2img", denoising_strength=0.5)
        assert line.startswith(
            "SD1.5 (512×384) and SDXL (1024×768) sample the last 11 of 20 steps together over the given picture "
            "(denoising strength 0.5)."
        )

    def test_in_img2img_the_base_can_go_first(self, webui):
        line = self.line(webui, {"img2img_start": "base"}, tab="img2img", denoising_strength=0.5)
        assert line.startswith(
            "SD1.5 (512×384) samples the last 11 of 20 steps over the given picture (denoising strength 0.5). Then "
            "SD1.5 (512×384) and SDXL (1024×768) sample the last 17 of 20 steps together over that picture"
        )

    def test_resize_by_counts_from_the_picture(self, webui):
        by = {"tab": "img2img", "scale_by": 1.5, "source_width": 512, "source_height": 400}
        assert "SD1.5 (384×296) and SDXL (768×600)" in self.line(webui, **by)
        by |= {"source_width": 0, "source_height": 0}
        assert "SDXL (size of a picture that is not there yet)" in self.line(webui, **by)

    @pytest.mark.parametrize(
        ("asked", "sizes"),
        [
            ({"hr_scale": 1.5}, "SD1.5 (768×576) and SDXL (1536×1152)"),
            ({"hr_resize_x": 1600, "hr_resize_y": 1600}, "SD1.5 (800×800) and SDXL (1600×1600)"),
            ({"hr_resize_x": 1600}, "SD1.5 (800×600) and SDXL (1600×1200)"),
        ],
        ids=str,
    )
    def test_hires_fix_has_a_pass_of_its_own(self, webui, asked, sizes):
        line = self.line(webui, enable_hr=True, hr_second_pass_steps=10, denoising_strength=0.5, **asked)
        hires = f"Hires. fix: {sizes} sample 10 steps together over the upscaled picture"
        assert f"(switch point 0.8). {hires} (denoising strength 0.5). Memory:" in line

    def test_hires_fix_can_be_left_to_sdxl(self, webui):
        line = self.line(webui, {"hires": False}, enable_hr=True, hr_scale=2)
        assert "Hires. fix: SDXL (2048×1536) samples 20 steps over the upscaled picture" in line

    def test_it_tells_when_the_adapter_acts(self, webui):
        line = self.line(webui, {"guidance_start": 0.1, "guidance_end": 0.75, "refresh_every": 3})
        assert "The adapter acts from 10% to 75% of these steps. SD1.5 runs at one in 3 of them." in line

    def test_unticked_it_says_so(self, webui):
        assert "not ticked" in self.line(webui, {"enabled": False})

    @pytest.mark.parametrize(
        ("given", "problem"),
        [
            ({"switch_point": 2}, "'switch_point' is 2, expected a number from 0 to 1."),
            ({"guidance_start": 0.5, "guidance_end": 0.2}, "'guidance_start' is 0.5, after 'guidance_end' at 0.2."),
            ({"base_checkpoint": "nobody"}, "'base_checkpoint' is 'nobody', which is not among"),
            ({"adapter": "nothing"}, "'adapter' is 'nothing', which is not among"),
            ({"base_start": "control image"}, "in img2img the base starts from the given picture."),
        ],
        ids=str,
    )
    def test_what_will_be_refused_is_told_before(self, webui, given, problem):
        plan = told(webui, given, tab="img2img")
        assert problem in plan["line"]
        assert plan["problem"] is True


def test_nothing_is_loaded_for_it(webui):
    before = webui.state()
    told(webui, {"base_prompt": "a dog"}, enable_hr=True, prompt="a cat <lora:style15:1>")
    assert webui.state() == before


def test_another_shape_of_request_is_refused(webui):
    for asked in ({"width": "wide"}, {"args": "all"}):
        assert webui.post("/xadapter/v1/plan", asked).status == 422
