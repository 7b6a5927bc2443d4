"""Checkpoints are told apart by their structure, at any width and with any text encoder beside the UNet."""

from __future__ import annotations

import pytest
import torch

from lib_xadapter.checkpoint_files import detect_checkpoint_family, input_channels
from lib_xadapter.errors import WrongFile
from tests.lora_formats import MODELS, NARROW_MODELS, Model, compvis_name, save_shapes, weight_shape

SDXL_REFINER = Model((384, 768, 1536, 1536), (0, 4, 4, 0), 1280, True, ((1280, 32),))
FAMILIES = {**MODELS, "sdxl-refiner": SDXL_REFINER}
TEXT_ENCODERS = {
    "sd1": ["cond_stage_model.transformer.text_model.final_layer_norm.weight"],
    "sd2": ["cond_stage_model.model.ln_final.weight"],
    "sdxl": [
        "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight",
        "conditioner.embedders.1.model.ln_final.weight",
    ],
    "sdxl-refiner": ["conditioner.embedders.0.model.ln_final.weight"],
}
EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)


def unet_shapes(model, in_channels=4, prefix="model.diffusion_model."):
    shapes = {prefix + compvis_name(layer.name) + ".weight": weight_shape(layer) for layer in model.unet_layers()}
    return shapes | {f"{prefix}input_blocks.0.0.weight": (model.channels[0], in_channels, 3, 3)}


def text_shapes(family):
    return dict.fromkeys(TEXT_ENCODERS[family], (64,))


@pytest.fixture
def saved(tmp_path):
    return lambda shapes: save_shapes(shapes, tmp_path / "model.safetensors")


@EVERY_FAMILY
@pytest.mark.parametrize("with_text_encoders", [True, False])
def test_released_widths(saved, family, with_text_encoders):
    shapes = unet_shapes(FAMILIES[family]) | (text_shapes(family) if with_text_encoders else {})
    assert detect_checkpoint_family(saved(shapes)) == family


@pytest.mark.parametrize("family", NARROW_MODELS)
def test_a_tenth_of_the_width(saved, family):
    assert detect_checkpoint_family(saved(unet_shapes(NARROW_MODELS[family]))) == family


def test_a_model_that_is_told_a_picture_is_no_plain_sd2(saved):
    told = {"model.diffusion_model.label_emb.0.0.weight": (1280, 2048)}
    assert detect_checkpoint_family(saved(unet_shapes(FAMILIES["sd2"]) | text_shapes("sd2") | told)) == "sd2-unclip"


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_the_unet_counts_and_not_the_text_encoder_beside_it(saved, family):
    other = {"sd1": "sd2", "sd2": "sd1"}[family]
    assert detect_checkpoint_family(saved(unet_shapes(FAMILIES[family]) | text_shapes(other))) == family


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_the_text_encoder_speaks_where_the_unet_lost_its_projections(saved, family):
    shapes = {name: shape for name, shape in unet_shapes(FAMILIES[family]).items() if "proj_in" not in name}
    assert detect_checkpoint_family(saved(shapes | text_shapes(family))) == family
    assert detect_checkpoint_family(saved(shapes)) == "unknown"


@pytest.mark.parametrize(
    "shapes",
    [
        {},
        {"model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": (4, 4)},
        {"down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight": (4, 4)},
        {"first_stage_model.encoder.conv_in.weight": (4, 3, 3, 3)},
        unet_shapes(MODELS["sd1"], prefix="control_model."),
        text_shapes("sd1"),
    ],
    ids=["empty", "sd3", "diffusers", "vae", "controlnet", "text-encoder"],
)
def test_other_files_are_unknown(saved, shapes):
    assert detect_checkpoint_family(saved(shapes)) == "unknown"


def test_a_video_model_made_from_sd2_is_unknown(saved):
    temporal = {"model.diffusion_model.input_blocks.1.1.time_stack.0.attn1.to_q.weight": (320, 320)}
    assert detect_checkpoint_family(saved(unet_shapes(MODELS["sd2"]) | temporal)) == "unknown"


def test_the_upscaler_with_attention_on_its_coarsest_levels_is_unknown(saved):
    upscaler = Model((256, 512, 512, 1024), (0, 1, 1, 1), 1024, True, ())
    assert detect_checkpoint_family(saved(unet_shapes(upscaler))) == "unknown"


@EVERY_FAMILY
@pytest.mark.parametrize("channels", [4, 9])
def test_input_channels(saved, family, channels):
    path = saved(unet_shapes(FAMILIES[family], in_channels=channels))
    assert input_channels(path) == channels
    assert detect_checkpoint_family(path) == family


def test_a_file_without_a_unet_has_no_input_channels(saved):
    assert input_channels(saved(text_shapes("sd1"))) is None


@pytest.mark.parametrize("family", NARROW_MODELS)
def test_a_pickled_checkpoint(tmp_path, family):
    shapes = unet_shapes(NARROW_MODELS[family], in_channels=9)
    weights = {name: torch.empty(1, dtype=torch.float16).expand(shape) for name, shape in shapes.items()}
    torch.save({"state_dict": weights}, tmp_path / "model.ckpt")
    assert detect_checkpoint_family(tmp_path / "model.ckpt") == family
    assert input_channels(tmp_path / "model.ckpt") == 9


@pytest.mark.parametrize("question", [detect_checkpoint_family, input_channels])
def test_a_file_that_is_cut_off_is_named(saved, question):
    path = saved(unet_shapes(NARROW_MODELS["sd1"]))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(WrongFile, match=r"model\.safetensors is cut off"):
        question(path)
