"""The base recorded before SDXL runs: the same picture, and no base at all where only SDXL's side changes."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.pictures import grey_levels_apart

from .asking import made, with_xadapter
from .conftest import PLAIN, is_blank, same_bytes

RECORDED = {"memory": "recorded"}
LOCKSTEP = {"memory": "lockstep"}
BASE, SDXL = "LatentDiffusion", "DiffusionEngine"
JOINT_STEPS = 5
"""Of PLAIN's six with a switch point of 0.8."""


def models_called(webui, given: dict[str, Any], **request: Any) -> list[str]:
    """Which model's UNet was called, call after call."""
    with webui.recorded() as calls:
        with_xadapter(webui, {**RECORDED, **given}, **request)
    return [call["model"] for call in calls]


@pytest.fixture
def fresh(webui):
    """A seed that no recording was made with."""
    fresh.seed = getattr(fresh, "seed", 1000) + 10
    return {"seed": fresh.seed}


class TestThePicture:
    """It is that of lockstep."""

    @pytest.mark.parametrize(
        "given",
        [
            {},
            {"single_stage": True},
            {"refresh_every": 2},
            {"cond_only": True},
            {"uncond_weight": 0.3},
            {"guidance_start": 0.3, "guidance_end": 0.6},
            {"base_seed": 5, "base_prompt": "a dog"},
        ],
        ids=str,
    )
    def test_whatever_the_settings(self, webui, given):
        beside, recorded = (with_xadapter(webui, {**given, **memory}).image for memory in (LOCKSTEP, RECORDED))
        assert not is_blank(beside)
        assert same_bytes(beside, recorded)

    @pytest.mark.parametrize(
        "sampler", ["Heun", "DPM2 a", "DPM++ SDE", "DDIM", "DDIM CFG++", "PLMS", "UniPC", "Restart", "LMS"]
    )
    def test_whatever_the_sampler(self, webui, sampler):
        request = {"sampler_name": sampler, "steps": 5}
        beside, recorded = (with_xadapter(webui, memory, **request).image for memory in (LOCKSTEP, RECORDED))
        assert same_bytes(beside, recorded)

    def test_in_batches(self, webui):
        request = {"batch_size": 2, "n_iter": 2, "do_not_save_grid": True}
        beside, recorded = (with_xadapter(webui, memory, **request).images for memory in (LOCKSTEP, RECORDED))
        assert all(same_bytes(one, other) for one, other in zip(beside, recorded, strict=True))

    def test_a_recording_that_ram_would_not_hold_runs_in_lockstep_and_says_so(self, webui, fresh):
        beside = with_xadapter(webui, LOCKSTEP, **fresh).image
        assert "more RAM than is free" not in webui.log
        with webui.pretending("no free RAM"), webui.recorded() as calls:
            recorded = with_xadapter(webui, RECORDED, **fresh).image
        assert same_bytes(recorded, beside)
        assert [call["model"] for call in calls[PLAIN["steps"] :]] == [BASE, SDXL] * JOINT_STEPS
        assert "more RAM than is free, so memory is 'lockstep'" in webui.log

    def test_a_sampler_that_chooses_its_levels_runs_in_lockstep_and_says_so(self, webui):
        request = {"sampler_name": "DPM adaptive", "steps": 4}
        beside = with_xadapter(webui, LOCKSTEP, **request).image
        assert "noise levels of DPM adaptive are not known" not in webui.log
        assert same_bytes(with_xadapter(webui, RECORDED, **request).image, beside)
        assert "noise levels of DPM adaptive are not known" in webui.log

    def test_a_sampler_that_cannot_be_run_dry_runs_in_lockstep_and_says_so(self, webui):
        beside = with_xadapter(webui, LOCKSTEP).image
        assert "Euler cannot be run dry" not in webui.log
        with webui.fault("sampler", after=0):
            recorded = with_xadapter(webui, RECORDED).image
        assert same_bytes(recorded, beside)
        assert "Euler cannot be run dry: RuntimeError" in webui.log


class TestTurns:
    """The base is through before SDXL begins, and is not run again for what does not concern it."""

    def test_the_base_runs_first(self, webui, fresh):
        called = models_called(webui, {}, **fresh)
        assert called == [BASE] * (PLAIN["steps"] + JOINT_STEPS) + [SDXL] * JOINT_STEPS

    @pytest.mark.parametrize(
        ("given", "request_"),
        [
            ({"weight": 0.5}, {}),
            ({"weight": [1, 0.5, 0]}, {}),
            ({"cond_only": True}, {}),
            ({"uncond_weight": 0}, {}),
            ({}, {"prompt": "a boat"}),
            ({}, {"prompt": "a cat <lora:stylexl:1>"}),
            ({}, {"seed": 1}),
            ({}, {"cfg_scale": 4}),
            ({"return_base_image": True}, {}),
        ],
        ids=str,
    )
    def test_sdxl_alone_runs_again(self, webui, fresh, given, request_):
        """With a prompt, a seed and a guidance of its own, the base does not depend on SDXL's."""
        own = {"base_prompt": "a dog", "base_negative_prompt": "fog", "base_seed": fresh["seed"], "base_cfg_scale": 6}
        first = with_xadapter(webui, {**RECORDED, **own}, **fresh).image
        assert set(models_called(webui, {**own, **given}, **{**fresh, **request_})) == {SDXL}
        again = with_xadapter(webui, {**RECORDED, **own, **given}, **{**fresh, **request_}).images[0]
        beside = with_xadapter(webui, {**LOCKSTEP, **own, **given}, **{**fresh, **request_}).images[0]
        assert grey_levels_apart(again, beside) <= 1
        if "return_base_image" not in given:
            assert not same_bytes(again, first)

    @pytest.mark.parametrize(
        ("given", "request_"),
        [
            ({"switch_point": 0.6}, {}),
            ({"base_prompt": "a dog"}, {}),
            ({"base_cfg_scale": 4}, {}),
            ({"refresh_every": 2}, {}),
            ({}, {"prompt": "a cat <lora:style15:1>"}),
            ({}, {"seed": 1}),
            ({}, {"sampler_name": "DDIM"}),
            ({}, {"override_settings": {"CLIP_stop_at_last_layers": 2}}),
        ],
        ids=str,
    )
    def test_the_base_runs_again_where_it_is_concerned(self, webui, fresh, given, request_):
        with_xadapter(webui, RECORDED, **fresh)
        assert BASE in models_called(webui, given, **{**fresh, "seed": fresh["seed"], **request_})

    def test_what_is_told_of_the_plugins_is_told_again(self, webui, fresh):
        request = {**fresh, "prompt": "a cat <lora:style15:1>, base15"}
        first, again = (with_xadapter(webui, {**RECORDED, "weight": weight}, **request) for weight in (1, 0.5))
        assert "LoRA style15 to SD1.5; textual inversion base15 to SD1.5" in first.infotexts[0]
        told = [re.search("X-Adapter plugins: [^,]*", answer.infotexts[0]).group() for answer in (first, again)]
        assert told[0] == told[1]

    def test_a_picture_of_the_base_that_is_shown_again_has_its_own_text(self, webui, fresh):
        shown = {**RECORDED, "return_base_image": True}
        for weight in (1, 0.5, 0.25):
            answer = with_xadapter(webui, {**shown, "weight": weight}, **fresh)
            picture, base = (image.info["parameters"] for image in answer.images)
            assert weight == 1 or f"X-Adapter weight: {weight}" in picture
            assert "Model: tiny15" in base
            assert "X-Adapter" not in base

    def test_without_room_nothing_is_kept(self, webui, fresh):
        webui.post("/sdapi/v1/options", {"xadapter_recordings": 0})
        try:
            with_xadapter(webui, RECORDED, **fresh)
            assert BASE in models_called(webui, {"weight": 0.5}, **fresh)
        finally:
            webui.post("/sdapi/v1/options", {"xadapter_recordings": 2.0})


class TestBrokenOff:
    @pytest.mark.parametrize("memory", [RECORDED, LOCKSTEP], ids=lambda memory: memory["memory"])
    def test_after_a_skipped_batch_the_next_is_right(self, webui, fresh, memory):
        whole = with_xadapter(webui, memory, **fresh, n_iter=2, do_not_save_grid=True).images
        other = {**fresh, "prompt": "a boat"}
        expected = with_xadapter(webui, memory, **{**other, "seed": fresh["seed"] + 1}).image
        with webui.fault("base_unet", after=2, error="skip"):
            cut = with_xadapter(webui, memory, **other, n_iter=2, do_not_save_grid=True).images
        assert len(whole) == len(cut)
        assert grey_levels_apart(cut[-1], expected) <= 1

    @pytest.mark.parametrize("how", ["interrupt", "skip"])
    @pytest.mark.parametrize("after", [2, PLAIN["steps"] + 2], ids=["in stage 1", "while recording"])
    def test_the_bases_picture_is_returned_and_nothing_kept(self, webui, fresh, how, after):
        with webui.fault("base_unet", after=after, error=how):
            cut = with_xadapter(webui, RECORDED, **fresh)
        assert cut.image.size == (PLAIN["width"], PLAIN["height"])
        assert BASE in models_called(webui, {}, **fresh)

    @pytest.mark.parametrize("where", ["base_unet", "upgraded_unet"])
    def test_after_an_error_the_next_picture_is_right(self, webui, fresh, where):
        beside = with_xadapter(webui, LOCKSTEP, **fresh).image
        state = webui.state()
        with webui.fault(where, after=3):
            answer = webui.txt2img(**{**PLAIN, **fresh}, alwayson_scripts={"X-Adapter": {"args": [RECORDED]}})
        assert answer.status == 500
        assert webui.state()["hooks"] == state["hooks"] == []
        assert grey_levels_apart(with_xadapter(webui, RECORDED, **fresh).image, beside) <= 1
        assert not is_blank(made(webui.txt2img(**PLAIN)).image)
