"""What happens around a job: other extensions, settings changed meanwhile, too little memory, failures of the WebUI."""

from __future__ import annotations

import shutil

import pytest
from safetensors.torch import load_file, save_file

from tests.pictures import grey_levels_apart, mean_difference

from .asking import TITLE, arguments, made, plain, sdedit, with_xadapter
from .conftest import PLAIN, is_blank, same_bytes
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


class TestOptions:
    """Settings are the user's: none is another one while a job runs."""

    @pytest.mark.parametrize("place", ["base_unet", "upgraded_unet", "vae_decode", "vae_encode"])
    def test_what_is_saved_during_a_job_is_what_was_set(self, webui, place):
        file = webui.data / "config.json"
        webui.post("/sdapi/v1/options", {"samples_filename_pattern": place})
        before = file.read_bytes()
        assert place.encode() in before
        file.unlink()
        with webui.fault(place, error="save"):
            with_xadapter(webui, LOCKSTEP, prompt="a cat <lora:style15:1>")
        assert file.read_bytes() == before


class TestPromptSchedules:
    """The base's prompts change as far along in the joint stage as they would alone."""

    @pytest.mark.parametrize("memory", [LOCKSTEP, RECORDED], ids=lambda memory: memory["memory"])
    @pytest.mark.parametrize("single_stage", [False, True], ids=["two stages", "a single stage"])
    def test_the_later_the_change_the_nearer_to_the_first_word(self, webui, memory, single_stage):
        def picture(base_prompt):
            given = {**memory, "single_stage": single_stage, "base_prompt": base_prompt}
            return with_xadapter(webui, given).image

        red, blue = picture("a red cat"), picture("a blue cat")
        assert same_bytes(picture("a [red:blue:50] cat"), red)
        assert same_bytes(picture("a [red:blue:0] cat"), blue)
        soon, late = picture("a [red:blue:2] cat"), picture("a [red:blue:4] cat")
        assert 0 < mean_difference(late, red) < mean_difference(soon, red)
        assert 0 < mean_difference(soon, blue) < mean_difference(late, blue)


class TestRefiner:
    """It takes over from SDXL, with the base beside it as before."""

    @pytest.fixture
    def refiner(self, webui, models):
        """Another SDXL checkpoint, from the middle of sampling on."""
        source = models / "models/Stable-diffusion" / UPGRADED_CHECKPOINT
        target = webui.data / "models/Stable-diffusion/refiner.safetensors"
        weights = load_file(source)
        weights["model.diffusion_model.out.2.weight"] = -weights["model.diffusion_model.out.2.weight"]
        save_file(weights, target)
        shutil.copy(source.with_suffix(".yaml"), target.with_suffix(".yaml"))
        webui.post("/sdapi/v1/refresh-checkpoints")
        yield {"refiner_checkpoint": "refiner", "refiner_switch_at": 0.5}
        target.unlink()
        target.with_suffix(".yaml").unlink()
        webui.post("/sdapi/v1/refresh-checkpoints")

    def test_it_goes_on_where_sdxl_stops(self, webui, refiner):
        ours, start = with_xadapter(webui, {"weight": 0, "return_base_image": True}, **refiner).images
        assert grey_levels_apart(ours, sdedit(webui, start, 0.8, **refiner)) <= 1
        assert grey_levels_apart(ours, sdedit(webui, start, 0.8)) > 1

    def test_the_base_guides_both(self, webui, refiner):
        beside, recorded = (with_xadapter(webui, memory, **refiner) for memory in (LOCKSTEP, RECORDED))
        assert "Refiner: refiner" in beside.infotexts[0]
        assert same_bytes(beside.image, recorded.image)
        assert grey_levels_apart(beside.image, with_xadapter(webui, {"weight": 0}, **refiner).image) > 1
        assert webui.state()["hooks"] == []

    def test_from_the_beginning_on_it_is_the_upgraded_model(self, webui, refiner):
        taking_over = with_xadapter(webui, **{**refiner, "refiner_switch_at": 0.0}).image
        selected = with_xadapter(webui, override_settings={"sd_model_checkpoint": "refiner.safetensors"}).image
        assert grey_levels_apart(taking_over, selected) <= 1


class TestReloadUI:
    """Extensions are loaded anew, while the process goes on."""

    def test_pictures_and_models_are_as_before(self, start_webui):
        with start_webui("reloaded") as server:
            before, usual = plain(server), with_xadapter(server).image
            state = server.state()
            server.reload_ui()
            assert same_bytes(plain(server), before)
            assert same_bytes(with_xadapter(server).image, usual)
            assert server.state() == state


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
        with webui.fault("vae_decode", after=1, error="OutOfMemoryError"):
            answer = webui.txt2img(**{**PLAIN, "seed": 41, "n_iter": 2}, **arguments(**memory))
        assert answer.status == 500
        state = webui.state()
        assert not [model for model in state["live_models"] if model.startswith("LatentDiffusion")]
        assert state["hooks"] == []
        assert same_bytes(plain(webui), before)


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
