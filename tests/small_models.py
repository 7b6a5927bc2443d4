"""Small models with seeded random weights, written as the files a user has.

SDXL and SD1.5 at a tenth of their width, an SD1.5 LoRA, an SD1.5 ControlNet and an adapter, in the layouts that the
WebUI reads, and a vocabulary of single letters.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from diffusers import AutoencoderKL, ControlNetModel, T2IAdapter, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from lib_xadapter.headless.compvis_layout import (
    BASE_TEXT_PREFIX,
    CONTROLNET_PREFIX,
    FIRST_TEXT_PREFIX,
    SECOND_TEXT_PREFIX,
    UNET_PREFIX,
    VAE_PREFIX,
    clip_origin,
    open_clip_origin,
    vae_table,
    weights_of,
    write_compvis,
)
from lib_xadapter.headless.model_configs import SIZE_EMBEDDING
from lib_xadapter.headless.model_files import unet_table_of
from lib_xadapter.headless.tokenizers import vocabulary_of
from lib_xadapter.mapping import MappingLayers, layout_for
from lib_xadapter.saving import write_whole

TEXT_WIDTH = 64
BASE_CHANNELS = (32, 64, 128, 128)
UPGRADED_CHANNELS = (32, 64, 128)
LORA_RANK = 4
LETTERS = vocabulary_of([])


@dataclass(frozen=True)
class SmallModels:
    """Where the files are; laid out as a WebUI's `models/` folder, with the tokenizer beside."""

    folder: Path
    upgraded: Path
    base: Path
    lora: Path
    controlnet: Path
    adapter: Path
    tokenizer: Path

    @classmethod
    def below(cls, folder: Path) -> SmallModels:
        return cls(
            folder,
            upgraded=folder / "Stable-diffusion" / "small-sdxl.safetensors",
            base=folder / "Stable-diffusion" / "small-sd15.safetensors",
            lora=folder / "Lora" / "small-style.safetensors",
            controlnet=folder / "ControlNet" / "small-edges.safetensors",
            adapter=folder / "X-Adapter" / "small.safetensors",
            tokenizer=folder / "tokenizer",
        )


def make_small_models(folder: Path) -> SmallModels:
    """The models in a folder, made where they are not there yet."""
    models = SmallModels.below(folder)
    makers: Mapping[Path, Callable[[], dict[str, Tensor]]] = {
        models.upgraded: _upgraded_checkpoint,
        models.base: _base_checkpoint,
        models.lora: _lora,
        models.controlnet: _controlnet,
        models.adapter: _adapter,
    }
    for path, make in makers.items():
        if not path.is_file():
            tensors = {key: value.contiguous() for key, value in make().items()}
            write_whole(path, lambda to, tensors=tensors: to.write_bytes(safetensors.torch.save(tensors)))
    _write_tokenizer(models.tokenizer)
    return models


def seeded(module: nn.Module, name: str, gain: float = 0.8) -> nn.Module:
    """Random weights that depend on their names alone: fan-in scaled matrices, norms around one, small biases."""
    state = module.state_dict()
    module.load_state_dict({key: _seeded_weight(f"{name}.{key}", value, gain) for key, value in state.items()})
    return module.eval().requires_grad_(False)


def t2i_adapter(channels: Sequence[int] = BASE_CHANNELS) -> nn.Module:
    return seeded(T2IAdapter(3, list(channels), 2, 8, "full_adapter"), "t2i", gain=1.5)


def _seeded_weight(name: str, like: Tensor, gain: float) -> Tensor:
    if not like.dtype.is_floating_point:
        return like
    seed = zlib.crc32(name.encode())
    x = torch.randn(like.shape, generator=torch.Generator().manual_seed(seed))
    if like.ndim >= 2:
        return x * gain / math.sqrt(math.prod(like.shape[1:]))
    return 1 + 0.1 * x if name.endswith("weight") else 0.1 * x


def base_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        block_out_channels=BASE_CHANNELS,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    )


def upgraded_unet(transformer_depths: tuple[int, int, int] = (1, 1, 2)) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        block_out_channels=UPGRADED_CHANNELS,
        cross_attention_dim=2 * TEXT_WIDTH,
        attention_head_dim=tuple(max(width // 64, 1) for width in UPGRADED_CHANNELS),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=transformer_depths,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=SIZE_EMBEDDING,
        projection_class_embeddings_input_dim=TEXT_WIDTH + 6 * SIZE_EMBEDDING,
    )


def small_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(32,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        layers_per_block=1,
    )


def text_config(activation: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(LETTERS),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=1,
        hidden_act=activation,
        projection_dim=TEXT_WIDTH,
        bos_token_id=len(LETTERS) - 2,
        eos_token_id=len(LETTERS) - 1,
        pad_token_id=len(LETTERS) - 1,
    )


def _base_checkpoint() -> dict[str, Tensor]:
    encoder = seeded(CLIPTextModel(text_config("quick_gelu")), "base.text", gain=1.5)
    return {
        **unet_tensors(seeded(base_unet(), "base.unet")),
        **_vae_tensors("base.vae"),
        **write_compvis(weights_of(encoder), BASE_TEXT_PREFIX, clip_origin),
    }


def _upgraded_checkpoint() -> dict[str, Tensor]:
    first = seeded(CLIPTextModel(text_config("quick_gelu")), "upgraded.text", gain=1.5)
    second = seeded(CLIPTextModelWithProjection(text_config("gelu")), "upgraded.text_2", gain=1.5)
    return {
        **unet_tensors(seeded(upgraded_unet(), "upgraded.unet")),
        **_vae_tensors("upgraded.vae"),
        **write_compvis(weights_of(first), FIRST_TEXT_PREFIX, clip_origin),
        **write_compvis(weights_of(second), SECOND_TEXT_PREFIX, open_clip_origin),
    }


def unet_tensors(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    return write_compvis(unet.state_dict(), UNET_PREFIX, unet_table_of(unet))


def _vae_tensors(name: str) -> dict[str, Tensor]:
    vae = seeded(small_vae(), name)
    # a random encoder's posterior is wide: take its mean
    vae.quant_conv.weight[4:] = 0
    vae.quant_conv.bias[4:] = -30
    return write_compvis(vae.state_dict(), VAE_PREFIX, vae_table(4))


def _lora() -> dict[str, Tensor]:
    """Kohya's names, on the attention of the UNet and of the text encoder."""
    parts = (("lora_unet", base_unet()), ("lora_te_text_model", CLIPTextModel(text_config("quick_gelu"))))
    tensors = {}
    for prefix, module in parts:
        for name, layer in module.named_modules():
            if isinstance(layer, nn.Linear) and (".attn" in name or ".self_attn." in name):
                key = f"{prefix}_{name.removeprefix('text_model.').replace('.', '_')}"
                tensors |= _lora_of(key, layer)
    return tensors


def _lora_of(key: str, layer: nn.Linear) -> dict[str, Tensor]:
    down, up = torch.empty(LORA_RANK, layer.in_features), torch.empty(layer.out_features, LORA_RANK)
    return {
        f"{key}.lora_down.weight": _seeded_weight(f"{key}.down", down, 1.5),
        f"{key}.lora_up.weight": _seeded_weight(f"{key}.up", up, 1.5),
        f"{key}.alpha": torch.tensor(LORA_RANK / 2),
    }


def _controlnet() -> dict[str, Tensor]:
    unet = base_unet()
    net = seeded(ControlNetModel.from_unet(unet), "base.controlnet", gain=1.2)
    return write_compvis(net.state_dict(), CONTROLNET_PREFIX, unet_table_of(unet))


def _adapter() -> dict[str, Tensor]:
    return seeded(MappingLayers(layout_for(base_unet(), upgraded_unet())), "adapter", gain=1.2).state_dict()


def _write_tokenizer(folder: Path) -> None:
    text = json.dumps(LETTERS, ensure_ascii=False)
    write_whole(folder / "vocab.json", lambda to: to.write_text(text, encoding="utf-8"))
    write_whole(folder / "merges.txt", lambda to: to.write_text("#version: 0.2\n", encoding="utf-8"))
