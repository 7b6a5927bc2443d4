"""Files for the ControlNet extension are told apart by their structure, then by the released widths."""

from __future__ import annotations

import pytest
import torch

from lib_xadapter.controlnet_files import detect_control_family
from lib_xadapter.errors import WrongFile
from tests.lora_formats import MODELS, NARROW_MODELS, compvis_name, save_shapes, weight_shape

EVERY_FAMILY = pytest.mark.parametrize("family", MODELS)
ENCODER = ("down_blocks.", "mid_block.")


def encoder_shapes(model, compvis):
    layers = [layer for layer in model.unet_layers() if layer.name.startswith(ENCODER)]
    return {(compvis_name(layer.name) if compvis else layer.name) + ".weight": weight_shape(layer) for layer in layers}


def controlnet(family, model, compvis=True, prefix=""):
    shapes = encoder_shapes(model, compvis)
    shapes["input_hint_block.0.weight" if compvis else "controlnet_cond_embedding.conv_in.weight"] = (16, 3, 3, 3)
    if family == "sdxl":
        shapes["label_emb.0.0.weight" if compvis else "add_embedding.linear_1.weight"] = (1280, 2816)
    return {prefix + name: shape for name, shape in shapes.items()}


def control_lora(family, model):
    shapes = controlnet(family, model)
    name = next(name for name in shapes if name.endswith("attn2.to_k.weight"))
    return {**shapes, "lora_controlnet": (0,), name.replace("weight", "down"): (8, 768)}


def t2i_adapter(hint_channels, width=320, prefix=""):
    shapes = {"conv_in.weight": (width, hint_channels, 3, 3), "body.0.block1.weight": (width, width, 3, 3)}
    return {prefix + name: shape for name, shape in shapes.items()}


def light_t2i_adapter(hint_channels):
    return {"body.0.in_conv.weight": (80, hint_channels, 1, 1), "body.0.body.0.block1.weight": (80, 80, 3, 3)}


def ip_adapter(attentions, context_width):
    layers = {f"ip_adapter.{2 * n + 1}.to_k_ip.weight": (320, context_width) for n in range(attentions)}
    return {**layers, "image_proj.proj.weight": (4 * context_width, 1024)}


def lllite(*places, context_width=None):
    shapes = {f"lllite_unet_{place}_attn1_to_q.down.0.weight": (32, 640) for place in places}
    if context_width:
        shapes |= {f"lllite_unet_{place}_attn2_to_k.down.0.weight": (32, context_width) for place in places}
    return shapes


@pytest.fixture
def family_of(tmp_path):
    return lambda shapes: detect_control_family(save_shapes(shapes, tmp_path / "control.safetensors"))


@EVERY_FAMILY
@pytest.mark.parametrize("models", [MODELS, NARROW_MODELS], ids=["released width", "narrow"])
@pytest.mark.parametrize("compvis", [True, False], ids=["CompVis", "diffusers"])
@pytest.mark.parametrize("prefix", ["", "control_model."])
def test_controlnets(family_of, family, models, compvis, prefix):
    assert family_of(controlnet(family, models[family], compvis, prefix)) == family


@EVERY_FAMILY
def test_control_loras(family_of, family):
    assert family_of(control_lora(family, MODELS[family])) == family


def test_an_sdxl_controlnet_without_any_attention(family_of):
    shapes = controlnet("sdxl", MODELS["sdxl"])
    assert family_of({name: shape for name, shape in shapes.items() if "transformer" not in name}) == "sdxl"


@pytest.mark.parametrize(("width", "family"), [(768, "sd1"), (1024, "sd2"), (500, "unknown")])
def test_the_width_speaks_where_the_projections_are_gone(family_of, width, family):
    shapes = controlnet("sd1", MODELS["sd1"])
    kept = {name: shape for name, shape in shapes.items() if "proj_in" not in name and "attn2" not in name}
    assert family_of({**kept, "input_blocks.5.1.transformer_blocks.0.attn2.to_k.weight": (640, width)}) == family


@pytest.mark.parametrize(("hint_channels", "family"), [(64, "sd1"), (192, "sd1"), (256, "sdxl"), (768, "sdxl")])
@pytest.mark.parametrize("width", [320, 32])
@pytest.mark.parametrize("prefix", ["", "adapter."])
def test_t2i_adapters(family_of, hint_channels, family, width, prefix):
    assert family_of(t2i_adapter(hint_channels, width, prefix)) == family


def test_light_t2i_adapters_and_the_style_model(family_of):
    assert family_of(light_t2i_adapter(192)) == "sd1"
    assert family_of({"style_embedding": (1, 8, 1024), "proj": (1024, 768)}) == "sd1"


@pytest.mark.parametrize(
    ("attentions", "width", "family"),
    [(16, 768, "sd1"), (16, 1024, "sd2"), (70, 2048, "sdxl"), (70, 96, "sdxl"), (16, 96, "unknown")],
)
def test_ip_adapters(family_of, attentions, width, family):
    assert family_of(ip_adapter(attentions, width)) == family


def test_ip_adapters_in_a_pickle_of_two_groups(tmp_path):
    groups = {"ip_adapter": {"1.to_k_ip.weight": torch.zeros(4, 768)}, "image_proj": {"proj.weight": torch.zeros(4, 4)}}
    torch.save(groups, tmp_path / "ip.bin")
    assert detect_control_family(tmp_path / "ip.bin") == "sd1"


@pytest.mark.parametrize(
    ("shapes", "family"),
    [
        (lllite("input_blocks_1_1_transformer_blocks_0"), "sd1"),
        (lllite("output_blocks_11_1_transformer_blocks_0"), "sd1"),
        (lllite("output_blocks_0_1_transformer_blocks_0"), "sdxl"),
        (lllite("input_blocks_4_1_transformer_blocks_1"), "sdxl"),
        (lllite("middle_block_1_transformer_blocks_9"), "sdxl"),
        (lllite("input_blocks_4_1_transformer_blocks_0", context_width=768), "sd1"),
        (lllite("input_blocks_4_1_transformer_blocks_0", context_width=2048), "sdxl"),
    ],
    ids=lambda given: next(iter(given)) if isinstance(given, dict) else given,
)
def test_lllite(family_of, shapes, family):
    assert family_of(shapes) == family


def test_sparse_control(family_of):
    shapes = {"down_blocks.0.motion_modules.0.temporal_transformer.norm.weight": (320,)}
    assert family_of({**controlnet("sd1", MODELS["sd1"], compvis=False), **shapes}) == "sd1"


@pytest.mark.parametrize(
    "shapes",
    [{}, encoder_shapes(MODELS["sd1"], True), {"conv_in.weight": (320, 4, 3, 3)}, {"double_blocks.0.x.weight": (4, 4)}],
    ids=["empty", "no hint", "first convolution of a UNet", "Flux"],
)
def test_other_files_are_unknown(family_of, shapes):
    assert family_of(shapes) == "unknown"


def test_a_file_that_is_cut_off_is_named(tmp_path):
    whole = save_shapes(t2i_adapter(192), tmp_path / "lines.safetensors").read_bytes()
    (tmp_path / "lines.safetensors").write_bytes(whole[:100])
    with pytest.raises(WrongFile, match=r"lines\.safetensors"):
        detect_control_family(tmp_path / "lines.safetensors")
