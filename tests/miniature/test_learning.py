"""The loop, the vocabulary and the files of the miniature models."""

from __future__ import annotations

import pytest

pytest.importorskip("diffusers", reason="needs the extra 'headless'")

import torch
from torch import nn

from lib_xadapter.headless.compvis_layout import SECOND_TEXT_PREFIX, open_clip_origin, read_compvis, write_compvis
from lib_xadapter.headless.tokenizers import load_tokenizer
from lib_xadapter.miniature import architectures, autoencoders, judge, learning, model_files, vocabulary
from lib_xadapter.miniature.autoencoders import normalise
from lib_xadapter.miniature.captions import caption_of, facts_of
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


def test_the_wide_text_encoder_says_the_same():
    """As open_clip's layers would: here by transformers, of as many layers and as wide."""
    torch.manual_seed(3)
    narrow = architectures.second_text().eval()
    for weight in narrow.parameters():
        nn.init.normal_(weight, std=0.2)
    file = write_compvis(narrow.state_dict(), SECOND_TEXT_PREFIX, open_clip_origin)
    label = torch.zeros(4, architectures.TEXT_WIDTH + 6 * 256)
    wide_file = model_files.widened({**file, f"{model_files.UNET_PREFIX}label_emb.0.0.weight": label})

    config = narrow.config.__class__(
        **{
            **narrow.config.to_dict(),
            "hidden_size": model_files.OPEN_CLIP_WIDTH,
            "intermediate_size": 4 * model_files.OPEN_CLIP_WIDTH,
            "num_hidden_layers": model_files.OPEN_CLIP_LAYERS,
            "num_attention_heads": model_files.COPIES,
            "projection_dim": model_files.OPEN_CLIP_WIDTH,
            "vocab_size": model_files.CLIP_VOCABULARY,
            "eos_token_id": model_files.CLIP_VOCABULARY - 1,
        }
    )
    wide = narrow.__class__(config).eval()
    wide.load_state_dict(read_compvis(wide_file, SECOND_TEXT_PREFIX, wide, open_clip_origin, "wide"), strict=False)
    tokens = tokens_of(["small red circle left on sky"])
    in_clip = torch.tensor(vocabulary.clip_numbers())[tokens]
    with torch.no_grad():
        ours, theirs = (model(ids, output_hidden_states=True) for model, ids in ((narrow, tokens), (wide, in_clip)))
    copies = ours.hidden_states[-2].repeat(1, 1, model_files.COPIES)
    assert torch.allclose(theirs.hidden_states[-2], copies, atol=1e-3)
    assert torch.allclose(theirs.text_embeds, ours.text_embeds.repeat(1, model_files.COPIES), atol=1e-3)


def test_the_classifier_s_true_answers_are_the_caption_s_facts():
    facts = [facts_of(scene_of(seed)) for seed in range(8)]
    true = judge.answers_of(facts)

    class Knowing(nn.Module):
        def forward(self, pictures):
            sizes = {**judge.CELL_QUESTIONS, **judge.GROUND_QUESTIONS}
            return {
                name: nn.functional.one_hot(true[name].clamp(min=0), sizes[name]).movedim(-1, 1).float()
                for name in sizes
            }

    found = judge.find_facts(Knowing(), torch.zeros(8, 3, 8, 8), facts)
    assert all(one.shown == one.asked for one in found)
    assert judge.seen_facts(Knowing(), torch.zeros(8, 3, 8, 8)) == [caption_of(told) for told in facts]
