"""Where each ControlNet unit goes: asked before a run, said after it."""

from __future__ import annotations

import pytest

from .server import WebUIServer
from .units import (
    LINES,
    LINES_XL,
    REFERENCE,
    SMALL,
    STAGE_ONE,
    T2I_OF_SDXL,
    T2I_WITHOUT_NAME,
    ask,
    made,
    unit,
)

SPLIT = f"ControlNet unit 0 {T2I_WITHOUT_NAME} to SD1.5; ControlNet unit 2 {T2I_OF_SDXL} to SDXL"
UNITS = [LINES, {**LINES, "enabled": False}, LINES_XL]


def route(server: WebUIServer, units: list, **prompts: str) -> dict:
    reply = server.post("/xadapter/v1/plan", {**prompts, "units": units})
    assert reply.status == 200, reply.content
    return reply.content


class TestBeforeARun:
    """The route reads the units' files, and loads nothing."""

    def test_each_enabled_unit_has_its_model(self, controlnet_webui):
        told = route(controlnet_webui, UNITS)
        assert told["summary"] == SPLIT
        assert told["plugins"][0] == {
            "kind": "ControlNet unit 0",
            "name": T2I_WITHOUT_NAME,
            "models": ["base"],
            "made_for": "sd1",
            "problem": "",
        }
        assert [plugin["made_for"] for plugin in told["plugins"]] == ["sd1", "sdxl"]

    def test_a_preprocessor_without_model_works_on_the_base(self, controlnet_webui):
        assert route(controlnet_webui, [REFERENCE])["summary"] == "ControlNet unit 0 reference_only to SD1.5"
        (of_sdxl,) = route(controlnet_webui, [unit(None, "revision_clipvision")])["plugins"]
        assert (of_sdxl["models"], of_sdxl["made_for"]) == (["sdxl"], "sdxl")

    def test_it_stands_behind_the_prompts_plugins(self, controlnet_webui):
        told = route(controlnet_webui, [LINES], prompt="a cat <lora:stylexl:1>")
        assert told["summary"] == f"LoRA stylexl to SDXL; ControlNet unit 0 {T2I_WITHOUT_NAME} to SD1.5"

    def test_no_model_is_loaded_for_it(self, controlnet_webui):
        before = controlnet_webui.state()
        route(controlnet_webui, UNITS)
        assert controlnet_webui.state() == before

    @pytest.mark.parametrize(
        ("asked", "name", "problem"),
        [
            (unit(None, "canny"), "canny", "is enabled and has no model"),
            (unit("nowhere"), "nowhere", "is enabled and there is no such model in the ControlNet folders"),
            (unit("cut_sd15"), "cut_sd15", "cut_sd15.safetensors"),
            (unit("text_sd15"), "text_sd15", "text_sd15.pth"),
            (unit(T2I_WITHOUT_NAME, "unheard_of"), T2I_WITHOUT_NAME, "module(unheard_of) not found"),
        ],
        ids=["no model", "unknown model", "cut file", "no file of tensors", "unknown preprocessor"],
    )
    def test_what_will_be_refused_is_named(self, controlnet_webui, asked, name, problem):
        (plugin,) = route(controlnet_webui, [asked])["plugins"]
        assert (plugin["name"], plugin["models"]) == (name, [])
        assert problem in plugin["problem"]

    def test_what_the_extension_would_unpickle_is_not_looked_at(self, controlnet_webui):
        whole = route(controlnet_webui, [LINES | {"ipadapter_input": "no pickle", "effective_region_mask": "no image"}])
        assert whole == route(controlnet_webui, [LINES])

    def test_without_the_extension_the_unit_has_nowhere_to_go(self, webui):
        (plugin,) = route(webui, [LINES, {**LINES, "enabled": False}])["plugins"]
        assert plugin["models"] == []
        assert "needs the ControlNet extension" in plugin["problem"]

    def test_another_shape_of_request_is_refused(self, controlnet_webui):
        for units in ("lines", ["lines"], {"0": LINES}):
            assert controlnet_webui.post("/xadapter/v1/plan", {"units": units}).status == 422


class TestAfterARun:
    def test_the_infotext_says_it(self, controlnet_webui):
        infotext = made(ask(controlnet_webui, UNITS, {**SMALL, **STAGE_ONE}, steps=2)).infotexts[0]
        assert f"X-Adapter plugins: {SPLIT}" in infotext

    def test_behind_the_prompts_plugins(self, controlnet_webui):
        answer = ask(controlnet_webui, [LINES], SMALL, steps=1, prompt="a base15 cat <lora:style15:1>")
        told = "LoRA style15 to SD1.5; textual inversion base15 to SD1.5; ControlNet unit 0 lines to SD1.5"
        assert f"X-Adapter plugins: {told}" in made(answer).infotexts[0]

    def test_a_picture_without_xadapter_does_not(self, controlnet_webui):
        assert "X-Adapter" not in made(ask(controlnet_webui, [LINES_XL], steps=1)).infotexts[0]
