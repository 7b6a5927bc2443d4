"""LoRAs merged into the weights of the model that they were made for.

Which model that is, `lib_xadapter.detect_lora_base` tells. Every tensor of a file must find its layer: a LoRA that goes
in by halves, or not at all, would be a picture that looks right and is not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor, nn

from ..errors import DoesNotFit, WrongFile
from ..lora_files import detect_lora_base
from ..lora_layers import BUNDLED_EMBEDDING, split_key, without_prefix
from ..mapping import read_weights
from .lora_names import Lora
from .model_files import check_finite, unet_table_of

Factors = Mapping[str, Tensor]

LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
PARAMETERS = ("down", "up", "lora_mid_weight", "alpha", *LOHA, "diff")
"""Those that are read here, as `lora_layers.split_key` calls them."""


def merge_lora(lora: Lora, base: StableDiffusionPipeline, upgraded: StableDiffusionXLPipeline) -> str:
    """Merge a LoRA into the model it was made for; gives "base" or "upgraded".

    Raises:
        WrongFile: the file is no LoRA for SD1.5 or SDXL, or of a kind that is not read here.
        DoesNotFit: a tensor finds no layer, or one of another shape.
    """
    found = detect_lora_base(lora.path)
    if found not in ("sd1", "sdxl"):
        raise WrongFile(f"{lora.path.name} is no LoRA for SD1.5 or SDXL as far as its keys and shapes tell ({found}).")
    layers = _layers_of(base) if found == "sd1" else _layers_of(upgraded)
    file = read_weights(lora.path)
    check_finite(file, lora.path.name)
    changes = [_change(name, factors, layers, lora.path.name) for name, factors in _by_layer(file, lora).items()]
    with torch.no_grad():
        for layer, delta in changes:
            layer.weight += (lora.weight * delta).reshape(layer.weight.shape).to(layer.weight)
    return "base" if found == "sd1" else "upgraded"


def _by_layer(file: Mapping[str, Tensor], lora: Lora) -> dict[str, dict[str, Tensor]]:
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in file.items():
        if BUNDLED_EMBEDDING.fullmatch(key):
            continue
        layer, parameter = split_key(key) or (key, "")
        if parameter not in PARAMETERS:
            raise WrongFile(
                f"{lora.path.name} holds '{key}', of a kind that is read only in the WebUI; "
                "here LoRA, LoCon, LoHa and full differences are."
            )
        layers.setdefault(layer, {})[parameter] = tensor.float()
    return layers


def _change(name: str, factors: Factors, layers: Mapping[str, nn.Module], file_name: str) -> tuple[nn.Module, Tensor]:
    layer = layers.get(_spelled(name))
    if layer is None:
        raise DoesNotFit(f"{file_name}: there is no layer for '{name}' in the model that the LoRA was made for.")
    delta = next((_delta(factors) for needed, _delta in KINDS if needed <= factors.keys()), None)
    if delta is None:
        raise WrongFile(f"{file_name}: '{name}' has only {', '.join(sorted(factors))}.")
    if delta.numel() != layer.weight.numel() or delta.shape[0] != layer.weight.shape[0]:
        found, expected = ("x".join(map(str, shape)) for shape in (delta.shape, layer.weight.shape))
        raise DoesNotFit(f"{file_name}: '{name}' changes a weight of {found}, the model's is {expected}.")
    return layer, delta


def _lora_delta(factors: Factors) -> Tensor:
    """up · down · alpha / rank, through the middle convolution where there is one."""
    down, up = factors["down"], factors["up"]
    scale = _scale(factors, rank=down.shape[0])
    if "lora_mid_weight" in factors:
        return scale * torch.einsum("or,rshw,si->oihw", up.flatten(1), factors["lora_mid_weight"], down.flatten(1))
    return scale * (up.flatten(1) @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])


def _loha_delta(factors: Factors) -> Tensor:
    """(w1_a · w1_b) ∘ (w2_a · w2_b) · alpha / rank."""
    first, second = (factors[f"hada_w{n}_a"] @ factors[f"hada_w{n}_b"] for n in (1, 2))
    return _scale(factors, rank=factors["hada_w1_b"].shape[0]) * first * second


def _full_delta(factors: Factors) -> Tensor:
    return factors["diff"]


def _scale(factors: Factors, rank: int) -> float:
    return float(factors["alpha"]) / rank if "alpha" in factors else 1.0


KINDS: tuple[tuple[set[str], Callable[[Factors], Tensor]], ...] = (
    ({"down", "up"}, _lora_delta),
    (set(LOHA), _loha_delta),
    ({"diff"}, _full_delta),
)


def _layers_of(pipeline: StableDiffusionPipeline | StableDiffusionXLPipeline) -> dict[str, nn.Module]:
    """Every layer by each of its names: diffusers' and CompVis' for the UNet, numbered or not for text encoders."""
    layers: dict[str, nn.Module] = {}
    table = unet_table_of(pipeline.unet)
    for name, module in _weighted(pipeline.unet):
        compvis = table(f"{name}.weight").name.removesuffix(".weight")
        for spelling in (name, compvis):
            for prefix in ("unet", "diffusion_model"):
                layers[_spelled(f"{prefix}.{spelling}")] = module
    second = getattr(pipeline, "text_encoder_2", None)
    first_prefixes = ("te1", "text_encoder") if second is not None else ("te", "te1", "text_encoder")
    for prefixes, encoder in ((first_prefixes, pipeline.text_encoder), (("te2", "text_encoder_2"), second)):
        for name, module in _weighted(encoder) if encoder is not None else ():
            for prefix in prefixes:
                layers[_spelled(f"{prefix}.text_model.{name.removeprefix('text_model.')}")] = module
    return layers


def _weighted(module: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, layer) for name, layer in module.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]


def _spelled(name: str) -> str:
    """One spelling for `lora_unet_down_blocks_0_…`, `unet.down_blocks.0.…` and `base_model.model.…`."""
    return re.sub(r"_to_out$", "_to_out_0", without_prefix(name.replace(".", "_")))
