"""What X-Adapter makes on the real WebUI, held against what the WebUI makes by itself."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file, save_file

from tests.pictures import grey_levels_apart, mean_difference

from .asking import HALF, arguments, base_alone, made, plain, sdedit, with_xadapter
from .conftest import PLAIN, is_between, is_blank, same_bytes

VAE = "first_stage_model."
STYLE = "a cat <lora:style15:1>"
LONG = "a red dog sits on the old roof of a house by the sea in the evening rain, " * 6
"""More than 75 tokens. Most prompts of that length make the small SD1.5 model's pictures black; this one does not."""


@pytest.fixture(scope="module")
def usual(webui):
    """The picture of a request with nothing but defaults."""
    return with_xadapter(webui).image


class TestSwitchedOff:
    """X-Adapter that is installed and not used changes nothing."""

    def test_never_enabled_pictures_are_those_of_a_webui_without_it(self, start_webui, plain_webui):
        start = plain(plain_webui)
        with start_webui("unused") as unused:
            assert same_bytes(plain(unused), start)
            assert same_bytes(sdedit(unused, start, 0.6), sdedit(plain_webui, start, 0.6))
            off = made(unused.txt2img(**PLAIN, **arguments(enabled=False)))
            assert same_bytes(off.image, start)
            assert "X-Adapter" not in off.infotexts[0]


class TestStageOne:
    """The base's picture is the WebUI's own, with the SD1.5 checkpoint selected."""

    @pytest.mark.parametrize(
        "request_",
        [
            {},
            {"prompt": STYLE},
            {"prompt": "a cat <lora:style15:0.5>", "negative_prompt": "a dog"},
            {"prompt": "a base15 cat"},
            {"prompt": "a cat [red:blue:0.5]"},
            {"prompt": "a [red:blue:0.5] cat", "negative_prompt": "a dog"},
            {"negative_prompt": "a dog, base15"},
            {"prompt": "a cat and a (dog:1.1)"},
            {"prompt": "a red (cat:1.2) on a roof"},
            {"prompt": "a cat BREAK a red roof", "negative_prompt": "a dog BREAK a tree"},
            {"prompt": "a cat AND a dog :0.6"},
            {"prompt": "a cat", "negative_prompt": LONG},
            {"prompt": "a cat", "sampler_name": "DPM++ 2M SDE", "scheduler": "Exponential", "steps": 6},
            {"prompt": "a cat", "sampler_name": "DDIM"},
            {"subseed": 11, "subseed_strength": 0.4},
            {"tiling": True},
        ],
        ids=lambda request_: ", ".join(f"{key} {str(value)[:30]}" for key, value in request_.items()) or "plain",
    )
    def test_is_the_webuis_own_picture(self, webui, request_):
        answer = with_xadapter(webui, {"return_base_image": True, "weight": 0, "switch_point": 0.2}, **request_)
        assert not is_blank(answer.images[1])
        assert grey_levels_apart(answer.images[1], base_alone(webui, **request_)) <= 1

    def test_clip_skip_is_followed(self, webui):
        skip = {"CLIP_stop_at_last_layers": 2}
        ours = with_xadapter(webui, {"return_base_image": True, "weight": 0}, override_settings=skip).images[1]
        theirs = made(webui.txt2img(**PLAIN | HALF, override_settings={**skip, "sd_model_checkpoint": "tiny15"})).image
        assert grey_levels_apart(ours, theirs) <= 1

    def test_its_size_steps_scale_and_prompt_are_its_own(self, webui):
        own = {
            "base_width": 320,
            "base_height": 192,
            "base_steps": 5,
            "base_cfg_scale": 3,
            "base_prompt": "a dog <lora:style15:0.7>",
            "base_negative_prompt": "a horse",
        }
        answer = with_xadapter(webui, {**own, "return_base_image": True, "weight": 0})
        expected = base_alone(
            webui,
            width=320,
            height=192,
            steps=5,
            cfg_scale=3,
            prompt="a dog <lora:style15:0.7>",
            negative_prompt="a horse",
        )
        assert grey_levels_apart(answer.images[1], expected) <= 1

    def test_its_prompt_is_without_what_belongs_to_sdxl_only(self, webui):
        prompt = "a cat, upgradedxl <lora:stylexl:1>"
        answer = with_xadapter(webui, {"return_base_image": True, "weight": 0}, prompt=prompt)
        assert grey_levels_apart(answer.images[1], base_alone(webui, prompt="a cat")) <= 1

    def test_styles_are_seen(self, webui):
        answer = with_xadapter(webui, {"return_base_image": True, "weight": 0}, styles=["boat"])
        assert grey_levels_apart(answer.images[1], base_alone(webui, prompt="a cat, base15 in a boat")) <= 1


class TestBaseline:
    """Weight 0 is SDEdit + SDXL: the img2img tab on the base's picture."""

    @pytest.mark.parametrize("adapter", [{"weight": 0}, {"adapter": "None"}], ids=["weight 0", "no adapter"])
    @pytest.mark.parametrize(
        ("strength", "request_"),
        [
            (0.8, {}),
            (0.35, {}),
            (1.0, {}),
            (0.8, {"width": 512, "height": 768}),
            (0.7, {"sampler_name": "DDIM"}),
            (0.7, {"sampler_name": "Euler a"}),
            (0.7, {"sampler_name": "DPM++ SDE", "scheduler": "Karras"}),
            (0.7, {"sampler_name": "UniPC"}),
        ],
    )
    def test_is_the_img2img_tabs_picture(self, webui, adapter, strength, request_):
        given = {**adapter, "switch_point": strength, "return_base_image": True}
        ours, start = with_xadapter(webui, given, **request_).images
        assert grey_levels_apart(ours, sdedit(webui, start, strength, **request_)) <= 1

    def test_with_a_lora_too(self, webui):
        ours, start = with_xadapter(webui, {"weight": 0, "return_base_image": True}, prompt=STYLE).images
        assert grey_levels_apart(ours, sdedit(webui, start, 0.8)) <= 1


class TestEverythingMatters:
    """Each argument and plugin has its effect; the same request gives the same picture."""

    @pytest.fixture(scope="class")
    def none(self, webui):
        """The picture without the adapter's effect; `usual` has all of it."""
        return with_xadapter(webui, {"weight": 0}).image

    def test_the_same_request_gives_the_same_picture(self, webui, usual):
        assert same_bytes(with_xadapter(webui).image, usual)

    def test_the_more_weight_the_farther_from_none_and_the_nearer_to_all(self, webui, none, usual):
        pictures = [none, *(with_xadapter(webui, {"weight": weight}).image for weight in (0.25, 0.5, 0.75)), usual]
        from_none, to_all = ([mean_difference(end, picture) for picture in pictures] for end in (none, usual))
        assert from_none == sorted(from_none)
        assert to_all == sorted(to_all, reverse=True)
        assert from_none[1] > 0 < to_all[-2]

    @pytest.mark.parametrize("levels", [[0, 1, 1], [1, 0, 1], [1, 1, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]], ids=str)
    def test_without_a_level_the_effect_is_in_between(self, webui, none, usual, levels):
        assert is_between(with_xadapter(webui, {"weight": levels}).image, none, usual)

    @pytest.mark.parametrize(
        ("given", "is_near"),
        [
            # the adapter's effect is in the first steps, when everything is decided
            ({"guidance_start": 0.5}, "none"),
            ({"guidance_end": 0.1}, "usual"),
            ({"guidance_end": 0.5}, "usual"),
            ({"refresh_every": 2}, "usual"),
            ({"cond_only": True}, "usual"),
            ({"uncond_weight": 0.8}, "usual"),
        ],
        ids=str,
    )
    def test_a_little_less_is_near_to_all_and_a_little_is_near_to_none(self, webui, none, usual, given, is_near):
        near, far = (none, usual) if is_near == "none" else (usual, none)
        picture = with_xadapter(webui, given).image
        assert 0 < mean_difference(picture, near) < mean_difference(picture, far) / 2

    def test_the_lora_of_the_base_prompt_acts_as_that_of_the_prompt(self, webui):
        in_the_prompt = with_xadapter(webui, prompt=STYLE).image
        assert same_bytes(with_xadapter(webui, {"base_prompt": STYLE}).image, in_the_prompt)

    def test_what_is_left_open_is_as_for_sdxl(self, webui, usual):
        as_for_sdxl = {"base_steps": PLAIN["steps"], "base_cfg_scale": PLAIN["cfg_scale"], "base_seed": PLAIN["seed"]}
        half = {f"base_{side}": HALF[side] for side in HALF}
        assert same_bytes(with_xadapter(webui, {**as_for_sdxl, **half, "base_prompt": "a cat"}).image, usual)

    @pytest.mark.parametrize(
        ("given", "request_"),
        [
            ({}, {"prompt": STYLE}),
            ({}, {"prompt": "a base15 cat"}),
            ({"base_prompt": "a dog"}, {}),
            ({"base_negative_prompt": "a dog"}, {}),
            ({"switch_point": 0.5}, {}),
            ({"single_stage": True}, {}),
            ({"base_width": 512, "base_height": 512}, {}),
            ({"base_steps": 3}, {}),
            ({"base_cfg_scale": 2}, {}),
            ({"base_seed": 8}, {}),
        ],
        ids=str,
    )
    def test_what_the_base_is_given_reaches_sdxls_picture(self, webui, usual, given, request_):
        """Stage 1 tells how; what the adapter makes of it nobody can say beforehand."""
        assert grey_levels_apart(with_xadapter(webui, given, **request_).image, usual) > 1

    def test_one_number_is_the_same_as_three_alike(self, webui, usual):
        assert same_bytes(with_xadapter(webui, {"weight": [1, 1, 1]}).image, usual)

    def test_an_sdxl_lora_stays_with_sdxl(self, webui):
        prompt = "a cat <lora:stylexl:1>"
        ours, start = with_xadapter(webui, {"weight": 0, "return_base_image": True}, prompt=prompt).images
        assert grey_levels_apart(start, base_alone(webui)) <= 1
        assert grey_levels_apart(ours, sdedit(webui, start, 0.8, prompt=prompt)) <= 1
        assert grey_levels_apart(ours, sdedit(webui, start, 0.8)) > 1

    @pytest.mark.parametrize("name", ["style15", "style15_nometa"])
    def test_an_sd15_lora_never_touches_sdxl(self, webui, name):
        before = plain(webui)
        ours, start = with_xadapter(
            webui, {"weight": 0, "return_base_image": True}, prompt=f"a cat <lora:{name}:1>"
        ).images
        assert grey_levels_apart(ours, sdedit(webui, start, 0.8)) <= 1
        assert same_bytes(plain(webui), before)
        assert webui.state()["loaded_networks"] == []


class TestBatches:
    """Image k of a batch is the same seed made alone."""

    @pytest.mark.parametrize("given", [{}, {"single_stage": True}, {"weight": 0}], ids=str)
    @pytest.mark.parametrize("sampler", ["Euler a", "DPM++ SDE"])
    def test_each_image_is_its_seeds_own(self, webui, given, sampler):
        batch = with_xadapter(webui, given, batch_size=3, sampler_name=sampler).images[-3:]
        for place, image in enumerate(batch):
            alone = with_xadapter(webui, given, seed=PLAIN["seed"] + place, sampler_name=sampler).image
            assert grey_levels_apart(image, alone) <= 1

    def test_batch_count_makes_the_same_pictures(self, webui):
        counted = with_xadapter(webui, n_iter=2, do_not_save_grid=True).images[-2:]
        for place, image in enumerate(counted):
            assert grey_levels_apart(image, with_xadapter(webui, seed=PLAIN["seed"] + place).image) <= 1

    def test_base_pictures_come_after_the_pictures(self, webui):
        answer = with_xadapter(webui, {"return_base_image": True}, batch_size=2, n_iter=2)
        assert [image.size for image in answer.images[-4:]] == [tuple(HALF.values())] * 4
        assert len(answer.infotexts) == len(answer.images)


class TestVAE:
    """The base has the VAE that the WebUI would choose for it, and SDXL keeps its own."""

    @pytest.fixture
    def vae(self, webui, models):
        """A VAE file that the WebUI finds by the SD1.5 checkpoint's name; its pictures are paler."""
        weights = load_file(models / "models/Stable-diffusion/tiny15.safetensors")
        own = {key.removeprefix(VAE): value for key, value in weights.items() if key.startswith(VAE)}
        own["decoder.conv_out.weight"] = own["decoder.conv_out.weight"] / 2
        file = webui.data / "models/VAE/tiny15.vae.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(own, file)
        webui.post("/sdapi/v1/refresh-vae")
        yield file
        file.unlink()
        webui.post("/sdapi/v1/refresh-vae")

    @pytest.mark.parametrize("memory", ["lockstep", "recorded"])
    def test_it_is_the_one_that_the_webui_would_choose(self, webui, request, memory):
        shown = {"return_base_image": True, "weight": 0.5, "memory": memory}
        without, before = with_xadapter(webui, shown).images[1], plain(webui)
        request.getfixturevalue("vae")
        ours = with_xadapter(webui, shown).images[1]
        assert grey_levels_apart(ours, without) > 1
        assert same_bytes(plain(webui), before)
        assert grey_levels_apart(ours, base_alone(webui)) <= 1

    def test_without_the_file_the_checkpoints_own_is_back(self, webui, usual):
        assert grey_levels_apart(with_xadapter(webui).image, usual) <= 1


class TestLockstep:
    """Every SDXL evaluation runs the base at the same noise level, and rows keep their prompts."""

    @pytest.fixture
    def calls(self, webui):
        def record(given=None, **request):
            with webui.recorded() as calls:
                with_xadapter(webui, given, **request)
            return calls

        return record

    def test_the_base_runs_once_before_each_sdxl_step_at_its_timestep(self, calls):
        joint = calls(sampler_name="Euler")[PLAIN["steps"] :]
        assert [call["model"] for call in joint] == ["LatentDiffusion", "DiffusionEngine"] * (len(joint) // 2)
        assert [call["timestep"] for call in joint[::2]] == pytest.approx([call["timestep"] for call in joint[1::2]])

    @pytest.mark.parametrize("sampler", ["DDIM", "PLMS", "UniPC", "DPM2 a", "Heun"])
    def test_timesteps_agree_whatever_the_sampler_calls_them(self, calls, sampler):
        base = None
        for call in calls({"single_stage": True}, sampler_name=sampler):
            if call["model"] == "LatentDiffusion":
                base = call["timestep"]
            else:
                assert call["timestep"] == pytest.approx(base, abs=0.05)
        assert base is not None

    def test_two_evaluations_at_one_noise_level_are_one_of_the_base(self, calls):
        """Heun's method ends a step where the next begins."""
        joint = [call["model"] for call in calls({"single_stage": True}, sampler_name="Heun")]
        assert joint.count("DiffusionEngine") == 2 * PLAIN["steps"] - 1
        assert joint.count("LatentDiffusion") == PLAIN["steps"]

    def test_without_weight_the_base_rests_in_the_joint_stage(self, calls):
        joint = calls({"weight": 0})[PLAIN["steps"] :]
        assert {call["model"] for call in joint} == {"DiffusionEngine"}

    def test_after_its_end_the_base_rests(self, calls):
        joint = calls({"guidance_end": 0.4})[PLAIN["steps"] :]
        assert joint[0]["model"] == "LatentDiffusion"
        assert {call["model"] for call in joint[-2:]} == {"DiffusionEngine"}

    @pytest.mark.parametrize("negative", ["", LONG], ids=["equal", "longer negative"])
    def test_slices_of_the_batch_get_their_own_rows(self, webui, negative):
        """The same prompts in one batch and in slices differ by nothing but the order of arithmetic."""
        request_ = {"negative_prompt": negative, "batch_size": 2}
        whole = with_xadapter(webui, **request_).images[-2:]
        sliced = with_xadapter(webui, **request_, override_settings={"batch_cond_uncond": False}).images[-2:]
        for one, other in zip(whole, sliced, strict=True):
            assert grey_levels_apart(one, other) <= 1

    def test_padded_prompts_run(self, webui):
        padded = {"negative_prompt": LONG, "override_settings": {"pad_cond_uncond": True}}
        assert "Pad conds: True" in with_xadapter(webui, **padded).infotexts[0]

    def test_skipped_unconds_leave_the_conds_their_rows(self, calls):
        skipping = {"s_min_uncond_all": True, "s_min_uncond": 3.0}
        joint = calls(override_settings=skipping, batch_size=2)[PLAIN["steps"] :]
        rows = {(base["rows"], upgraded["rows"]) for base, upgraded in zip(joint[::2], joint[1::2], strict=True)}
        assert rows == {(4, 4), (4, 2)}

    @pytest.mark.parametrize("base_prompt", ["", "a dog", "a dog AND a horse AND a cow"])
    def test_several_conds_for_one_image_run(self, webui, base_prompt):
        prompt = "a cat AND a boat :0.5"
        one = with_xadapter(webui, {"base_prompt": base_prompt}, prompt=prompt, batch_size=2).images[-2]
        alone = with_xadapter(webui, {"base_prompt": base_prompt}, prompt=prompt).image
        assert grey_levels_apart(one, alone) <= 1
