"""A LoRA is known by its names and shapes: every format, naming and part of the model, whatever the metadata."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from lib_xadapter.errors import WrongFile
from lib_xadapter.lora_files import detect_lora_base
from tests import lora_formats as formats
from tests.lora_formats import (
    BLIND_TO_THE_CONTEXT,
    FORMATS,
    MODELS,
    NARROW_MODELS,
    Layer,
    file_of,
    text_file,
    unet_file,
)

LIES = {
    "sd1": {"ss_base_model_version": "sdxl_base_v1-0", "ss_v2": "False"},
    "sd2": {"ss_base_model_version": "sd_v1-5", "ss_v2": "False"},
    "sdxl": {"ss_base_model_version": "sd_v2", "ss_v2": "True"},
}
SHARED_LAYER = Layer("mid_block.attentions.0.transformer_blocks.0.attn1.to_q", 1280, 1280)
EVERY_MODEL = pytest.mark.parametrize("model", MODELS)
EVERY_FORMAT = pytest.mark.parametrize("form", FORMATS)


@pytest.fixture
def detected(tmp_path):
    """What a file with the given tensors is taken for."""

    def detect(shapes, metadata=None):
        return detect_lora_base(formats.save_shapes(shapes, tmp_path / "lora.safetensors", metadata))

    return detect


@EVERY_MODEL
@EVERY_FORMAT
@pytest.mark.parametrize("metadata", [None, LIES], ids=["without-metadata", "with-metadata-that-lie"])
def test_unet_and_text_encoders(detected, model, form, metadata):
    shapes = unet_file(MODELS[model], FORMATS[form]) | text_file(MODELS[model], FORMATS[form])
    assert detected(shapes, metadata and metadata[model]) == model


@EVERY_MODEL
@EVERY_FORMAT
@pytest.mark.parametrize("naming", ["kohya", "compvis"])
def test_unet_only(detected, model, form, naming):
    # without anything of the context's width SD2 cannot be told from SD1, which is far more common
    expected = "sd1" if model == "sd2" and form in BLIND_TO_THE_CONTEXT else model
    assert detected(unet_file(MODELS[model], FORMATS[form], getattr(formats, naming))) == expected


@EVERY_MODEL
def test_the_names_of_the_webuis_own_modules(detected, model):
    assert detected(unet_file(MODELS[model], formats.lora, formats.webui)) == model


@pytest.mark.parametrize("model", ["sd1", "sdxl"])
def test_kohyas_names_of_oft(detected, model):
    assert detected(unet_file(MODELS[model], formats.oft, formats.kohya_oft)) == model


@EVERY_MODEL
@EVERY_FORMAT
def test_text_encoders_only(detected, model, form):
    assert detected(text_file(MODELS[model], FORMATS[form])) == model


@EVERY_MODEL
@pytest.mark.parametrize("form", ["diffusers_lora", "peft_lora", "peft_dora"])
@pytest.mark.parametrize("naming", ["diffusers", "peft"])
@pytest.mark.parametrize("with_text", [True, False])
def test_names_of_diffusers_and_peft(detected, model, form, naming, with_text):
    make = getattr(formats, form)
    shapes = unet_file(MODELS[model], make, getattr(formats, naming))
    if with_text:
        shapes |= text_file(MODELS[model], make, formats.diffusers_text)
    assert detected(shapes) == model


@EVERY_MODEL
def test_text_encoders_under_the_names_of_diffusers(detected, model):
    assert detected(text_file(MODELS[model], formats.peft_lora, formats.diffusers_text)) == model


@EVERY_MODEL
@EVERY_FORMAT
@pytest.mark.parametrize("naming", ["kohya", "compvis"])
def test_narrow_models_are_known_by_their_structure(detected, model, form, naming):
    shapes = unet_file(NARROW_MODELS[model], FORMATS[form], getattr(formats, naming))
    shapes |= text_file(NARROW_MODELS[model], FORMATS[form])
    assert detected(shapes) == model


@pytest.mark.parametrize("targets", [("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out"), ("to_q", "to_v")])
def test_narrow_sd15_lora_with_kohyas_names(detected, targets):
    layers = [layer for layer in NARROW_MODELS["sd1"].unet_layers() if layer.name.endswith(targets)]
    assert detected(file_of(layers, formats.lora, formats.kohya)) == "sd1"


def test_narrow_sdxl_lora_of_its_transformers_with_compvis_names(detected):
    layers = [layer for layer in NARROW_MODELS["sdxl"].unet_layers() if "transformer_blocks" in layer.name]
    assert detected(file_of(layers, formats.lora, formats.compvis)) == "sdxl"


# one layer that tells: where it stands, how deep, how wide, how many dimensions
SINGLE_LAYERS = [
    ("sd1", Layer("down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k", 320, 768)),
    ("sd2", Layer("down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k", 320, 1024)),
    ("sd1", Layer("up_blocks.3.attentions.2.transformer_blocks.0.attn2.to_v", 320, 768)),
    ("sd1", Layer("mid_block.attentions.0.transformer_blocks.0.attn2.to_k", 1280, 768)),
    ("sd2", Layer("mid_block.attentions.0.transformer_blocks.0.attn2.to_k", 1280, 1024)),
    ("sdxl", Layer("mid_block.attentions.0.transformer_blocks.0.attn2.to_k", 1280, 2048)),
    ("sdxl", Layer("mid_block.attentions.0.transformer_blocks.9.attn1.to_q", 1280, 1280)),
    ("sdxl", Layer("down_blocks.1.attentions.1.transformer_blocks.1.attn1.to_q", 640, 640)),
    ("sdxl", Layer("up_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", 1280, 1280)),
    ("sdxl", Layer("up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", 640, 640)),
    ("sd1", Layer("up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", 1280, 1280)),
    ("sdxl", Layer("up_blocks.1.attentions.0.transformer_blocks.0.ff.net.0.proj", 5120, 640)),
    ("sd1", Layer("up_blocks.1.attentions.0.transformer_blocks.0.ff.net.2", 1280, 5120)),
    ("sdxl", Layer("up_blocks.2.resnets.0.conv2", 320, 320, 3)),
    ("sd1", Layer("up_blocks.2.resnets.0.conv2", 640, 640, 3)),
    ("sd1", Layer("down_blocks.3.resnets.0.conv2", 1280, 1280, 3)),
    ("sd1", Layer("down_blocks.2.downsamplers.0.conv", 1280, 1280, 3)),
    ("sd1", Layer("mid_block.attentions.0.proj_in", 1280, 1280, 1)),
    ("sd2", Layer("up_blocks.3.attentions.0.proj_out", 320, 320)),
]


@pytest.mark.parametrize(("model", "layer"), SINGLE_LAYERS, ids=lambda value: getattr(value, "name", value))
@pytest.mark.parametrize("naming", ["kohya", "compvis", "diffusers", "webui"])
def test_one_layer_is_enough_where_it_tells(detected, model, layer, naming):
    assert detected(file_of([layer], formats.lora, getattr(formats, naming))) == model


@pytest.mark.parametrize("form", [form for form in FORMATS if form not in BLIND_TO_THE_CONTEXT])
@pytest.mark.parametrize(("model", "width"), [("sd1", 768), ("sd2", 1024), ("sdxl", 2048)])
def test_the_context_width_is_read_from_every_format_that_has_it(detected, form, model, width):
    layer = Layer("mid_block.attentions.0.transformer_blocks.0.attn2.to_k", 1280, width)
    assert detected(file_of([layer], FORMATS[form], formats.kohya)) == model


def test_ia3_that_scales_the_input_of_cross_attention_tells_the_context_width(detected):
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    assert detected({f"{name}.weight": (1024,), f"{name}.on_input": ()}) == "sd2"


@pytest.mark.parametrize("form", ["lora", "dora_of_loha", "full", "glora", "lokr_whole", "ia3_of_convolutions"])
def test_a_convolution_into_the_transformer_is_sd1s_in_every_format_that_shows_it(detected, form):
    name, layer = "lora_unet_mid_block_attentions_0_proj_in", Layer("proj_in", 1280, 1280, 1)
    special = {
        "dora_of_loha": formats.loha(layer) | {"dora_scale": (1280, 1, 1, 1)},
        "ia3_of_convolutions": {"weight": (1, 1280, 1, 1), "on_input": ()},
    }
    parameters = special[form] if form in special else FORMATS[form](layer)
    assert detected({f"{name}.{parameter}": shape for parameter, shape in parameters.items()}) == "sd1"


def test_flattened_projections_of_sd1_are_not_taken_for_sd2(detected):
    layers = [
        Layer(layer.name, layer.out_width, layer.in_width) for layer in MODELS["sd1"].unet_layers() if layer.kernel != 0
    ]
    assert detected(file_of(layers, formats.lora, formats.kohya)) == "sd1"


def test_a_layer_that_all_models_share_is_sdxls_under_the_names_that_kohya_gives_sdxl(detected):
    assert detected(file_of([SHARED_LAYER], formats.lora, formats.compvis)) == "sdxl"


def test_attention_layers_of_one_transformer_block_each_are_sd1s(detected):
    names = [f"down_blocks.{level}.attentions.0.transformer_blocks.0.attn1.to_q" for level in (1, 2)]
    assert detected(file_of([Layer(name, 64, 64) for name in names], formats.lora, formats.kohya)) == "sd1"


@pytest.mark.parametrize("layer", ["label_emb.0.0", "add_embedding.linear_1"])
def test_the_size_embedding_is_sdxls(detected, layer):
    assert detected(file_of([Layer(layer, 1280, 2816)], formats.lora, formats.kohya)) == "sdxl"


def test_layers_of_older_diffusers_attention_processors(detected):
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_k_lora"
    assert detected({f"{name}.down.weight": (4, 1024), f"{name}.up.weight": (1280, 4)}) == "sd2"


def test_adapter_names_inside_pefts_keys(detected):
    name = "base_model.model.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    assert detected({f"{name}.lora_A.default.weight": (4, 2048), f"{name}.lora_B.default.weight": (1280, 4)}) == "sdxl"


class TestTextEncoders:
    @pytest.mark.parametrize(
        ("prefix", "width", "model"),
        [
            ("lora_te_", 768, "sd1"),
            ("lora_te_", 1024, "sd2"),
            ("lora_te1_", 768, "sdxl"),
            ("lora_te1_", 1024, "sd2"),
            ("lora_te2_", 1280, "sdxl"),
            ("text_encoder_", 768, "sd1"),
            ("text_encoder_2_", 1280, "sdxl"),
            ("0_transformer_", 768, "sdxl"),
            ("transformer_", 768, "sd1"),
        ],
    )
    def test_one_layer(self, detected, prefix, width, model):
        layer = Layer("text_model_encoder_layers_0_self_attn_q_proj", width, width)
        assert detected(file_of([layer], formats.lora, prefix.__add__)) == model

    @pytest.mark.parametrize(("prefix", "model"), [("", "sd2"), ("1_", "sdxl")])
    def test_the_webuis_names_of_open_clip(self, detected, prefix, model):
        name = f"{prefix}model_transformer_resblocks_3_mlp_c_fc"
        assert detected({f"{name}.lora_down.weight": (4, 1024), f"{name}.lora_up.weight": (4096, 4)}) == model

    def test_a_numbered_text_encoder_beside_an_sd1_unet_is_sd1s(self, detected):
        text = file_of(MODELS["sd1"].text_layers(0), formats.lora, formats.kohya_text(0))
        assert detected(unet_file(MODELS["sd1"], formats.lora) | text) == "sd1"

    def test_layers_beyond_the_twelfth_are_sd2s_at_any_width(self, detected):
        layers = list(NARROW_MODELS["sd2"].text_layers(0))
        assert detected(file_of(layers, formats.lora, formats.kohya_text(None))) == "sd2"

    def test_text_encoders_without_the_level_text_model(self, detected):
        layer = Layer("encoder.layers.3.mlp.fc1", 4096, 1024)
        assert detected(file_of([layer], formats.peft_lora, "text_encoder.".__add__)) == "sd2"


class TestBundledEmbeddings:
    @pytest.mark.parametrize("vector", ["emb_params", "string_to_param.*"])
    @pytest.mark.parametrize(("width", "model"), [(768, "sd1"), (1024, "sd2"), (64, "unknown")])
    def test_alone_they_are_known_by_their_width(self, detected, vector, width, model):
        assert detected({f"bundle_emb.my-style.{vector}": (3, width)}) == model

    def test_vectors_for_two_text_encoders_are_sdxls(self, detected):
        assert detected({"bundle_emb.style.clip_l": (2, 768), "bundle_emb.style.clip_g": (2, 1280)}) == "sdxl"

    def test_they_tell_sd2_from_sd1_where_the_layers_do_not(self, detected):
        layers = unet_file(MODELS["sd2"], formats.ia3)
        assert detected(layers | {"bundle_emb.style.emb_params": (1, 1024)}) == "sd2"


class TestUnknown:
    def test_an_empty_file(self, detected):
        assert detected({}) == "unknown"

    def test_a_layer_that_all_models_share(self, detected):
        assert detected(file_of([SHARED_LAYER], formats.lora, formats.kohya)) == "unknown"

    @pytest.mark.parametrize(
        "layer",
        [
            "lora_unet_joint_blocks_0_context_block_attn_qkv",
            "lora_unet_double_blocks_0_img_attn_qkv",
            "lora_unet_single_blocks_3_linear1",
            "lora_unet_blocks_0_self_attn_q",
            "lora_transformer_transformer_blocks_0_attn_to_q",
            "transformer.single_transformer_blocks.0.attn.to_q",
            "transformer.transformer_blocks.0.attn.to_q",
            "base_model.model.transformer_blocks.0.attn1.to_q",
            "diffusion_model.layers.0.attention.qkv",
            "lora_te3_encoder_block_0_layer_0_SelfAttention_q",
        ],
    )
    def test_layers_of_other_models_beside_clips(self, detected, layer):
        clip = file_of(MODELS["sdxl"].text_layers(0), formats.lora, formats.kohya_text(0))
        assert detected(clip | {f"{layer}.lora_A.weight": (4, 1536), f"{layer}.lora_B.weight": (1536, 4)}) == "unknown"

    def test_text_encoders_that_are_no_clip(self, detected):
        name = "lora_te_layers_0_self_attn_q_proj"
        assert detected({f"{name}.lora_down.weight": (4, 768), f"{name}.lora_up.weight": (768, 4)}) == "unknown"

    def test_parts_of_different_models(self, detected):
        sd1 = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
        sdxl = "lora_unet_up_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
        shapes = {f"{name}.lora_{half}.weight": (4, 4) for name in (sd1, sdxl) for half in ("down", "up")}
        assert detected(shapes) == "unknown"

    def test_the_refiner_which_has_depth_and_four_levels(self, detected):
        refiner = formats.Model((384, 768, 1536, 1536), (0, 4, 4, 0), 1280, True, ())
        assert detected(unet_file(refiner, formats.lora, formats.compvis)) == "unknown"

    def test_a_whole_checkpoint(self, detected):
        layers = MODELS["sd1"].unet_layers()
        names = ("model.diffusion_model." + formats.compvis_name(layer.name) + ".weight" for layer in layers)
        assert detected(dict.fromkeys(names, (8, 8))) == "unknown"

    def test_the_metadata_of_a_file_that_does_not_tell(self, detected):
        assert detected({"a.lora_down.weight": (4, 768)}, {"ss_base_model_version": "sd_v1-5"}) == "unknown"

    @pytest.mark.parametrize("shape", [(), (0,), (4,), (4, 4, 4)])
    def test_tensors_of_a_wrong_number_of_dimensions(self, detected, shape):
        name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
        for make in FORMATS.values():
            assert detected({f"{name}.{parameter}": shape for parameter in make(Layer(name, 1280, 768))}) == "unknown"


def test_a_lora_in_a_pickle(tmp_path):
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    path = tmp_path / "lora.pt"
    torch.save({f"{name}.lora_down.weight": torch.zeros(2, 768), f"{name}.lora_up.weight": torch.zeros(320, 2)}, path)
    assert detect_lora_base(path) == "sd1"


def test_only_the_header_is_read(tmp_path, monkeypatch):
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    path = tmp_path / "lora.safetensors"
    save_file({f"{name}.lora_down.weight": torch.zeros(2, 768), f"{name}.lora_up.weight": torch.zeros(320, 2)}, path)
    monkeypatch.setattr(torch, "load", None)
    monkeypatch.setattr("safetensors.safe_open", None)
    assert detect_lora_base(str(path)) == "sd1"


def test_a_file_that_is_cut_off_is_named(tmp_path):
    path = formats.save_shapes(unet_file(MODELS["sd1"], formats.lora), tmp_path / "style.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(WrongFile, match=r"style\.safetensors is cut off"):
        detect_lora_base(path)


@pytest.mark.parametrize(
    ("model", "targets"), [("sd1", ["to_k", "proj_in"]), ("sd1", ["to_q"]), ("sdxl", ["to_k", "to_v"])]
)
def test_a_lora_that_diffusers_saved(tmp_path, model, targets):
    pytest.importorskip("diffusers")
    peft = pytest.importorskip("peft")
    from tests.small_unets import base_unet, upgraded_unet

    unet = base_unet() if model == "sd1" else upgraded_unet()
    unet.add_adapter(peft.LoraConfig(r=2, target_modules=targets))
    unet.save_lora_adapter(tmp_path)
    assert detect_lora_base(tmp_path / "pytorch_lora_weights.safetensors") == model
