"""The WebUI's memory modes and the extension's own settings."""

from __future__ import annotations

from itertools import groupby

import pytest

from .asking import arguments, made, with_xadapter
from .conftest import PLAIN, grey_levels_apart, same_bytes
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


class TestProgress:
    @pytest.fixture(scope="class")
    def calls(self, webui):
        """The calls of the UNets for two pictures, and what the progress route said at each."""
        webui.post("/sdapi/v1/options", {"show_progress_every_n_steps": 1})
        with webui.recorded(progress=True) as calls:
            with_xadapter(webui, n_iter=2)
        return calls

    @pytest.fixture(scope="class")
    def jobs(self, calls):
        """The calls of each job, as the route counts them."""
        return [list(job) for _, job in groupby(calls, key=lambda call: call["said"]["state"]["job_no"])]

    def test_each_stage_counts_as_a_job(self, calls, jobs):
        assert {call["said"]["state"]["job_count"] for call in calls} == {4}
        assert [{call["model"] for call in job} for job in jobs] == [{BASE}, {BASE, SDXL}] * 2

    def test_progress_never_goes_back(self, calls):
        said = [call["said"]["progress"] for call in calls]
        assert said == sorted(said)
        assert 0 < said[0] < 0.25 < 0.75 < said[-1] < 1

    def test_each_stage_shows_its_own_picture(self, jobs):
        sizes = [decode_image(job[-1]["said"]["current_image"]).size for job in jobs]
        upgraded = (PLAIN["width"] // LATENT_SCALE, PLAIN["height"] // LATENT_SCALE)
        base = (upgraded[0] // 2, upgraded[1] // 2)
        assert sizes == [base, upgraded] * 2
