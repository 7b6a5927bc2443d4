"""Miniature models with random weights by which every layer matters, in their files."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from lib_xadapter.mapping import MappingLayers, layout_for, save_adapter
from lib_xadapter.miniature import architectures, model_files, plugins
from lib_xadapter.miniature.denoising import Denoiser
from lib_xadapter.miniature.vocabulary import write_tokenizer

LORAS = {"palette": "base", "lines": "base", "pattern": "base", "upgraded-palette": "upgraded"}
"""Name of the file, after "miniature-" → whose."""


@torch.no_grad()
def filled(module: nn.Module) -> nn.Module:
    """A module with weights by which every layer matters."""
    for name, weight in module.named_parameters():
        nn.init.normal_(weight, std=1.5 / weight[0].numel() ** 0.5 if weight.ndim > 1 else 0.3)
        if "norm" in name and name.endswith("weight"):
            weight += 1
    return module.eval()


def save_models(folder: Path) -> None:
    """Both models, ControlNets, LoRAs and mapping layers, laid out as `miniature` lays them out."""
    torch.manual_seed(1)
    write_tokenizer(folder / "tokenizer")
    base, upgraded = filled(architectures.base_unet()), filled(architectures.upgraded_unet())
    unets = {"base": base, "upgraded": upgraded}
    nets = {"edges": architectures.controlnet(base), "upgraded-edges": architectures.upgraded_controlnet(upgraded)}
    for name, net in nets.items():
        filled(net).half().save_pretrained(folder / "ControlNet" / f"miniature-{name}")
    for name, whose in LORAS.items():
        path = folder / "Lora" / f"miniature-{name}.safetensors"
        model_files.save_half(path, _lora(unets[whose], name.removeprefix("upgraded-"), whose == "upgraded"))
    (folder / "X-Adapter").mkdir()
    layers = filled(MappingLayers(layout_for(base, upgraded))).half()
    save_adapter(layers, folder / "X-Adapter/miniature.safetensors")
    for name, unet, text, family in (
        (model_files.BASE, base, architectures.BaseText(), "sd1"),
        (model_files.UPGRADED, upgraded, architectures.UpgradedText(), "sdxl"),
    ):
        denoiser, vae = Denoiser(unet, filled(text)), filled(architectures.vae(family))
        model_files.save_model(folder / "Stable-diffusion" / name, denoiser, vae, folder / "tokenizer")


def _lora(unet: nn.Module, style: str, compvis: bool) -> dict[str, torch.Tensor]:
    changed = type(unet).from_config(unet.config)
    changes = plugins.add_changes(changed, plugins.FORMATS[style], 1)
    for weight in changes.parameters():
        nn.init.normal_(weight, std=0.3)
    return plugins.lora_tensors(changed, changes, compvis)
