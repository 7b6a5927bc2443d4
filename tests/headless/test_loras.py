"""A LoRA goes into the model it was made for, whole, with its alpha, or not at all."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from lib_xadapter.errors import DoesNotFit, WrongArgument, WrongFile
from lib_xadapter.headless import load_lora
from lib_xadapter.headless.lora_names import Lora, read_lora, take_tags
from lib_xadapter.headless.loras import merge_lora
from lib_xadapter.headless.model_files import load_base, load_upgraded


@pytest.fixture(scope="module")
def loaded(small):
    return load_base(small.base, torch.float32, small.tokenizer), load_upgraded(
        small.upgraded, torch.float32, small.tokenizer
    )


@pytest.fixture
def base(loaded):
    pipeline = copy.copy(loaded[0])
    pipeline.unet = copy.deepcopy(loaded[0].unet)
    pipeline.text_encoder = copy.deepcopy(loaded[0].text_encoder)
    return pipeline


@pytest.fixture
def upgraded(loaded):
    pipeline = copy.copy(loaded[1])
    pipeline.unet = copy.deepcopy(loaded[1].unet)
    return pipeline


def written(tmp_path, tensors: dict[str, torch.Tensor]) -> Lora:
    path = tmp_path / "lora.safetensors"
    safetensors.torch.save_file(tensors, path)
    return Lora(path)


BASE_LAYER = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


def test_the_merged_model_is_what_peft_computes(small, base, upgraded):
    """The same file through diffusers' own loader, alpha and text encoder included."""
    pytest.importorskip("peft", reason="to compare with")
    theirs = load_base(small.base, torch.float32, small.tokenizer)
    theirs.load_lora_weights(str(small.lora.parent), weight_name=small.lora.name, adapter_name="style")
    theirs.set_adapters(["style"], [0.7])
    assert merge_lora(Lora(small.lora, 0.7), base, upgraded) == "base"
    latent, tokens = torch.ones(1, 4, 8, 8), torch.tensor([[512, 64, 65, 513]])
    context = torch.ones(1, 4, 64)
    for ours, peft in (
        (base.unet(latent, 500, context).sample, theirs.unet(latent, 500, context).sample),
        (base.text_encoder(tokens).last_hidden_state, theirs.text_encoder(tokens).last_hidden_state),
    ):
        torch.testing.assert_close(ours, peft, rtol=1e-3, atol=1e-4)


def test_alpha_scales_a_lora(tmp_path, base, upgraded):
    layer = base.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q
    before = layer.weight.clone()
    factors = {"lora_down": torch.randn(4, 32), "lora_up": torch.randn(32, 4)}
    tensors = {f"{BASE_LAYER}.{name}.weight": value for name, value in factors.items()}
    merge_lora(written(tmp_path, tensors | {f"{BASE_LAYER}.alpha": torch.tensor(1.0)}), base, upgraded)
    torch.testing.assert_close(layer.weight - before, factors["lora_up"] @ factors["lora_down"] / 4)


def test_an_sdxl_lora_goes_to_the_upgraded_model(tmp_path, base, upgraded):
    """Under the names of the CompVis layout, as trainers write them."""
    layer = upgraded.unet.mid_block.attentions[0].transformer_blocks[1].attn2.to_k
    before = layer.weight.clone()
    name = "lora_unet_middle_block_1_transformer_blocks_1_attn2_to_k"
    tensors = {f"{name}.lora_down.weight": torch.ones(2, 128), f"{name}.lora_up.weight": torch.ones(128, 2)}
    assert merge_lora(written(tmp_path, tensors), base, upgraded) == "upgraded"
    torch.testing.assert_close(layer.weight, before + 2)


def test_a_loha_is_the_product_of_two_products(tmp_path, base, upgraded):
    layer = base.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q
    before = layer.weight.clone()
    first, second = (torch.randn(32, 2), torch.randn(2, 32)), (torch.randn(32, 2), torch.randn(2, 32))
    tensors = {
        f"{BASE_LAYER}.hada_w{number}_{half}": value
        for number, halves in ((1, first), (2, second))
        for half, value in zip("ab", halves, strict=True)
    }
    merge_lora(written(tmp_path, tensors), base, upgraded)
    delta = (first[0] @ first[1]) * (second[0] @ second[1])
    torch.testing.assert_close(layer.weight - before, delta, rtol=1e-4, atol=1e-5)


def test_the_names_of_older_diffusers_find_their_layers(tmp_path, base, upgraded):
    block = base.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    before = [layer.weight.clone() for layer in (block.to_q, block.to_out[0])]
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor"
    factors = {"down": torch.ones(2, 32), "up": torch.ones(32, 2)}
    tensors = {f"{name}.to_{end}_lora.{half}.weight": factors[half].clone() for end in ("q", "out") for half in factors}
    merge_lora(written(tmp_path, tensors), base, upgraded)
    for layer, weight in zip((block.to_q, block.to_out[0]), before, strict=True):
        torch.testing.assert_close(layer.weight, weight + 2)


def pair(name: str, inner: int = 32, outer: int = 32) -> dict[str, torch.Tensor]:
    return {f"{name}.lora_down.weight": torch.ones(2, inner), f"{name}.lora_up.weight": torch.ones(outer, 2)}


@pytest.mark.parametrize(
    ("tensors", "kind", "sentence"),
    [
        (pair(BASE_LAYER, inner=48), DoesNotFit, "changes a weight of 32x48, the model's is 32x32"),
        (
            pair(BASE_LAYER) | {f"{BASE_LAYER}.diff": torch.ones(32, 32)},
            WrongFile,
            "has diff, down, up, which is no kind",
        ),
        (pair(BASE_LAYER) | {f"{BASE_LAYER}.more": torch.ones(1)}, WrongFile, "more', which is part of no kind"),
        (
            {f"{BASE_LAYER}.diff": torch.ones(32, 32), f"{BASE_LAYER}.diff_b": torch.ones(32)},
            DoesNotFit,
            "changes a bias, and the model's layer has none",
        ),
        (
            pair(BASE_LAYER) | pair(BASE_LAYER.replace("attn1", "attn7")),
            DoesNotFit,
            "there is no layer for '.*attn7_to_q'",
        ),
        ({"something": torch.ones(1)}, WrongFile, "is no LoRA for SD1.5 or SDXL"),
    ],
)
def test_a_lora_that_does_not_go_in_whole_changes_nothing(tensors, kind, sentence, tmp_path, base, upgraded):
    before = copy.deepcopy(base.unet.state_dict())
    with pytest.raises(kind, match=sentence):
        merge_lora(written(tmp_path, tensors), base, upgraded)
    assert all(torch.equal(value, before[key]) for key, value in base.unet.state_dict().items())


def test_file_and_weight_are_read_from_one_word():
    assert read_lora("style.safetensors:0.8") == ("style.safetensors", 0.8)
    assert read_lora("style") == ("style", 1.0)
    assert read_lora(r"C:\loras\style.safetensors") == (r"C:\loras\style.safetensors", 1.0)
    with pytest.raises(WrongArgument, match="'strong' is no number"):
        read_lora("style:strong")


def test_tags_are_taken_out_of_the_prompt():
    tags = take_tags("a cat <lora:ink:0.5> on a mat <lyco:grain>")
    assert (tags.prompt, tags.loras) == ("a cat on a mat", (Lora(Path("ink"), 0.5), Lora(Path("grain"))))


@pytest.mark.parametrize(
    ("tag", "lora"),
    [
        ("<lora:ink:0.2:0.9>", Lora(Path("ink"), 0.2, 0.9)),
        ("<lora:ink:0.2:0.9:4>", Lora(Path("ink"), 0.2, 0.9, 4)),
        ("<lora:ink:0.5:unet=-1>", Lora(Path("ink"), 0.5, -1.0)),
        ("<lora:ink:te=0:dyn=2>", Lora(Path("ink"), 0.0, None, 2)),
        ("<lora:ink:1:model=base>", Lora(Path("ink"), models=("base",))),
    ],
)
def test_tags_say_what_they_say_in_the_webui(tag, lora):
    assert take_tags(tag).loras == (lora,)
    assert take_tags(f"<lora:ink:{lora.said}>").loras == (lora,)


@pytest.mark.parametrize(
    ("tag", "sentence"),
    [
        ("<lora:ink:strong>", "has the weight 'strong', expected a number"),
        ("<lora:ink:1:dyn=0.5>", "has the weight '0.5', expected a whole number"),
        ("<lora:ink:1:vae=1>", "says 'vae', expected te, unet, dyn or model"),
        ("<lora:ink:1:model=sd3>", "says 'model=sd3', expected base, sdxl, both"),
    ],
)
def test_a_tag_that_says_something_else_is_named(tag, sentence):
    with pytest.raises(WrongArgument, match=f"prompt: '{tag}' {sentence}"):
        take_tags(tag)


def test_peft_keeps_a_magnitude_for_each_output(tmp_path, base, upgraded):
    """W + BA, each row brought to its own length."""
    layer = base.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q
    changed = layer.weight + 2
    name = "base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    magnitudes = torch.rand(32) + 0.5
    tensors = {
        f"{name}.lora_A.weight": torch.ones(2, 32),
        f"{name}.lora_B.weight": torch.ones(32, 2),
        f"{name}.lora_magnitude_vector.weight": magnitudes,
    }
    lora = written(tmp_path, tensors)
    merge_lora(replace(lora, models=("base",)), base, upgraded)
    expected = changed / changed.norm(dim=1, keepdim=True) * magnitudes[:, None]
    torch.testing.assert_close(layer.weight, expected)


def test_newer_names_of_glora_mean_the_same(tmp_path, base, upgraded):
    layer = base.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q
    before = layer.weight.clone()
    a1, a2, b1, b2 = (torch.randn(*shape) for shape in ((4, 32), (32, 4), (4, 32), (32, 4)))
    newer = dict(zip(("a2", "a1", "b2", "b1"), (a1, a2, b1, b2), strict=True))
    merge_lora(
        written(tmp_path, {f"{BASE_LAYER}.{half}.weight": value for half, value in newer.items()}), base, upgraded
    )
    torch.testing.assert_close(layer.weight, before + before @ a2 @ a1 + b2 @ b1, rtol=1e-4, atol=1e-4)


def test_anybodys_pipeline_takes_a_lora_of_its_own_family(tmp_path, small, base, upgraded):
    unet, text = copy.deepcopy(base.unet.state_dict()), copy.deepcopy(base.text_encoder.state_dict())
    load_lora(base, small.lora, 0.5, unet_weight=0.0)
    assert all(torch.equal(value, unet[key]) for key, value in base.unet.state_dict().items())
    assert not all(torch.equal(value, text[key]) for key, value in base.text_encoder.state_dict().items())
    with pytest.raises(DoesNotFit, match=r"small-style.safetensors is a LoRA for SD1.5, the pipeline is SDXL"):
        load_lora(upgraded, small.lora)
