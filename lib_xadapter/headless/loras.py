"""LoRAs of every kind merged into the weights of the model that they were made for.

Which model that is, `lib_xadapter.detect_lora_base` tells. Every tensor of a file must find its layer: a LoRA that goes
in by halves, or not at all, would be a picture that looks right and is not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DoesNotFit, WrongFile
from ..families import BASE_FAMILIES, FAMILY_NAMES
from ..lora_files import detect_lora_base
from ..lora_layers import BUNDLED_EMBEDDING, split_key, without_prefix
from ..mapping import read_weights
from .compvis_layout import open_clip_origin
from .lora_kinds import Change, Factors, change_of
from .lora_names import Lora
from .model_files import check_finite, family_of, unet_table_of

UNKNOWN = "unknown"


@dataclass(frozen=True)
class Layer:
    """A layer of a pipeline that LoRAs change: linear, convolution or norm."""

    module: Any
    of_unet: bool


def load_lora(
    pipeline: Any,
    file: str | Path,
    weight: float = 1.0,
    *,
    unet_weight: float | None = None,
    rank: int | None = None,
) -> None:
    """Merge a LoRA of any kind into a pipeline of diffusers, SD1.5, SD2 or SDXL: what the WebUI's Lora extension does.

    LoRA, LoCon, DoRA, LoHa, LoKr, GLoRA, (IA)³, OFT, BOFT, full differences and norms, of UNet and text encoders, under
    kohya's, LyCORIS', CompVis', diffusers' and peft's names. The weights themselves are changed; several LoRAs go in
    one after the other.

    Args:
        pipeline: with `unet` and `text_encoder`, not quantised.
        file: .safetensors, or a pickle of tensors.
        weight: of the text encoders' part, and of the UNet's where that has none of its own.
        unet_weight: of the UNet's part.
        rank: how much of the rank is used, as `dyn` in the WebUI.

    Raises:
        WrongFile: the file is no LoRA, of a kind that is not known, or not finite.
        DoesNotFit: it was made for another model.
    """
    lora, family = Lora(Path(file), weight, unet_weight, rank), family_of(pipeline)
    found = detect_lora_base(lora.path)
    if found not in (family, UNKNOWN):
        raise DoesNotFit(
            f"{lora.path.name} is a LoRA for {FAMILY_NAMES[found]}, the pipeline is {FAMILY_NAMES[family]}."
        )
    _merge(lora, pipeline)


def merge_lora(lora: Lora, base: Any, upgraded: Any) -> str:
    """Merge a LoRA into the model it was made for, or those that it names; gives them as "base", "upgraded" or both.

    Raises:
        WrongFile: the file is no LoRA for either model, or of a kind that is not known.
        DoesNotFit: a tensor finds no layer, or one of another shape.
    """
    pipelines = {"base": base, "upgraded": upgraded}
    for name in (models := lora.models or (_model_of(lora, base),)):
        _merge(lora, pipelines[name])
    return " and ".join(models)


def _model_of(lora: Lora, base: Any) -> str:
    found, family = detect_lora_base(lora.path), family_of(base)
    if found in BASE_FAMILIES and found != family:
        raise DoesNotFit(f"{lora.path.name} is a LoRA for {FAMILY_NAMES[found]}, the base is {FAMILY_NAMES[family]}.")
    if found not in (family, "sdxl"):
        names = f"{FAMILY_NAMES[family]} or SDXL"
        raise WrongFile(f"{lora.path.name} is no LoRA for {names} as far as its keys and shapes tell ({found}).")
    return "upgraded" if found == "sdxl" else "base"


def _merge(lora: Lora, pipeline: Any) -> None:
    file = read_weights(lora.path)
    check_finite(file, lora.path.name)
    layers = _layers_of(pipeline)
    changes = [
        (layer, _change(name, factors, layer, lora))
        for name, factors in _by_layer(file, lora).items()
        for layer in [_layer_named(name, layers, lora.path.name)]
    ]
    with torch.no_grad():
        for layer, change in changes:
            weight = lora.weight if not layer.of_unet or lora.unet_weight is None else lora.unet_weight
            _add(layer.module.weight, weight * change.weight)
            if change.bias is not None:
                _add(layer.module.bias, weight * change.bias)


def _add(parameter: Tensor, delta: Tensor) -> None:
    # in float32, whatever the model is in
    parameter.copy_(parameter.float() + delta.to(parameter.device))


def _by_layer(file: Mapping[str, Tensor], lora: Lora) -> dict[str, dict[str, Tensor]]:
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in file.items():
        if BUNDLED_EMBEDDING.fullmatch(key):
            continue
        if (found := split_key(key)) is None:
            raise WrongFile(f"{lora.path.name} holds '{key}', which is part of no kind of LoRA that is known.")
        layer, parameter = found
        layers.setdefault(layer, {})[parameter] = tensor.float()
    return layers


def _layer_named(name: str, layers: Mapping[str, Layer], file_name: str) -> Layer:
    layer = layers.get(_spelled(name))
    if layer is None:
        raise DoesNotFit(f"{file_name}: there is no layer for '{name}' in the model that the LoRA was made for.")
    return layer


def _change(name: str, factors: Factors, layer: Layer, lora: Lora) -> Change:
    file_name, weight = lora.path.name, layer.module.weight
    try:
        change = change_of(factors, weight.detach().float().cpu(), lora.rank)
    except (RuntimeError, IndexError) as error:
        raise DoesNotFit(
            f"{file_name}: the tensors of '{name}' do not fit each other or the layer ({error})."
        ) from error
    if change is None:
        raise WrongFile(f"{file_name}: '{name}' has {', '.join(sorted(factors))}, which is no kind that is known.")
    where = f"{file_name}: '{name}' changes a"
    _check_shape(f"{where} weight", change.weight, weight)
    if change.bias is not None:
        _check_shape(f"{where} bias", change.bias, layer.module.bias)
    return change


def _check_shape(what: str, delta: Tensor, own: Tensor | None) -> None:
    if own is None:
        raise DoesNotFit(f"{what}, and the model's layer has none.")
    if delta.shape != own.shape:
        found, expected = ("x".join(map(str, tensor.shape)) for tensor in (delta, own))
        raise DoesNotFit(f"{what} of {found}, the model's is {expected}.")


# --- names ------------------------------------------------------------------------------------------------------------


def _layers_of(pipeline: Any) -> dict[str, Layer]:
    """Every layer by each of its names: diffusers', CompVis' and those of the WebUI's own modules."""
    layers: dict[str, Layer] = {}
    table = unet_table_of(pipeline.unet)
    for name, module in _weighted(pipeline.unet):
        compvis = table(f"{name}.weight").name.removesuffix(".weight")
        for spelling in (name, compvis):
            for prefix in ("", "unet.", "diffusion_model."):
                layers[_spelled(f"{prefix}{spelling}")] = Layer(module, of_unet=True)
    for encoder, naming in _text_encoders(pipeline):
        for name, module in _weighted(encoder):
            for spelling in naming(f"text_model.{name.removeprefix('text_model.')}"):
                layers[_spelled(spelling)] = Layer(module, of_unet=False)
    return layers


def _text_encoders(pipeline: Any) -> list[tuple[nn.Module, Callable[[str], list[str]]]]:
    """Each with the names that a layer of it goes by."""
    family = family_of(pipeline)

    def named(*prefixes: str, own: Callable[[str], str]) -> Callable[[str], list[str]]:
        return lambda name: [*(f"{prefix}{name}" for prefix in prefixes), own(name)]

    def open_clip(prefix: str) -> Callable[[str], str]:
        return lambda name: f"{prefix}{_open_clip_name(name)}"

    if family == "sdxl":
        first = named("te1.", "text_encoder.", own=lambda name: f"0.transformer.{name}")
        second = named("te2.", "text_encoder_2.", own=open_clip("1.model."))
        return [(pipeline.text_encoder, first), (pipeline.text_encoder_2, second)]
    own = open_clip("model.") if family == "sd2" else (lambda name: f"transformer.{name}")
    return [(pipeline.text_encoder, named("", "te.", "te1.", "text_encoder.", own=own))]


def _open_clip_name(name: str) -> str:
    """As the WebUI spells it, where query, key and value keep names of their own."""
    if found := re.fullmatch(r"text_model\.encoder\.layers\.(\d+)\.self_attn\.([qkv]_proj)", name):
        return f"transformer.resblocks.{found[1]}.attn.{found[2]}"
    return open_clip_origin(f"{name}.weight").name.removesuffix(".weight")


def _weighted(module: nn.Module) -> list[tuple[str, nn.Module]]:
    kinds = (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.GroupNorm)
    # peft keeps the layer that it stands for under this name
    return [
        (name.replace(".base_layer", ""), layer) for name, layer in module.named_modules() if isinstance(layer, kinds)
    ]


def _spelled(name: str) -> str:
    """One spelling for `lora_unet_down_blocks_0_…`, `unet.down_blocks.0.…` and `base_model.model.…`."""
    return re.sub(r"_to_out$", "_to_out_0", without_prefix(name.replace(".", "_")))
