"""`XAdapterPipeline` with what a base's own pipeline can carry: each acts, and is as it was when the call is over."""

from __future__ import annotations

import inspect

import pytest
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionXLControlNetPipeline,
    T2IAdapter,
)
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from lib_xadapter.headless import XAdapterPipeline
from lib_xadapter.headless.model_files import load_controlnet
from tests.headless.test_composed import Hooks, differs, latents, seeded
from tests.pictures import control_map
from tests.small_models import BASE_CHANNELS, TEXT_WIDTH
from tests.small_models import seeded as with_seeded_weights

SMALL = {"width": 64, "height": 64, "num_inference_steps": 2}
IMAGE_WIDTH = 16


@pytest.fixture(scope="module")
def plain(pipe) -> Tensor:
    return latents(pipe, **SMALL)


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return control_map(64)


def with_base(pipe: XAdapterPipeline, kind: type, **parts) -> XAdapterPipeline:
    """The same models, the base in a pipeline of another kind."""
    known = inspect.signature(kind).parameters
    own = {name: part for name, part in pipe.base.components.items() if name in known}
    base = kind(**own, **parts, requires_safety_checker=False)
    base.set_progress_bar_config(disable=True)
    return XAdapterPipeline(base, pipe.upgraded, pipe.adapter)


def check_acts(pipe: XAdapterPipeline, plain: Tensor, **given) -> Tensor:
    """The plugin changes the picture in both memory modes alike, and the call leaves everything as it was."""
    hooks = Hooks(pipe)
    made = latents(pipe, **SMALL, **given)
    assert differs(made, plain)
    assert torch.equal(latents(pipe, memory="recorded", **SMALL, **given), made)
    assert hooks.are_as_before()
    return made


# --- ControlNets and T2I-Adapters -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def controlnet(pipe, small):
    return load_controlnet(small.controlnet, pipe.base.unet, torch.float32)


def test_several_controlnets_add_up_each_with_its_scale_and_window(pipe, plain, controlnet, picture):
    two = with_base(pipe, StableDiffusionControlNetPipeline, controlnet=[controlnet, controlnet])
    one = with_base(pipe, StableDiffusionControlNetPipeline, controlnet=controlnet)
    turned = picture.rotate(90)
    both = check_acts(
        two, plain, control_image=[picture, turned], base_arguments={"controlnet_conditioning_scale": [1.0, 0.5]}
    )
    first = latents(one, control_image=picture, **SMALL)
    assert differs(both, first)
    for off in ({"controlnet_conditioning_scale": [1.0, 0.0]}, {"control_guidance_end": [1.0, 0.1]}):
        made = latents(two, control_image=[picture, turned], base_arguments=off, **SMALL)
        assert torch.allclose(made, first, atol=1e-4)


@pytest.mark.parametrize("count", [1, 2])
def test_t2i_adapters(pipe, plain, picture, count):
    adapters = [
        with_seeded_weights(T2IAdapter(3, list(BASE_CHANNELS), 2, 8, "full_adapter"), f"t2i.{place}", gain=1.5)
        for place in range(count)
    ]
    led = with_base(pipe, StableDiffusionAdapterPipeline, adapter=adapters if count > 1 else adapters[0])
    images = picture if count == 1 else [picture, picture.rotate(90)]
    on, off = ({"adapter_conditioning_scale": scale if count == 1 else [scale] * 2} for scale in (1.0, 0.0))
    check_acts(led, plain, control_image=images, base_arguments=on)
    assert torch.allclose(latents(led, control_image=images, base_arguments=off, **SMALL), plain, atol=1e-4)


# --- IP-Adapter -------------------------------------------------------------------------------------------------------


def ip_adapter_weights(unet: nn.Module) -> dict[str, dict[str, Tensor]]:
    """In the layout of the published files, for the whole image."""
    drawn = torch.Generator().manual_seed(6)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=drawn) / shape[-1] ** 0.5

    tokens = 4
    projection = {
        "proj.weight": normal(tokens * TEXT_WIDTH, IMAGE_WIDTH),
        "proj.bias": torch.zeros(tokens * TEXT_WIDTH),
        "norm.weight": torch.ones(TEXT_WIDTH),
        "norm.bias": torch.zeros(TEXT_WIDTH),
    }
    crossed = [name for name in unet.attn_processors if "attn2" in name]
    attention = {}
    for place, name in enumerate(crossed):
        width = unet.get_submodule(name.removesuffix(".processor")).to_q.out_features
        for part in ("to_k_ip", "to_v_ip"):
            attention[f"{2 * place + 1}.{part}.weight"] = 3 * normal(width, TEXT_WIDTH)
    return {"image_proj": projection, "ip_adapter": attention}


@pytest.fixture
def with_ip_adapter(small) -> XAdapterPipeline:
    made = XAdapterPipeline.from_single_file(
        base=small.base, upgraded=small.upgraded, adapter=small.adapter, tokenizer=small.tokenizer
    )
    made.set_progress_bar_config(disable=True)
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=16,
        projection_dim=IMAGE_WIDTH,
    )  # fmt: skip
    encoder = with_seeded_weights(CLIPVisionModelWithProjection(config), "image encoder", gain=1.5)
    size = {"height": 32, "width": 32}
    made.base.register_modules(
        image_encoder=encoder, feature_extractor=CLIPImageProcessor(size=size, crop_size=size, do_center_crop=False)
    )
    weights = ip_adapter_weights(made.base.unet)
    made.base.load_ip_adapter(weights, subfolder=None, weight_name=None, image_encoder_folder=None)
    return made


def test_an_ip_adapter(with_ip_adapter, plain, picture):
    check_acts(with_ip_adapter, plain, ip_adapter_image=picture)
    with_ip_adapter.base.set_ip_adapter_scale(0.0)
    assert torch.allclose(latents(with_ip_adapter, ip_adapter_image=picture, **SMALL), plain, atol=1e-4)
    with_ip_adapter.base.unload_ip_adapter()
    assert torch.allclose(latents(with_ip_adapter, **SMALL), plain, atol=1e-4)


def test_an_ip_adapters_image_as_embeddings(with_ip_adapter, picture):
    embeds = with_ip_adapter.base.prepare_ip_adapter_image_embeds(picture, None, "cpu", 1, True)
    given = {"base_arguments": {"ip_adapter_image_embeds": embeds}}
    made = latents(with_ip_adapter, **SMALL, **given)
    assert torch.equal(made, latents(with_ip_adapter, ip_adapter_image=picture, **SMALL))


# --- LoRAs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def own_pipe(small) -> XAdapterPipeline:
    """One whose layers may be changed."""
    made = XAdapterPipeline.from_single_file(
        base=small.base, upgraded=small.upgraded, adapter=small.adapter, tokenizer=small.tokenizer
    )
    made.set_progress_bar_config(disable=True)
    return made


def peft_kinds():
    peft = pytest.importorskip("peft", reason="diffusers loads LoRAs by it")
    layers = {"target_modules": ["to_q", "to_v"]}
    return {
        "LoRA": peft.LoraConfig(r=4, init_lora_weights=False, **layers),
        "DoRA": peft.LoraConfig(r=4, init_lora_weights=False, use_dora=True, **layers),
        "LoHa": peft.LoHaConfig(r=4, init_weights=False, **layers),
        "LoKr": peft.LoKrConfig(r=4, init_weights=False, **layers),
    }


@pytest.mark.parametrize(("part", "kind"), [("base", "DoRA"), ("base", "LoHa"), ("base", "LoKr"), ("upgraded", "LoRA")])
def test_adapters_of_peft(own_pipe, plain, part, kind):
    torch.manual_seed(3)
    unet = getattr(own_pipe, part).unet
    unet.add_adapter(peft_kinds()[kind], adapter_name="style")
    check_acts(own_pipe, plain)
    unet.disable_adapters()
    assert torch.allclose(latents(own_pipe, **SMALL), plain, atol=1e-4)


def test_several_loras_with_weights(own_pipe, plain, small):
    pytest.importorskip("peft", reason="diffusers loads LoRAs by it")
    for name in ("one", "other"):
        own_pipe.base.load_lora_weights(str(small.lora.parent), weight_name=small.lora.name, adapter_name=name)
    own_pipe.base.set_adapters(["one", "other"], [0.5, 0.25])
    both = check_acts(own_pipe, plain)
    own_pipe.base.set_adapters(["one"], [0.75])
    assert torch.allclose(latents(own_pipe, **SMALL), both, atol=1e-3)
    own_pipe.base.fuse_lora()
    assert torch.allclose(latents(own_pipe, **SMALL), both, atol=1e-3)


# --- the pipelines' own guidance and precision -----------------------------------------------------------------------


def test_freeu_goes_with_the_pipeline(own_pipe, plain):
    for pipeline in (own_pipe.base, own_pipe.upgraded):
        pipeline.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
        check_acts(own_pipe, plain)
        pipeline.disable_freeu()
        assert torch.equal(latents(own_pipe, **SMALL), plain)


def test_perturbed_attention_guidance_of_the_base(pipe, plain):
    """Its batches have rows that the upgraded model has not. Further in, there is one pixel to attend to."""
    led = with_base(pipe, StableDiffusionPAGPipeline, pag_applied_layers=["down_blocks.0"])
    check_acts(led, plain, base_arguments={"pag_scale": 6.0})


def test_weights_kept_in_eight_bits(own_pipe, plain):
    """Diffusers' layerwise casting, as for GPUs with little memory."""
    for pipeline in (own_pipe.base, own_pipe.upgraded):
        pipeline.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    made = check_acts(own_pipe, plain)
    assert float((made - plain).norm() / plain.norm()) < 0.5
    assert any(weight.dtype == torch.float8_e4m3fn for weight in own_pipe.base.unet.parameters())


def test_quantised_linear_layers(own_pipe, plain):
    """In int8 by torch's own quantisation, which takes the place of the layers."""
    for pipeline in (own_pipe.base, own_pipe.upgraded):
        quantised = torch.ao.quantization.quantize_dynamic(pipeline.unet, {nn.Linear}, dtype=torch.qint8)
        pipeline.register_modules(unet=quantised)
    made = latents(own_pipe, **SMALL)
    assert differs(made, plain)
    assert float((made - plain).norm() / plain.norm()) < 0.5


def by_torchao(unet: nn.Module) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(unet, quantization.Int8WeightOnlyConfig())


def by_quanto(unet: nn.Module) -> None:
    quanto = pytest.importorskip("optimum.quanto")
    quanto.quantize(unet, weights=quanto.qint8)
    quanto.freeze(unet)


@pytest.mark.parametrize("quantise", [by_torchao, by_quanto])
def test_weights_quantised_by_the_libraries_that_diffusers_names(own_pipe, plain, quantise):
    for pipeline in (own_pipe.base, own_pipe.upgraded):
        quantise(pipeline.unet)
    made = latents(own_pipe, **SMALL)
    assert differs(made, latents(own_pipe, weight=0.0, **SMALL))
    assert 0 < float((made - plain).norm() / plain.norm()) < 0.1


def test_vae_tiling_and_slicing_take_part(own_pipe):
    given = {"width": 128, "height": 128, "num_inference_steps": 1, "generator": seeded(), "output_type": "np"}
    whole = own_pipe("a cat", **given).images
    for pipeline in (own_pipe.base, own_pipe.upgraded):
        pipeline.vae.enable_slicing()
        pipeline.vae.enable_tiling()
        pipeline.vae.tile_sample_min_size, pipeline.vae.tile_latent_min_size = 64, 8
    given["generator"] = seeded()
    tiled = own_pipe("a cat", **given).images
    assert tiled.shape == whole.shape
    assert 0 < abs(tiled - whole).max()


# --- the upgraded model's own plugins ---------------------------------------------------------------------------------


def test_a_controlnet_of_the_upgraded_model_acts_beside_the_base(own_pipe, plain, picture):
    """Remix: each model with plugins of its own."""
    net = ControlNetModel.from_unet(own_pipe.upgraded.unet)
    with torch.no_grad():
        for layer in (*net.controlnet_down_blocks, net.controlnet_mid_block):
            layer.weight.normal_(std=0.3, generator=torch.Generator().manual_seed(3))
    both = {**own_pipe.upgraded.components, "controlnet": net, "add_watermarker": False}
    led = XAdapterPipeline(own_pipe.base, StableDiffusionXLControlNetPipeline(**both), own_pipe.adapter)
    led.set_progress_bar_config(disable=True)
    given = {"image": picture.resize((64, 64)), "controlnet_conditioning_scale": 1.0}
    made = check_acts(led, plain, upgraded_arguments=given)
    assert differs(made, latents(led, weight=0.0, upgraded_arguments=given, **SMALL))
    off = {**given, "controlnet_conditioning_scale": 0.0}
    assert torch.allclose(latents(led, upgraded_arguments=off, **SMALL), plain, atol=1e-4)
