"""The WebUI's own scripts with X-Adapter ticked, and pictures that other extensions make in the middle of a job."""

from __future__ import annotations

import pytest

from tests.pictures import grey_levels_apart

from .asking import TITLE, arguments, made, plain, with_xadapter
from .conftest import PLAIN, same_bytes
from .plotting import calls_of, scripted

INNER_SEED = 123
LOCKSTEP, RECORDED = {"memory": "lockstep"}, {"memory": "recorded"}
BOTH = pytest.mark.parametrize("memory", [LOCKSTEP, RECORDED], ids=lambda memory: memory["memory"])


class TestPromptMatrix:
    """Four pictures: with and without a LoRA, with and without a few words."""

    def made_by(self, server, memory, batch_size):
        script = scripted(
            server,
            "prompt matrix",
            [False, False, "positive", "comma", 0],
            memory,
            prompt="a cat|<lora:style15:1>|in a boat",
            batch_size=batch_size,
            do_not_save_grid=True,
        )
        answer = made(script)
        pictures, prompts = answer.images[answer.info["index_of_first_image"] :], answer.info["all_prompts"]
        assert len(pictures) == len(prompts) == 4
        return list(zip(pictures, prompts, strict=True))

    @BOTH
    def test_each_picture_has_its_prompt_and_its_lora(self, webui, memory):
        for picture, prompt in self.made_by(webui, memory, batch_size=1):
            assert grey_levels_apart(picture, with_xadapter(webui, memory, prompt=prompt).image) <= 1

    @BOTH
    def test_a_batch_has_the_loras_of_its_first_prompt_as_the_webui_has_it(self, webui, memory):
        for picture, prompt in self.made_by(webui, memory, batch_size=2):
            # the batches begin with the prompts that have none
            without = prompt.replace("<lora:style15:1>", "")
            assert grey_levels_apart(picture, with_xadapter(webui, memory, prompt=without).image) <= 1


class TestPromptsFromFile:
    def test_each_line_is_a_picture_with_its_own_settings(self, webui):
        lines = 'a dog\n--prompt "a horse <lora:style15:1>" --seed 5 --steps 4 --width 320\na cat AND a boat'
        answer = made(scripted(webui, "prompts from file or textbox", [False, False, "start", lines], {}, prompt=""))
        expected = [
            with_xadapter(webui, prompt="a dog"),
            with_xadapter(webui, prompt="a horse <lora:style15:1>", seed=5, steps=4, width=320),
            with_xadapter(webui, prompt="a cat AND a boat"),
        ]
        assert len(answer.images) == 3
        for picture, other in zip(answer.images, expected, strict=True):
            assert same_bytes(picture, other.image)
        assert "style15" in answer.infotexts[1]
        assert "style15" not in answer.infotexts[2]

    def test_the_same_base_prompt_lets_the_base_run_once(self, webui):
        given = {"base_prompt": "a dog", **LOCKSTEP}
        lines = "a red cat\na blue cat"
        with webui.recorded() as calls:
            made(scripted(webui, "prompts from file or textbox", [False, False, "start", lines], given, seed=300))
        count = calls_of(calls)
        assert count["LatentDiffusion"] == PLAIN["steps"] + count["DiffusionEngine"] // 2


def test_where_another_extension_changes_the_noise_levels_the_base_is_asked_at_those(webui):
    usual, said = with_xadapter(webui, LOCKSTEP).image, webui.log.count("has changed the sampler's noise levels")
    recorded, beside = (
        with_xadapter(webui, memory, script_name="Other levels", script_args=[]) for memory in (RECORDED, LOCKSTEP)
    )
    assert same_bytes(recorded.image, beside.image)
    assert grey_levels_apart(recorded.image, usual) > 1
    assert webui.log.count("has changed the sampler's noise levels") == said + 2
    assert webui.state()["hooks"] == []


SCRIPTS_OF_IMG2IMG = {
    "loopback": [2, 0.5, "Linear", "None"],
    "sd upscale": ["", 64, "lanczos", 1.5],
    "outpainting mk2": ["", 64, 8, ["left"], 1.0, 0.05],
    "poor man's outpainting": [64, 4, 0, ["down"]],
}


@pytest.fixture(scope="module")
def start(webui):
    """A picture to paint over."""
    return plain(webui, seed=500)


@pytest.mark.parametrize("script", SCRIPTS_OF_IMG2IMG)
class TestScriptsOfImg2img:
    def made_by(self, webui, start, script, given):
        # the VAE encodes by torch's own generator, which this leaves in one place
        plain(webui)
        ticked = arguments(**given) if given is not None else {}
        asked = {**PLAIN, **ticked, "script_name": script, "script_args": SCRIPTS_OF_IMG2IMG[script]}
        return made(webui.img2img(start, **asked, denoising_strength=0.5)).images[-1]

    def test_at_weight_0_it_is_the_script_alone_and_the_adapter_changes_it(self, webui, start, script):
        alone = self.made_by(webui, start, script, None)
        assert same_bytes(self.made_by(webui, start, script, {"weight": 0}), alone)
        assert grey_levels_apart(self.made_by(webui, start, script, {}), alone) > 1
        assert webui.state()["hooks"] == []

    def test_pictures_of_the_base_are_not_taken_for_a_part_of_it(self, webui, start, script):
        given = {"img2img_start": "base", "weight": 0.5}
        shown = self.made_by(webui, start, script, {**given, "return_base_image": True})
        assert same_bytes(shown, self.made_by(webui, start, script, given))


class TestPicturesInsideAJob:
    """Another extension copies the processing object and makes a picture with it, while the job is under way."""

    @pytest.fixture(params=["Keep on the GPU", "Unload after each job"])
    def keeping(self, webui, request):
        webui.post("/sdapi/v1/options", {"xadapter_keep_models": request.param})
        yield
        webui.post("/sdapi/v1/options", {"xadapter_keep_models": "Keep on the GPU"})

    def with_inner(self, webui, kind, given, **request):
        asked = {TITLE: {"args": [given]}, "Inner": {"args": [kind]}}
        return made(webui.txt2img(**{**PLAIN, **request}, alwayson_scripts=asked))

    @BOTH
    @pytest.mark.parametrize("kind", ["without scripts", "unticked"])
    def test_it_is_a_plain_picture_and_the_job_goes_on(self, webui, keeping, memory, kind):
        expected = [with_xadapter(webui, memory, seed=seed) for seed in (400, 401)]
        inner = plain(webui, seed=INNER_SEED)
        answer = self.with_inner(webui, kind, memory, seed=400, n_iter=2, do_not_save_grid=True)
        first = answer.info["index_of_first_image"]
        assert [
            grey_levels_apart(one, other.image) <= 1
            for one, other in zip(answer.images[first : first + 2], expected, strict=True)
        ] == [True, True]
        assert all(same_bytes(picture, inner) for picture in answer.images[first + 2 :])
        assert len(answer.images) == first + 4
        assert answer.infotexts[first] == expected[0].infotexts[0]
        assert webui.state()["hooks"] == []

    @BOTH
    def test_it_is_made_with_xadapter_if_it_asks_for_it(self, webui, keeping, memory):
        expected = [with_xadapter(webui, memory, seed=seed).image for seed in (410, 411)]
        inner = with_xadapter(webui, memory, seed=INNER_SEED).image
        answer = self.with_inner(webui, "ticked", memory, seed=410, n_iter=2, do_not_save_grid=True)
        first = answer.info["index_of_first_image"]
        for one, other in zip(answer.images[first:], [*expected, inner, inner], strict=True):
            assert grey_levels_apart(one, other) <= 1
        assert webui.state()["hooks"] == []

    def test_a_job_that_another_left_open_is_ended_by_the_next(self, webui):
        with webui.fault("vae_decode", after=1):
            failed = webui.txt2img(
                **{**PLAIN, "seed": 420},
                **arguments(),
                script_name="prompts from file or textbox",
                script_args=[False, False, "start", "a cat"],
            )
        assert failed.status == 500
        assert same_bytes(with_xadapter(webui, seed=421).image, with_xadapter(webui, LOCKSTEP, seed=421).image)
        assert webui.state()["hooks"] == []
