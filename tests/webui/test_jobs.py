"""What happens around a job: other extensions, settings changed meanwhile, too little memory, failures of the WebUI."""

from __future__ import annotations

import shutil

import pytest
from safetensors.torch import load_file, save_file

from .asking import TITLE, arguments, made, plain, with_xadapter
from .conftest import PLAIN, grey_levels_apart, is_blank, same_bytes
from .server import BASE_CHECKPOINT, UPGRADED_CHECKPOINT

LOCKSTEP, RECORDED = {"memory": "lockstep"}, {"memory": "recorded"}


def test_a_sample_that_somebody_else_wrapped_is_called(webui):
    usual = with_xadapter(webui).image
    answer = with_xadapter(webui, script_name="Counted", script_args=[])
    assert "Counted: 1" in answer.infotexts[0]
    assert same_bytes(answer.image, usual)


@pytest.mark.parametrize("memory", [LOCKSTEP, RECORDED], ids=lambda memory: memory["memory"])
@pytest.mark.parametrize("place", ["base_unet", "upgraded_unet"])
def test_a_checkpoint_chosen_during_a_job_is_loaded_after_it(webui, memory, place):
    # recorded, it would be found again, and the base not called
    usual = with_xadapter(webui, LOCKSTEP, seed=21).image
    try:
        with webui.fault(place, after=2, error="choose"):
            assert same_bytes(with_xadapter(webui, memory, seed=21).image, usual)
        state = webui.state()
        assert state["sd_model_checkpoint"].startswith("tiny15")
        plain(webui, steps=1)
        assert webui.state()["checkpoint"] == BASE_CHECKPOINT
    finally:
        webui.post("/sdapi/v1/options", {"sd_model_checkpoint": UPGRADED_CHECKPOINT})


class TestPromptSchedules:
    """In a single stage the base's prompts change as far along as they would alone."""

    @pytest.mark.parametrize("memory", [LOCKSTEP, RECORDED], ids=lambda memory: memory["memory"])
    def test_a_single_stage_follows_them(self, webui, memory):
        def picture(base_prompt):
            given = {**memory, "single_stage": True, "base_prompt": base_prompt}
            return with_xadapter(webui, given).image

        red, blue, changing = picture("a red cat"), picture("a blue cat"), picture("a [red:blue:0.5] cat")
        assert same_bytes(picture("a [red:blue:50] cat"), red)
        assert same_bytes(picture("a [red:blue:0] cat"), blue)
        assert not same_bytes(changing, red)
        assert not same_bytes(changing, blue)


class TestTooLittleVideoMemory:
    """With memory "auto" the picture is made all the same, one model after the other."""

    @pytest.fixture
    def nothing_is_kept(self, webui):
        """Or else the base's side would be found and not run."""
        webui.post("/sdapi/v1/options", {"xadapter_recordings": 0})
        yield
        webui.post("/sdapi/v1/options", {"xadapter_recordings": 2.0})

    @pytest.mark.parametrize(
        ("given", "place", "after"),
        [
            ({}, "base_unet", 2),
            ({}, "base_unet", PLAIN["steps"] + 2),
            ({}, "upgraded_unet", 2),
            ({"single_stage": True}, "base_unet", 2),
            ({"single_stage": True}, "upgraded_unet", 2),
        ],
        ids=str,
    )
    def test_it_is_the_same_picture_and_a_line_says_so(self, webui, nothing_is_kept, given, place, after):
        request = {"sampler_name": "Euler a", "seed": 30, "batch_size": 2, "do_not_save_grid": True}
        expected = with_xadapter(webui, {**given, **RECORDED}, **request).images
        said = webui.log.count("did not fit into video memory")
        with webui.fault(place, after=after, error="OutOfMemoryError"):
            made_all_the_same = with_xadapter(webui, given, **request).images
        assert all(same_bytes(one, other) for one, other in zip(made_all_the_same, expected, strict=True))
        assert webui.log.count("did not fit into video memory") == said + 1
        assert webui.state()["hooks"] == []

    def test_the_bases_picture_is_shown_once(self, webui, nothing_is_kept):
        given = {"return_base_image": True}
        expected = with_xadapter(webui, {**given, **RECORDED}, seed=33).images
        with webui.fault("upgraded_unet", after=2, error="OutOfMemoryError"):
            shown = with_xadapter(webui, given, seed=33).images
        assert [image.size for image in shown] == [image.size for image in expected]
        assert all(same_bytes(one, other) for one, other in zip(shown, expected, strict=True))

    def test_with_lockstep_it_is_an_error(self, webui):
        with webui.fault("upgraded_unet", after=2, error="OutOfMemoryError"):
            answer = webui.txt2img(**PLAIN, **arguments(**LOCKSTEP))
        assert answer.status == 500
        assert not is_blank(with_xadapter(webui).image)


class TestFailuresOfTheWebUI:
    """Whatever fails between two batches, the job ends and the models rest."""

    @pytest.fixture
    def unloading(self, webui):
        webui.post("/sdapi/v1/options", {"xadapter_keep_models": "Unload after each job"})
        yield
        webui.post("/sdapi/v1/options", {"xadapter_keep_models": "Keep on the GPU"})

    @pytest.mark.parametrize("memory", [LOCKSTEP, RECORDED], ids=lambda memory: memory["memory"])
    def test_a_decode_that_fails_leaves_no_base_behind(self, webui, unloading, memory):
        before = plain(webui)
        with webui.fault("vae_decode", after=1):
            answer = webui.txt2img(**{**PLAIN, "seed": 41, "n_iter": 2}, **arguments(**memory))
        assert answer.status == 500
        state = webui.state()
        assert not [model for model in state["live_models"] if model.startswith("LatentDiffusion")]
        assert state["hooks"] == []
        assert grey_levels_apart(plain(webui), before) <= 1


class TestOverwrittenCheckpoint:
    def test_a_base_checkpoint_written_over_is_loaded_anew_and_not_found_among_recordings(self, webui, models):
        source = models / "models/Stable-diffusion"
        target = webui.data / "models/Stable-diffusion/changing.safetensors"
        shutil.copy(source / BASE_CHECKPOINT, target)
        shutil.copy(source / BASE_CHECKPOINT.replace(".safetensors", ".yaml"), target.with_suffix(".yaml"))
        webui.post("/sdapi/v1/refresh-checkpoints")
        given = {"base_checkpoint": "changing", "base_prompt": "a dog"}
        try:
            before = with_xadapter(webui, {**given, **RECORDED}, seed=51).image
            weights = load_file(target)
            name = "model.diffusion_model.output_blocks.11.0.in_layers.2.weight"
            weights[name] = -weights[name]
            save_file(weights, target)
            after = with_xadapter(webui, {**given, **RECORDED}, seed=51).image
            beside = with_xadapter(webui, {**given, **LOCKSTEP}, seed=51).image
        finally:
            target.unlink()
            target.with_suffix(".yaml").unlink()
            webui.post("/sdapi/v1/refresh-checkpoints")
        assert grey_levels_apart(after, before) > 1
        assert same_bytes(after, beside)


def test_arguments_by_place_may_be_fewer_than_there_are(webui):
    answer = webui.txt2img(**PLAIN, alwayson_scripts={TITLE: {"args": [True, "tiny15"]}})
    assert same_bytes(made(answer).image, with_xadapter(webui, {"base_checkpoint": "tiny15"}).image)
