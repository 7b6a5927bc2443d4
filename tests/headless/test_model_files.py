"""Single files and folders of diffusers load to the same models, and what is wrong with a file is named."""

from __future__ import annotations

import importlib.util
import json

import pytest
import safetensors.torch
import torch
from diffusers import ControlNetModel, EDMDPMSolverMultistepScheduler, EDMEulerScheduler

from lib_xadapter.errors import DoesNotFit, WrongFile
from lib_xadapter.headless.model_files import load_base, load_controlnet, load_upgraded
from lib_xadapter.headless.named_files import find_file
from lib_xadapter.headless.tokenizers import SHIPPED_TABLES, load_tokenizer
from tests import small_models


@pytest.fixture(scope="module")
def base(small):
    return load_base(small.base, torch.float32, small.tokenizer)


@pytest.fixture(scope="module")
def upgraded(small):
    return load_upgraded(small.upgraded, torch.float32, small.tokenizer)


def assert_same_weights(module: torch.nn.Module, other: torch.nn.Module) -> None:
    expected = other.state_dict()
    for key, value in module.state_dict().items():
        assert torch.equal(value, expected[key]), key


def test_a_single_file_holds_every_weight_in_its_place(base, upgraded):
    assert_same_weights(base.unet, small_models.seeded(small_models.base_unet(), "base.unet"))
    assert_same_weights(upgraded.unet, small_models.seeded(small_models.upgraded_unet(), "upgraded.unet"))
    second = small_models.CLIPTextModelWithProjection(small_models.text_config("gelu"))
    assert_same_weights(upgraded.text_encoder_2, small_models.seeded(second, "upgraded.text_2", gain=1.5))


def test_the_configs_are_read_from_the_shapes(base, upgraded):
    assert tuple(upgraded.unet.config.transformer_layers_per_block) == (1, 1, 2)
    assert upgraded.unet.config.use_linear_projection
    assert not base.unet.config.use_linear_projection
    assert (base.vae.config.scaling_factor, upgraded.vae.config.scaling_factor) == (0.18215, 0.13025)
    assert base.scheduler.config.prediction_type == "epsilon"


def test_diffusers_own_reader_finds_the_same_weights_in_the_file(small, base):
    """Our table of names against the one in diffusers."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint

    file = safetensors.torch.load_file(small.base)
    theirs = convert_ldm_unet_checkpoint(file, dict(base.unet.config))
    assert theirs.keys() == base.unet.state_dict().keys()
    for key, value in base.unet.state_dict().items():
        assert torch.equal(value, theirs[key]), key
    theirs = convert_ldm_vae_checkpoint(file, dict(base.vae.config))
    for key, value in base.vae.state_dict().items():
        assert torch.equal(value, theirs[key].reshape(value.shape)), key


@pytest.mark.parametrize("which", ["base", "upgraded"])
def test_a_folder_of_diffusers_is_the_same_model(which, tmp_path, request):
    pipeline, load = request.getfixturevalue(which), {"base": load_base, "upgraded": load_upgraded}[which]
    pipeline.save_pretrained(tmp_path / "folder")
    again = load(tmp_path / "folder", torch.float32)
    assert_same_weights(again.unet, pipeline.unet)
    assert_same_weights(again.text_encoder, pipeline.text_encoder)
    assert again.tokenizer("a cat")["input_ids"] == pipeline.tokenizer("a cat")["input_ids"]


def test_a_folder_of_another_family_is_told(upgraded, tmp_path):
    upgraded.save_config(tmp_path)
    with pytest.raises(WrongFile, match=r"holds a StableDiffusionXLPipeline, expected SD1.5"):
        load_base(tmp_path, torch.float32)


@pytest.mark.parametrize("kind", [EDMEulerScheduler, EDMDPMSolverMultistepScheduler])
def test_a_folder_of_a_model_trained_by_other_rules_of_noise_is_told(kind, upgraded, tmp_path):
    upgraded.save_pretrained(tmp_path / "folder")
    kind().save_pretrained(tmp_path / "folder" / "scheduler")
    index = tmp_path / "folder" / "model_index.json"
    told = json.loads(index.read_text(encoding="utf-8")) | {"scheduler": ["diffusers", kind.__name__]}
    index.write_text(json.dumps(told), encoding="utf-8")
    with pytest.raises(WrongFile, match=r"folder was trained by the rules of EDM, as Playground v2.5 was"):
        load_upgraded(tmp_path / "folder", torch.float32)


def test_a_folder_whose_latents_are_centred_is_told(upgraded, tmp_path):
    upgraded.save_pretrained(tmp_path / "folder")
    config = tmp_path / "folder" / "vae" / "config.json"
    told = json.loads(config.read_text(encoding="utf-8")) | {"latents_mean": [1.0] * 4, "latents_std": [2.0] * 4}
    config.write_text(json.dumps(told), encoding="utf-8")
    with pytest.raises(WrongFile, match=r"folder was trained by the rules of EDM"):
        load_upgraded(tmp_path / "folder", torch.float32)


def test_a_checkpoint_of_a_model_trained_by_other_rules_of_noise_is_told(small, tmp_path):
    path = changed(small, tmp_path, lambda weights: weights.update(edm_mean=torch.zeros(1, 4, 1, 1)))
    with pytest.raises(WrongFile, match=r"changed.safetensors was trained by the rules of EDM"):
        load_base(path, torch.float32, small.tokenizer)


def test_a_checkpoint_of_the_wrong_family_is_told(small):
    with pytest.raises(WrongFile, match=r"small-sd15.safetensors is a checkpoint of SD1.5, expected SDXL"):
        load_upgraded(small.base, torch.float32, small.tokenizer)


def changed(small, tmp_path, change) -> object:
    weights = safetensors.torch.load_file(small.base)
    change(weights)
    path = tmp_path / "changed.safetensors"
    safetensors.torch.save_file(weights, path)
    return path


DEEP = "model.diffusion_model.middle_block.1.proj_in.weight"
CHANGES = [
    (lambda weights: weights.pop(DEEP), f"changed.safetensors misses '{DEEP}'"),
    (lambda weights: weights.update({DEEP: torch.zeros(3, 3, 1, 1)}), f"'{DEEP}' is 3x3x1x1, expected 128x128x1x1"),
    (lambda weights: weights[DEEP].fill_(float("nan")), f"'{DEEP}' holds NaN"),
    (lambda weights: [weights.pop(key) for key in list(weights) if "first_stage" in key], "misses 'first_stage_model"),
    (lambda weights: [weights.pop(key) for key in list(weights) if "cond_stage" in key], "misses 'cond_stage_model"),
]


@pytest.mark.parametrize(("change", "sentence"), CHANGES)
def test_a_broken_checkpoint_is_told_by_its_key(change, sentence, small, tmp_path):
    with pytest.raises(WrongFile, match=sentence):
        load_base(changed(small, tmp_path, change), torch.float32, small.tokenizer)


def test_a_yaml_beside_the_checkpoint_says_what_shapes_do_not(small, tmp_path):
    path = changed(small, tmp_path, lambda weights: None)
    path.with_suffix(".yaml").write_text(
        "model:\n  params:\n    parameterization: v\n    unet_config:\n      params:\n        num_heads: 4\n"
    )
    base = load_base(path, torch.float32, small.tokenizer)
    assert set(base.unet.config.attention_head_dim) == {4}
    assert base.scheduler.config.prediction_type == "v_prediction"


def test_a_controlnet_loads_in_either_layout(small, base, tmp_path):
    compvis = load_controlnet(small.controlnet, base.unet, torch.float32)
    safetensors.torch.save_file(compvis.state_dict(), tmp_path / "diffusers.safetensors")
    assert_same_weights(load_controlnet(tmp_path / "diffusers.safetensors", base.unet, torch.float32), compvis)
    compvis.save_pretrained(tmp_path / "folder")
    assert_same_weights(load_controlnet(tmp_path / "folder", base.unet, torch.float32), compvis)


@pytest.mark.parametrize("attention", [True, False])
def test_a_controlnet_of_sdxl_loads_with_and_without_attention(upgraded, tmp_path, attention):
    net = ControlNetModel.from_unet(upgraded.unet)
    if not attention:
        bare = {"down_block_types": ("DownBlock2D",) * 3, "mid_block_type": "UNetMidBlock2D"}
        net = ControlNetModel.from_config({**net.config, **bare, "cross_attention_dim": None})
    safetensors.torch.save_file(net.state_dict(), tmp_path / "own.safetensors")
    assert_same_weights(load_controlnet(tmp_path / "own.safetensors", upgraded.unet, torch.float32), net)


def test_a_file_that_is_no_controlnet_is_told(small, base):
    with pytest.raises(WrongFile, match=r"small-style.safetensors is no ControlNet"):
        load_controlnet(small.lora, base.unet, torch.float32)


def test_a_controlnet_of_another_width_is_told(small, upgraded):
    with pytest.raises(DoesNotFit, match=r"The ControlNet does not fit the model: small-edges.safetensors"):
        load_controlnet(small.controlnet, upgraded.unet, torch.float32)


@pytest.mark.parametrize(
    "name", ["small-sd15", "small-sd15.safetensors", "small-sd15 [0123456789]", "Small-SD15.ckpt [ab]"]
)
def test_files_are_found_by_the_names_that_the_webui_lists(small, name):
    assert find_file(name, "checkpoint", small.folder, "--base") == small.base


def test_a_file_in_a_subfolder_is_found_with_and_without_it(tmp_path):
    file = tmp_path / "Lora" / "styles" / "ink.safetensors"
    file.parent.mkdir(parents=True)
    file.touch()
    for name in ("styles/ink", "ink", "styles\\ink.safetensors"):
        assert find_file(name, "lora", tmp_path, "--lora") == file


def test_a_name_that_nothing_has_is_told_with_what_there_is(small):
    with pytest.raises(WrongFile, match=r"--lora: there is no lora 'other' in .*; there is small-style.safetensors"):
        find_file("other", "lora", small.folder, "--lora")


def test_clips_vocabulary_comes_from_an_installed_package():
    if not any(importlib.util.find_spec(package) for package, _ in SHIPPED_TABLES):
        pytest.skip("needs a package that carries CLIP's vocabulary (the extra 'headless')")
    tokens = load_tokenizer()("a photo of a cat")["input_ids"]
    assert tokens == [49406, 320, 1125, 539, 320, 2368, 49407]


def test_a_missing_vocabulary_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(WrongFile, match="install openai-clip"):
        load_tokenizer()
    with pytest.raises(WrongFile, match=r"misses vocab.json"):
        load_tokenizer(tmp_path)
