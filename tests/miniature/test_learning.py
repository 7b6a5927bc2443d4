"""The loop, the vocabulary and the files of the miniature models."""

from __future__ import annotations

import dataclasses

import pytest

pytest.importorskip("diffusers", reason="needs the extra 'headless'")

import torch
from torch import nn

from lib_xadapter.headless.model_files import load_base, load_upgraded
from lib_xadapter.headless.tokenizers import load_tokenizer
from lib_xadapter.miniature import architectures, autoencoders, judge, learning, model_files, vocabulary
from lib_xadapter.miniature.autoencoders import normalise
from lib_xadapter.miniature.captions import caption_of, facts_of
from lib_xadapter.miniature.denoising import Denoiser
from lib_xadapter.miniature.drawing import base_picture
from lib_xadapter.miniature.learning import Course, Drawn, batches, learn
from lib_xadapter.miniature.scenes import scene_of
from lib_xadapter.miniature.worlds import tensor_of, tokens_of

COURSE = Course(steps=40, batch=4, learning_rate=0.05, warmup=2)


@pytest.fixture
def line() -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(3, 1)


def line_loss(module):
    """Of a line that is to be learned."""

    def loss(drawn):
        points = drawn.normal(4, 3)
        return (module(points) - points.sum(1, keepdim=True) - 1).square().mean()

    return loss


def test_the_loss_falls(line, tmp_path):
    first = float(line_loss(line)(Drawn.of(5, 0)))
    learn(line, line_loss(line), COURSE, tmp_path, "line")
    assert float(line_loss(line)(Drawn.of(5, 0))) < 0.5 * first


def test_an_interrupted_stage_goes_on_to_the_same_weights(line, tmp_path, monkeypatch):
    start = {name: value.clone() for name, value in line.state_dict().items()}
    learn(line, line_loss(line), COURSE, tmp_path / "whole", "line")
    whole = [weight.detach().clone() for weight in line.parameters()]

    line.load_state_dict(start)
    monkeypatch.setattr(learning, "SAVED_EVERY", 0.0)

    def failing(drawn):
        if drawn.step == 17:
            raise KeyboardInterrupt
        return line_loss(line)(drawn)

    with pytest.raises(KeyboardInterrupt):
        learn(line, failing, COURSE, tmp_path / "parts", "line")
    line.load_state_dict(start)
    learn(line, line_loss(line), COURSE, tmp_path / "parts", "line")
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(line.parameters(), whole, strict=True))


def test_a_stage_that_goes_on_counts_the_steps_that_it_took_before(line, tmp_path, monkeypatch):
    """However little time there is left, those are not undone."""
    timed = dataclasses.replace(COURSE, steps=60, seconds=1e-9)
    learn(line, line_loss(line), dataclasses.replace(COURSE, steps=30), tmp_path, "line")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    torch.save({**state, "steps": 60}, tmp_path / "state.pt")
    assert learn(line, line_loss(line), timed, tmp_path, "line") == 30 + learning.TIMED


def test_a_loss_that_is_no_number_ends_the_stage(line, tmp_path):
    with pytest.raises(learning.Diverged, match="step 0"):
        learn(line, lambda drawn: line.weight.sum() * float("nan"), COURSE, tmp_path, "line")


@pytest.mark.parametrize("bank", [7, 24, 510])
def test_a_round_takes_every_row_of_a_bank_once(bank):
    for turn in (0, 3):
        steps = [Drawn(step, None, None) for step in range(turn * bank, (turn + 1) * bank)]
        assert sorted(row for step in steps for row in batches(bank, 1, step)) == list(range(bank))


def test_texts_fall_into_the_tokens_of_clip(tmp_path):
    vocabulary.write_tokenizer(tmp_path)
    ours, clip = load_tokenizer(tmp_path), load_tokenizer()
    in_clip = vocabulary.clip_numbers()
    for seed in range(20):
        text = caption_of(facts_of(scene_of(seed)))
        tokens = ours(text, padding="max_length")["input_ids"]
        assert tokens == vocabulary.token_rows(text)
        assert [in_clip[token] for token in tokens] == clip(text, padding="max_length")["input_ids"]


def test_the_second_text_encoder_gets_zeros_after_the_end():
    tokens = tokens_of(["small red circle left on sky"])
    filled = architectures._filled_with_zero(tokens)
    assert torch.equal(filled[0], torch.tensor(vocabulary.token_rows("small red circle left on sky", pad="!")))


@torch.no_grad()
def test_normalising_a_vae_changes_its_latents_and_no_picture(monkeypatch):
    monkeypatch.setattr(autoencoders, "MEASURED", 32)
    torch.manual_seed(2)
    vae = architectures.vae("sd1").eval()
    pictures = torch.rand(2, 3, 16, 16) * 2 - 1
    posterior, before = vae.encode(pictures).latent_dist, vae.decode(vae.encode(pictures).latent_dist.mean).sample
    normalise(vae, "sd1", seed=0)
    normalised = vae.encode(pictures).latent_dist
    assert torch.allclose(vae.decode(normalised.mean).sample, before, atol=1e-4)
    gain = normalised.std / posterior.std
    assert torch.allclose(gain, gain[:1, :, :1, :1].expand_as(gain), rtol=1e-3)
    shown = tensor_of([base_picture(scene_of(seed)) for seed in range(16)])
    latents = vae.config.scaling_factor * vae.encode(shown).latent_dist.mean
    assert latents.mean((0, 2, 3)).abs().max() < 0.5
    assert ((latents.std((0, 2, 3)) > 0.5) & (latents.std((0, 2, 3)) < 2)).all()


@torch.no_grad()
@pytest.mark.parametrize(
    ("unet", "text", "family", "load"),
    [
        (architectures.base_unet, architectures.BaseText, "sd1", load_base),
        (architectures.upgraded_unet, architectures.UpgradedText, "sdxl", load_upgraded),
    ],
    ids=["base", "upgraded"],
)
def test_the_files_of_a_model_encode_a_prompt_as_in_training(unet, text, family, load, tmp_path):
    torch.manual_seed(3)
    vocabulary.write_tokenizer(tmp_path / "tokenizer")
    encoder = text().eval()
    model_files.save_model(
        tmp_path / "model", Denoiser(unet(), encoder), architectures.vae(family), tmp_path / "tokenizer"
    )
    pipeline = load(tmp_path / "model", torch.float32)
    caption = "small red circle left on sky"
    encoded = pipeline.encode_prompt(caption, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    expected = encoder.float()(tokens_of([caption]))
    assert torch.allclose(encoded[0], expected.tokens, atol=1e-5)
    if expected.pooled is not None:
        assert torch.allclose(encoded[2], expected.pooled, atol=1e-5)
    assert pipeline.unet.config.norm_num_groups == architectures.GROUPS


def test_the_classifier_s_true_answers_are_the_caption_s_facts():
    facts = [facts_of(scene_of(seed)) for seed in range(8)]
    true = judge.answers_of(facts)

    class Knowing(nn.Module):
        def forward(self, pictures):
            sizes = {**judge.SEEN_QUESTIONS, **judge.GROUND_QUESTIONS}
            return {
                name: nn.functional.one_hot(true[name].clamp(min=0), sizes[name]).movedim(-1, 1).float()
                for name in sizes
            }

    found = judge.find_facts(Knowing(), torch.zeros(8, 3, 8, 8), facts)
    assert all(one.found == one.total for one in found)
    assert sum(one.total for one in found) == sum(3 * len(one.objects) + 1 + len(one.grounds) for one in facts)
