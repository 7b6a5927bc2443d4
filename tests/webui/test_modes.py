"""The WebUI's memory modes and the extension's own settings."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from .asking import arguments, made, with_xadapter
from .conftest import PLAIN, grey_levels_apart, same_bytes
from .server import decode_image

LATENT_SCALE = 8


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
        server.post("/xadapter/v1/route", {"prompt": "a cat <lora:style15:1>"})
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
    def watched(self, webui):
        """What the progress route said while two pictures were made."""
        webui.post("/sdapi/v1/options", {"show_progress_every_n_steps": 1})
        seen = []
        with ThreadPoolExecutor(1) as pool:
            job = pool.submit(with_xadapter, webui, steps=12, n_iter=2)
            while not job.done():
                seen.append(webui.get("/sdapi/v1/progress").content)
        assert job.result().status == 200
        return seen

    def test_each_stage_counts_as_a_job(self, watched):
        counts = {said["state"]["job_count"] for said in watched if said["state"]["job_no"] > 0}
        assert counts - {0} == {4}
        assert {said["state"]["job_no"] for said in watched} >= {0, 1, 2, 3}

    def test_progress_never_goes_back(self, watched):
        running = [said["progress"] for said in watched if said["state"]["job_count"] > 0]
        assert running == sorted(running)

    def test_each_stage_shows_its_own_picture(self, watched):
        sizes = {decode_image(said["current_image"]).size for said in watched if said["current_image"]}
        upgraded = (PLAIN["width"] // LATENT_SCALE, PLAIN["height"] // LATENT_SCALE)
        base = (upgraded[0] // 2, upgraded[1] // 2)
        assert sizes == {base, upgraded}
