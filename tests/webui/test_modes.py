"""The WebUI's memory modes and the extension's own settings."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Any

import pytest

from tests.pictures import grey_levels_apart

from .asking import arguments, made, over, plain, with_xadapter
from .conftest import PLAIN, same_bytes
from .server import decode_image

LATENT_SCALE = 8
BASE, SDXL = "LatentDiffusion", "DiffusionEngine"


@pytest.mark.parametrize("flag", ["--medvram", "--lowvram"])
def test_models_that_are_moved_in_and_out_give_the_same_picture(start_webui, webui, flag):
    usual = with_xadapter(webui).image
    with start_webui(flag.strip("-"), flags=[flag]) as moving:
        first, again, beside = (
            with_xadapter(moving, {"memory": memory}).image for memory in ("auto", "auto", "lockstep")
        )
        assert moving.state()["hooks"] == []
    assert grey_levels_apart(first, usual) <= 1
    assert grey_levels_apart(beside, usual) <= 1
    assert same_bytes(first, again)


def test_nothing_is_imported_before_it_is_used(start_webui):
    """Whoever leaves X-Adapter unticked has what the page shows, and no more."""
    core = {"mapping", "joint_stage", "two_stage", "trajectory", "recording", "feature_sources", "overlap"}
    host = {"webui.job.job", "webui.base.models", "webui.base.base_units", "webui.sampling.coupling"}
    with start_webui("untouched") as server:
        made(server.txt2img(**PLAIN, **arguments(enabled=False)))
        server.post("/xadapter/v1/plan", {"prompt": "a cat <lora:style15:1>", "args": [False]})
        assert "webui.page.panel" in server.imported()
        assert not server.imported() & (core | host)
        with_xadapter(server)
        assert {"two_stage", "webui.job.job"} <= server.imported()


class TestKeeping:
    @pytest.fixture(params=["Keep on the GPU", "Keep in RAM", "Unload after each job"])
    def keeping(self, webui, request):
        webui.post("/sdapi/v1/options", {"xadapter_keep_models": request.param})
        yield request.param
        webui.post("/sdapi/v1/options", {"xadapter_keep_models": "Keep on the GPU"})

    def test_the_next_picture_is_the_same_however_models_are_kept(self, webui, keeping):
        first, again = with_xadapter(webui).image, with_xadapter(webui).image
        assert grey_levels_apart(first, again) <= 1
        bases = [model for model in webui.state()["live_models"] if model.startswith("LatentDiffusion")]
        assert len(bases) == (0 if keeping == "Unload after each job" else 1)

    def test_a_gpu_with_room_for_one_model_holds_them_one_after_the_other_wherever_the_adapter_is(self, webui):
        """The adapter is loaded as the base is, and on the GPU as little."""
        asked = {"width": 1024, "height": 1024}
        for loaded in ("tiny.safetensors", "tiny.bin"):
            with_xadapter(webui, {"adapter": loaded}, steps=1)
            with webui.pretending("a GPU with room for the base alone"):
                plans = [
                    webui.post("/xadapter/v1/plan", {**asked, "args": [{"adapter": adapter}]}).content
                    for adapter in ("tiny.safetensors", "None")
                ]
            assert [plan["memory"] for plan in plans] == ["recorded", "lockstep"]

    def test_nothing_of_a_job_is_kept_but_the_models(self, webui):
        with_xadapter(webui)
        assert webui.kept_jobs() == 0


def test_adapters_are_found_in_the_folder_of_the_settings(webui, models, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "own.safetensors").symlink_to(models / "models/X-Adapter/tiny.safetensors")
    webui.post("/sdapi/v1/options", {"xadapter_adapter_folder": str(tmp_path)})
    try:
        assert "mine/own.safetensors" in webui.get("/xadapter/v1/models").content["adapters"]
        own = with_xadapter(webui, {"adapter": "mine/own"}).image
    finally:
        webui.post("/sdapi/v1/options", {"xadapter_adapter_folder": ""})
    assert same_bytes(own, with_xadapter(webui, {"adapter": "tiny.safetensors"}).image)


@dataclass(frozen=True)
class Way:
    """A way of making a picture: what the request says, the models of each of its jobs and their pictures' sizes."""

    request: dict[str, Any]
    given: dict[str, Any]
    models: list[set[str]]
    sizes: list[int]
    is_over_a_picture: bool = False


SIDE = PLAIN["width"] // LATENT_SCALE
HIRES = {
    "enable_hr": True,
    "hr_scale": 2,
    "hr_upscaler": "Lanczos",
    "denoising_strength": 0.6,
    "hr_second_pass_steps": 4,
}
WAYS = {
    "txt2img": Way({}, {}, [{BASE}, {BASE, SDXL}], [SIDE // 2, SIDE]),
    "hires": Way(HIRES, {}, [{BASE}, {BASE, SDXL}, {BASE, SDXL}], [SIDE // 2, SIDE, 2 * SIDE]),
    "hires recorded": Way(
        HIRES,
        {"memory": "recorded"},
        [{BASE}, {BASE}, {SDXL}, {BASE}, {SDXL}],
        # the picture before stays while the base is recorded
        [SIDE // 2, SIDE // 2, SIDE, SIDE, 2 * SIDE],
    ),
    "img2img": Way({}, {}, [{BASE, SDXL}], [SIDE], is_over_a_picture=True),
    "img2img from the base's": Way(
        {}, {"img2img_start": "base"}, [{BASE}, {BASE, SDXL}], [SIDE // 2, SIDE], is_over_a_picture=True
    ),
}


@pytest.fixture(scope="module", params=WAYS)
def way(request):
    return WAYS[request.param]


@pytest.fixture(scope="module")
def calls(webui, way):
    """The calls of the UNets for two pictures, and what the progress route said at each."""
    webui.post("/sdapi/v1/options", {"show_progress_every_n_steps": 1})
    start = plain(webui)
    with webui.recorded(progress=True) as calls:
        if way.is_over_a_picture:
            over(webui, start, way.given, n_iter=2, **way.request)
        else:
            with_xadapter(webui, way.given, n_iter=2, **way.request)
    return calls


@pytest.fixture(scope="module")
def jobs(calls):
    """The calls of each job, as the route counts them."""
    return [list(job) for _, job in groupby(calls, key=lambda call: call["said"]["state"]["job_no"])]


class TestProgress:
    def test_each_stage_counts_as_a_job(self, way, calls, jobs):
        assert {call["said"]["state"]["job_count"] for call in calls} == {2 * len(way.models)}
        assert [{call["model"] for call in job} for job in jobs] == way.models * 2

    def test_progress_never_goes_back(self, calls):
        said = [call["said"]["progress"] for call in calls]
        assert said == sorted(said)
        assert 0 <= said[0] < 0.25 < 0.75 < said[-1] < 1

    def test_each_stage_shows_its_own_picture(self, way, jobs):
        sizes = [decode_image(job[-1]["said"]["current_image"]).size for job in jobs]
        assert sizes == [(side, side) for side in way.sizes] * 2
