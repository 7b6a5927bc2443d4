"""Prompts are read as the WebUI reads them: attention, long prompts, padding."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from lib_xadapter import load_adapter
from lib_xadapter.errors import WrongArgument
from lib_xadapter.headless.job import Job
from lib_xadapter.headless.jobs import request_of
from lib_xadapter.headless.model_files import load_base, load_controlnet, load_upgraded
from lib_xadapter.headless.models import Models, parts_at_work, with_controls
from lib_xadapter.headless.pipeline import TwoStages
from lib_xadapter.headless.prompts import (
    Encoder,
    Part,
    PromptPair,
    arguments_of,
    encode,
    encode_for_base,
    encode_for_upgraded,
    read_attention,
    split_into_windows,
)
from lib_xadapter.settings import Settings
from tests.pictures import control_map
from tests.small_models import t2i_adapter


@pytest.fixture(scope="module")
def models(small):
    return Models(
        load_base(small.base, torch.float32, small.tokenizer),
        load_upgraded(small.upgraded, torch.float32, small.tokenizer),
    )


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("", [("", 1.0)]),
        ("a cat", [("a cat", 1.0)]),
        ("a (cat:1.5) here", [("a ", 1.0), ("cat", 1.5), (" here", 1.0)]),
        ("a (cat)", [("a ", 1.0), ("cat", 1.1)]),
        ("((a) b)", [("a", 1.21), (" b", 1.1)]),
        ("[a]", [("a", 1 / 1.1)]),
        ("(a (b:0.5):2)", [("a ", 2.0), ("b", 1.0)]),
        (r"a \(b\)", [("a (b)", 1.0)]),
        ("a) b] c: d", [("a) b] c: d", 1.0)]),
        ("(a", [("a", 1.1)]),
        ("12:30 o'clock", [("12:30 o'clock", 1.0)]),
    ],
)
def test_attention_is_read(prompt, parts):
    read = read_attention(prompt)
    assert [part.text for part in read] == [text for text, _ in parts]
    assert [part.weight for part in read] == pytest.approx([weight for _, weight in parts])
    assert all(isinstance(part, Part) for part in read)


def test_a_long_prompt_goes_on_in_a_second_window(models):
    tokenizer = models.base.tokenizer
    first, second = split_into_windows("a" * 80, tokenizer)
    assert len(first.tokens) == len(second.tokens) == 77
    assert first.tokens[0] == second.tokens[0] == tokenizer.bos_token_id
    assert first.tokens[-1] == tokenizer.eos_token_id
    assert set(second.tokens[6:]) == {tokenizer.eos_token_id}


@pytest.mark.parametrize(
    ("prompt", "in_the_first"),
    [
        ("a" * 60 + ", " + "b" * 30, 61),
        ("a" * 55 + ", " + "b" * 30, 56),
        ("a" * 54 + ", " + "b" * 30, 75),
        ("a" * 60 + ", " + "b" * 14 + "," + "b" * 15, 75),
    ],
)
def test_a_window_ends_behind_a_comma_that_is_near(prompt, in_the_first, models):
    """As the WebUI splits them; a letter is a token here."""
    tokenizer = models.base.tokenizer
    first, _ = split_into_windows(prompt, tokenizer)
    assert first.tokens.index(tokenizer.eos_token_id) == 1 + in_the_first


def test_a_shorter_negative_prompt_keeps_its_meaning(models):
    """Repeated to the prompt's length, it does in the UNet what it does alone."""
    told = arguments_of(encode_for_base(models, PromptPair("a" * 80, "b")), images=1, guided=True)
    assert told["prompt_embeds"].shape == told["negative_prompt_embeds"].shape == (1, 154, 64)
    alone = encode_for_base(models, PromptPair("", "b")).uncond.at(0).tokens
    latent = torch.ones(1, 4, 8, 8)
    repeated, plain = (
        models.base.unet(latent, 500, tokens).sample for tokens in (told["negative_prompt_embeds"], alone)
    )
    torch.testing.assert_close(repeated, plain, rtol=1e-4, atol=1e-5)


def test_prompts_of_all_stretches_become_of_one_length(models):
    told = encode_for_base(models, PromptPair(f"[a:{'b' * 80}:0.5] AND c BREAK d BREAK e", "", evaluations=4))
    lengths = {one.encoded.tokens.shape[1] for schedule in (*told.conds, told.uncond) for one in schedule.stretches}
    assert lengths == {462}
    assert not told.is_plain


def of_base(models, prompt: str) -> torch.Tensor:
    return encode([prompt], Encoder(models.base.tokenizer, models.base.text_encoder))[0].tokens


def test_without_attention_the_text_encoder_is_left_alone(models):
    (window,) = split_into_windows("a cat", models.base.tokenizer)
    plain = models.base.text_encoder(torch.tensor([window.tokens])).last_hidden_state
    torch.testing.assert_close(of_base(models, "a cat"), plain)


def test_attention_shifts_and_keeps_the_mean(models):
    plain, shifted = (of_base(models, text) for text in ("a cat", "a (cat:1.4)"))
    assert not torch.allclose(plain, shifted)
    torch.testing.assert_close(plain.mean(), shifted.mean())


def test_clip_skip_is_the_encoder_without_its_last_layers(models):
    shorter = copy.deepcopy(models.base.text_encoder)
    layers = getattr(shorter, "text_model", shorter).encoder.layers
    del layers[-1]
    without = encode(["a cat"], Encoder(models.base.tokenizer, shorter))[0].tokens
    torch.testing.assert_close(
        encode_for_base(models, PromptPair("a cat", ""), clip_skip=2).conds[0].at(0).tokens, without
    )


def test_sdxl_is_told_what_diffusers_tells_it(models):
    ours = arguments_of(encode_for_upgraded(models, PromptPair("a cat", "a dog")), images=1, guided=True)
    theirs = models.upgraded.encode_prompt(
        "a cat", num_images_per_prompt=1, do_classifier_free_guidance=True, negative_prompt="a dog", device="cpu"
    )
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    for name, expected in zip(names, theirs, strict=True):
        torch.testing.assert_close(ours[name], expected)


def test_an_empty_negative_prompt_is_zeros_for_sdxl(models):
    uncond = encode_for_upgraded(models, PromptPair("a cat", "")).uncond.at(0)
    assert not uncond.tokens.any()
    assert not uncond.pooled.any()


def test_without_guidance_there_are_no_unconds(models):
    told = arguments_of(encode_for_upgraded(models, PromptPair("a cat", "")), images=2, guided=False)
    assert set(told) == {"prompt_embeds", "pooled_prompt_embeds"}
    assert len(told["prompt_embeds"]) == 2


JOB = Job(prompt="a cat", width=64, height=64, steps=4, sampler="Euler")


@pytest.fixture(scope="module")
def led(small, models) -> Models:
    """With an adapter and a ControlNet."""
    net = load_controlnet(small.controlnet, models.base.unet, torch.float32)
    return Models(with_controls(models.base, [net]), models.upgraded, load_adapter(small.adapter))


def latents(models: Models, prompt: str, **changes) -> torch.Tensor:
    nets = parts_at_work(models.base)[1:]
    count = len(getattr(nets[0], "nets", nets)) if nets else 0
    maps = [control_map(64), control_map(64).rotate(90)][:count]
    job = replace(JOB, prompt=prompt, control_images=tuple(maps), control_scales=((1.0,),) * count)
    job = replace(job, **changes)
    stages, request = TwoStages(models), request_of(models, job, job.settings, (1.0,) * count)
    return stages.upgraded_latents(request, stages.base_latents(request))


@pytest.fixture(scope="module")
def of_a_cat(led) -> torch.Tensor:
    return latents(led, "a cat")


@pytest.mark.parametrize(
    "prompt", ["[a cat:a cat:2]", "[a cat:a dog:9]", "[a dog:a cat:0]", "[a cat|a cat]", "a cat AND a dog:0"]
)
def test_words_that_change_nothing_change_nothing(prompt, led, of_a_cat):
    made = latents(led, prompt)
    assert float((made - of_a_cat).norm() / of_a_cat.norm()) < 1e-4


@pytest.mark.parametrize(
    "prompt", ["[a cat:a dog:1]", "[a cat|a dog]", "a cat AND a dog", "a cat AND a dog:0.5", "a BREAK cat"]
)
def test_words_that_change_something_do(prompt, led, of_a_cat):
    made = latents(led, prompt)
    assert bool(torch.isfinite(made).all())
    assert float((made - of_a_cat).norm() / of_a_cat.norm()) > 1e-3


def test_combined_prompts_are_recorded_as_in_lockstep(led):
    beside, recorded = (
        latents(led, "a cat AND [a dog|a bird]", batch=2, settings=Settings(memory=memory))
        for memory in ("lockstep", "recorded")
    )
    assert torch.equal(beside, recorded)


@pytest.fixture(scope="module", params=["two ControlNets", "one ControlNet twice", "a T2I-Adapter"])
def led_otherwise(request, small, models) -> Models:
    """With what a pipeline calls in other ways than a single ControlNet."""
    net, other = (load_controlnet(small.controlnet, models.base.unet, torch.float32) for _ in range(2))
    nets = {"two ControlNets": [net, other], "one ControlNet twice": [net, net], "a T2I-Adapter": [t2i_adapter()]}
    base = with_controls(models.base, nets[request.param])
    base.set_progress_bar_config(disable=True)
    return Models(base, models.upgraded, load_adapter(small.adapter))


@pytest.mark.parametrize(
    ("prompt", "same"),
    [("[a cat:a cat:2]", True), ("a cat AND a dog:0", True), ("[a cat:a dog:1]", False), ("a cat AND a dog", False)],
)
def test_prompts_change_and_are_combined_beside_plugins_of_every_kind(prompt, same, led_otherwise):
    plain, made = (latents(led_otherwise, text, batch=2) for text in ("a cat", prompt))
    assert bool(torch.isfinite(made).all())
    assert (float((made - plain).norm() / plain.norm()) < 1e-4) == same


def test_combined_prompts_need_guidance(led):
    with pytest.raises(WrongArgument, match="AND, which needs a --cfg above 1"):
        latents(led, "a AND b", cfg_scale=1.0)
