"""Prompts are read as the WebUI reads them: attention, long prompts, padding."""

from __future__ import annotations

import pytest
import torch

from lib_xadapter.headless.model_files import load_base, load_upgraded
from lib_xadapter.headless.models import Models
from lib_xadapter.headless.prompts import (
    Part,
    base_prompts,
    encode,
    of_one_length,
    read_attention,
    split_into_windows,
    upgraded_prompts,
)


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
    split = split_into_windows("a" * 80, models.base.tokenizer)
    tokenizer = models.base.tokenizer
    assert split.tokens.shape == (2, 77)
    assert split.tokens[:, 0].tolist() == [tokenizer.bos_token_id] * 2
    assert split.tokens[0, -1] == tokenizer.eos_token_id
    assert split.tokens[1, 6:].unique().tolist() == [tokenizer.eos_token_id]


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
    split = split_into_windows(prompt, tokenizer)
    assert len(split.tokens) == 2
    assert split.tokens[0].tolist().index(tokenizer.eos_token_id) == 1 + in_the_first


def test_a_shorter_negative_prompt_keeps_its_meaning(models):
    """Repeated to the prompt's length, it does in the UNet what it does alone."""
    prompts = base_prompts(models, "a" * 80, "b", images=1, guided=True)
    assert prompts.cond.shape == prompts.uncond.shape == (1, 154, 64)
    latent, alone = torch.ones(1, 4, 8, 8), base_prompts(models, "", "b", images=1, guided=True).uncond
    repeated, plain = (models.base.unet(latent, 500, tokens).sample for tokens in (prompts.uncond, alone))
    torch.testing.assert_close(repeated, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("first", "second", "length"), [(77, 77, 77), (154, 77, 154), (154, 231, 462)])
def test_prompts_of_any_length_become_of_one(first, second, length):
    both = of_one_length(torch.zeros(1, first, 2), torch.zeros(1, second, 2))
    assert [tuple(tokens.shape) for tokens in both] == [(1, length, 2)] * 2


def test_without_attention_the_text_encoder_is_left_alone(models):
    encoder, tokenizer = models.base.text_encoder, models.base.tokenizer
    tokens = split_into_windows("a cat", tokenizer).tokens
    plain = encoder(tokens).last_hidden_state
    torch.testing.assert_close(encode("a cat", tokenizer, encoder, penultimate=False).tokens, plain)


def test_attention_shifts_and_keeps_the_mean(models):
    encoder, tokenizer = models.base.text_encoder, models.base.tokenizer
    plain, shifted = (encode(text, tokenizer, encoder, penultimate=False).tokens for text in ("a cat", "a (cat:1.4)"))
    assert not torch.allclose(plain, shifted)
    torch.testing.assert_close(plain.mean(), shifted.mean())


def test_sdxl_is_told_what_diffusers_tells_it(models):
    pipeline = models.upgraded
    ours = upgraded_prompts(models, "a cat", "a dog", 1, True, (512, 256))
    cond, uncond, pooled, pooled_uncond = pipeline.encode_prompt(
        "a cat", num_images_per_prompt=1, do_classifier_free_guidance=True, negative_prompt="a dog", device="cpu"
    )
    for mine, theirs in (
        (ours.cond, cond),
        (ours.uncond, uncond),
        (ours.pooled_cond, pooled),
        (ours.pooled_uncond, pooled_uncond),
    ):
        torch.testing.assert_close(mine, theirs)
    assert ours.time_ids.tolist() == [[256, 512, 0, 0, 256, 512]]


def test_an_empty_negative_prompt_is_zeros_for_sdxl(models):
    prompts = upgraded_prompts(models, "a cat", "", 1, True, (512, 512))
    assert not prompts.uncond.any()
    assert not prompts.pooled_uncond.any()


def test_without_guidance_there_are_no_unconds(models):
    assert upgraded_prompts(models, "a cat", "", 2, False, (512, 512)).uncond is None
    assert len(base_prompts(models, "a cat", "", 2, False).rows) == 2
