"""Wide models compute what the narrow ones do: they are the same to hosts that norm in 32 groups."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers", reason="needs the extra 'headless'")

import torch
from torch import Tensor, nn

from lib_xadapter.headless.model_files import load_base, load_controlnet, load_upgraded
from lib_xadapter.headless.tokenizers import OPEN_CLIP_PADDING, load_tokenizer
from lib_xadapter.mapping import MappingLayers, layout_for, load_adapter
from lib_xadapter.miniature import architectures, model_files, plugins, webui_files
from lib_xadapter.miniature.webui_files import BASE_WIDENING, UPGRADED_WIDENING, VAE_WIDENING, layers_by_lora_name
from lib_xadapter.miniature.widening import Widening, widened_lora
from tests.miniature.random_models import filled, save_models

GROUPS = 32
"""Of the norms of ldm and sgm."""


@pytest.fixture(autouse=True)
def no_gradients():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def wider(narrow: nn.Module, widening: Widening) -> nn.Module:
    """A module of the same kind with so many channels, empty."""
    config = {name: value for name, value in narrow.config.items() if not name.startswith("_")}
    widths = [widening.copies * width for width in narrow.config.block_out_channels]
    return type(narrow).from_config({**config, "block_out_channels": widths, "norm_num_groups": GROUPS}).eval()


@dataclass(frozen=True)
class World:
    """One of both models."""

    name: str
    widening: Widening

    def unet(self) -> Any:
        return architectures.base_unet() if self.name == "base" else architectures.upgraded_unet()

    def controlnet(self, unet: Any) -> nn.Module:
        return architectures.controlnet(unet) if self.name == "base" else architectures.upgraded_controlnet(unet)

    def given(self, unet: Any) -> dict[str, Any]:
        """Arguments of a call."""
        told = {"encoder_hidden_states": torch.randn(2, 77, unet.config.cross_attention_dim)}
        if self.name == "base":
            return told
        return {**told, "added_cond_kwargs": {"text_embeds": torch.randn(2, 64), "time_ids": 100 * torch.rand(2, 6)}}


@pytest.fixture(params=[World("base", BASE_WIDENING), World("upgraded", UPGRADED_WIDENING)], ids=lambda one: one.name)
def world(request) -> World:
    return request.param


def check(wide: Tensor, narrow: Tensor) -> None:
    assert wide.std() > 0.01
    torch.testing.assert_close(wide, narrow, rtol=1e-3, atol=1e-3)


def test_a_unet_predicts_the_same_with_and_without_its_controlnet(world):
    narrow = filled(world.unet())
    wide = wider(narrow, world.widening)
    wide.load_state_dict(world.widening.tensors(narrow.state_dict()))
    latents, timesteps, given = torch.randn(2, 4, 8, 8), torch.tensor([17, 803]), world.given(narrow)
    alone = narrow(latents, timesteps, **given).sample
    check(wide(latents, timesteps, **given).sample, alone)

    net = filled(world.controlnet(narrow))
    wide_net = wider(net, world.widening)
    wide_net.load_state_dict(world.widening.tensors(net.state_dict()))
    control = torch.rand(2, 3, 64, 64)
    led = []
    for unet, controlnet in ((wide, wide_net), (narrow, net)):
        down, middle = controlnet(latents, timesteps, controlnet_cond=control, return_dict=False, **given)
        added = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        led.append(unet(latents, timesteps, **given, **added).sample)
    check(*led)
    assert not torch.allclose(led[1], alone, atol=0.1)


@pytest.mark.parametrize("style", plugins.FORMATS)
@pytest.mark.parametrize("compvis", [False, True], ids=["diffusers' names", "sgm's names"])
def test_a_lora_of_each_format_changes_the_same(world, style, compvis):
    narrow, form = filled(world.unet()), plugins.FORMATS[style]
    changed = copy.deepcopy(narrow)
    changes = plugins.add_changes(changed, form, 1)
    for weight in changes.parameters():
        nn.init.normal_(weight, std=0.3)
    names = layers_by_lora_name(narrow)
    file = plugins.lora_tensors(changed, changes, compvis)
    lora = widened_lora(file, world.widening, names.__getitem__)
    weights = world.widening.tensors(narrow.state_dict())
    for called in {name.partition(".")[0] for name in file}:
        weights[f"{names[called]}weight"] += difference(lora, called).reshape(weights[f"{names[called]}weight"].shape)
    wide = wider(narrow, world.widening)
    wide.load_state_dict(weights)
    latents, timesteps, given = torch.randn(2, 4, 8, 8), torch.tensor([17, 803]), world.given(narrow)
    check(wide(latents, timesteps, **given).sample, changed(latents, timesteps, **given).sample)


def difference(lora: dict[str, Tensor], called: str) -> Tensor:
    part = {name.removeprefix(f"{called}."): value for name, value in lora.items() if name.startswith(f"{called}.")}
    if "lora_up.weight" in part:
        return part["lora_up.weight"].flatten(1) @ part["lora_down.weight"].flatten(1)
    return (part["hada_w1_a"] @ part["hada_w1_b"]) * (part["hada_w2_a"] @ part["hada_w2_b"])


def test_a_vae_encodes_and_decodes_the_same():
    narrow = filled(architectures.vae("sd1"))
    wide = wider(narrow, VAE_WIDENING)
    wide.load_state_dict(VAE_WIDENING.tensors(narrow.state_dict()))
    picture, latents = 2 * torch.rand(1, 3, 64, 64) - 1, torch.randn(1, 4, 8, 8)
    check(wide.encode(picture).latent_dist.mean, narrow.encode(picture).latent_dist.mean)
    check(wide.decode(latents).sample, narrow.decode(latents).sample)


def test_mapping_layers_write_every_channel_twice():
    base, upgraded = architectures.base_unet(), architectures.upgraded_unet()
    narrow = filled(MappingLayers(layout_for(base, upgraded)))
    wide = MappingLayers(layout_for(wider(base, BASE_WIDENING), wider(upgraded, UPGRADED_WIDENING)))
    wide.load_state_dict(BASE_WIDENING.mapping_layers(narrow.state_dict()))
    features = [torch.randn(1, 48, size, size) for size in (4, 8, 16)]
    found = zip(wide([torch.cat([one, one], 1) for one in features]), narrow(features), strict=True)
    for ours, theirs in found:
        check(ours, torch.cat([theirs, theirs], 1))


@pytest.fixture(scope="module")
def laid_out(tmp_path_factory) -> tuple[Path, Path]:
    """Models as they are made, and as they are laid out for the WebUI."""
    made, webui = tmp_path_factory.mktemp("made"), tmp_path_factory.mktemp("webui")
    save_models(made)
    webui_files.write_for_webui(made, webui)
    return made, webui


@pytest.mark.parametrize(("name", "load"), [(model_files.BASE, load_base), (model_files.UPGRADED, load_upgraded)])
def test_files_for_the_webui_make_the_same_pictures(laid_out, name, load):
    made, webui = laid_out
    narrow = load(made / "Stable-diffusion" / name, torch.float32)
    wide = load(webui / f"models/Stable-diffusion/{name}.safetensors", torch.float32, webui / "models/miniature-clip")
    if name == model_files.UPGRADED:
        # open_clip has CLIP's whole vocabulary
        wide.tokenizer_2 = load_tokenizer(None, OPEN_CLIP_PADDING)
    size = {"width": 64, "height": 64, "num_inference_steps": 2, "output_type": "np"}
    pictures = []
    for pipeline in (wide, narrow):
        pipeline.set_progress_bar_config(disable=True)
        told = pipeline("small red circle left on sky", generator=torch.Generator().manual_seed(3), **size)
        pictures.append(torch.from_numpy(told.images))
    assert pictures[1].std() > 0.02
    torch.testing.assert_close(*pictures, rtol=0, atol=0.05)


def test_controlnets_and_mapping_layers_for_the_webui_fit_its_models(laid_out):
    _, webui = laid_out
    models, tokenizer = webui / "models", webui / "models/miniature-clip"
    base = load_base(models / f"Stable-diffusion/{model_files.BASE}.safetensors", torch.float32, tokenizer)
    upgraded = load_upgraded(models / f"Stable-diffusion/{model_files.UPGRADED}.safetensors", torch.float32, tokenizer)
    for whose, unet in (("", base.unet), ("upgraded-", upgraded.unet)):
        load_controlnet(models / f"ControlNet/miniature-{whose}edges.safetensors", unet, torch.float32)
    layers = load_adapter(models / "X-Adapter/miniature.safetensors")
    assert {**layers.state_dict()}.keys() == MappingLayers(layout_for(base.unet, upgraded.unet)).state_dict().keys()
