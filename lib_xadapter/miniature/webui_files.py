"""The miniature models as the WebUI reads them: single files with their .yaml, wide enough for its norms.

The tokenizer stands in the .yaml by its absolute path. open_clip knows no text encoder narrower than `OPEN_CLIP_WIDTH`:
the channels of the second one repeat as those of the UNets do (`widening.py`).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import yaml
from diffusers import ControlNetModel
from torch import Tensor, nn

from ..headless.compvis_layout import (
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
from ..headless.model_configs import SCALING_FACTORS, SIZE_EMBEDDING
from ..headless.model_files import load_base, load_upgraded, unet_table_of
from ..saving import write_whole
from .architectures import (
    BASE_CHANNELS,
    BASE_HEADS,
    GROUPS,
    HEAD_WIDTH,
    TEXT_LAYERS,
    TEXT_WIDTH,
    UPGRADED_CHANNELS,
    VAE_CHANNELS,
    VAE_GROUPS,
)
from .model_files import BASE, UPGRADED, save, save_half
from .plugins import changed_layers
from .vocabulary import LENGTH, clip_numbers, numbers, write_tokenizer
from .widening import Tensors, Widening, widened_lora

COPIES, VAE_COPIES = 32 // GROUPS, 32 // VAE_GROUPS
"""Of each channel: ldm and sgm norm in 32 groups."""
BASE_WIDENING = Widening(BASE_CHANNELS[0], COPIES, BASE_CHANNELS[0] // BASE_HEADS)
UPGRADED_WIDENING = Widening(UPGRADED_CHANNELS[0], COPIES, HEAD_WIDTH)
VAE_WIDENING = Widening(None, VAE_COPIES, None)
OPEN_CLIP = "ViT-S-32-alt"
OPEN_CLIP_WIDTH, OPEN_CLIP_LAYERS, CLIP_VOCABULARY = 256, 10, 49408
"""Of the narrowest text encoder in open_clip's table."""
TEXT_COPIES = OPEN_CLIP_WIDTH // TEXT_WIDTH
READ_TOKENS = (
    *("attn2.to_k.weight", "attn2.to_v.weight"),
    *("attn2_to_k.lora_down.weight", "attn2_to_v.lora_down.weight"),
)
READ_POOLED = "label_emb.0.0.weight"
STILL = ("attn.out_proj", "mlp.c_proj")
"""What ends each half of a layer: with zeros there, the layer hands on what it is given."""


def base_config(tokenizer: str) -> dict[str, Any]:
    """The base as ldm builds it (after v1-inference.yaml of the WebUI)."""
    unet = {
        **_unet(BASE_CHANNELS),
        "image_size": 32,
        "attention_resolutions": [4, 2, 1],
        "num_heads": BASE_HEADS,
        "transformer_depth": 1,
        "context_dim": TEXT_WIDTH,
    }
    params = {
        "linear_start": 0.00085,
        "linear_end": 0.012,
        "num_timesteps_cond": 1,
        "timesteps": 1000,
        "first_stage_key": "jpg",
        "cond_stage_key": "txt",
        "image_size": 8,
        "channels": 4,
        "cond_stage_trainable": False,
        "conditioning_key": "crossattn",
        "scale_factor": SCALING_FACTORS["sd1"],
        "use_ema": False,
        "unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": unet},
        "first_stage_config": {"target": "ldm.models.autoencoder.AutoencoderKL", "params": _vae()},
        "cond_stage_config": {
            "target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder",
            "params": {"version": tokenizer},
        },
    }
    return {"model": {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": params}}


def upgraded_config(tokenizer: str) -> dict[str, Any]:
    """The upgraded model as sgm builds it (after sd_xl_base.yaml)."""
    sgm = "sgm.modules"
    diffusion = f"{sgm}.diffusionmodules"
    unet = {
        **_unet(UPGRADED_CHANNELS),
        "adm_in_channels": OPEN_CLIP_WIDTH + 6 * SIZE_EMBEDDING,
        "num_classes": "sequential",
        "attention_resolutions": [4, 2],
        "num_head_channels": COPIES * HEAD_WIDTH,
        "use_linear_in_transformer": True,
        "transformer_depth": [1, 1, 1],
        "context_dim": TEXT_WIDTH + OPEN_CLIP_WIDTH,
        "spatial_transformer_attn_type": "softmax",
    }
    sizes = ("original_size_as_tuple", "crop_coords_top_left", "target_size_as_tuple")
    embedders = [
        {
            "is_trainable": False,
            "input_key": "txt",
            "target": f"{sgm}.encoders.modules.FrozenCLIPEmbedder",
            "params": {"version": tokenizer, "layer": "hidden", "layer_idx": TEXT_LAYERS - 1},
        },
        {
            "is_trainable": False,
            "input_key": "txt",
            "target": f"{sgm}.encoders.modules.FrozenOpenCLIPEmbedder2",
            "params": {
                "arch": OPEN_CLIP,
                "version": "laion2b_s39b_b160k",
                "freeze": True,
                "layer": "penultimate",
                "always_return_pooled": True,
                "legacy": False,
            },
        },
        *(
            {
                "is_trainable": False,
                "input_key": key,
                "target": f"{sgm}.encoders.modules.ConcatTimestepEmbedderND",
                "params": {"outdim": SIZE_EMBEDDING},
            }
            for key in sizes
        ),
    ]
    denoiser = {
        "num_idx": 1000,
        "weighting_config": {"target": f"{diffusion}.denoiser_weighting.EpsWeighting"},
        "scaling_config": {"target": f"{diffusion}.denoiser_scaling.EpsScaling"},
        "discretization_config": {"target": f"{diffusion}.discretizer.LegacyDDPMDiscretization"},
    }
    params = {
        "scale_factor": SCALING_FACTORS["sdxl"],
        "disable_first_stage_autocast": True,
        "denoiser_config": {"target": f"{diffusion}.denoiser.DiscreteDenoiser", "params": denoiser},
        "network_config": {"target": f"{diffusion}.openaimodel.UNetModel", "params": unet},
        "conditioner_config": {"target": f"{sgm}.GeneralConditioner", "params": {"emb_models": embedders}},
        "first_stage_config": {
            "target": "sgm.models.autoencoder.AutoencoderKLInferenceWrapper",
            "params": _vae(attn_type="vanilla"),
        },
    }
    return {"model": {"target": "sgm.models.diffusion.DiffusionEngine", "params": params}}


def _unet(widths: tuple[int, ...]) -> dict[str, Any]:
    return {
        "use_checkpoint": False,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": COPIES * widths[0],
        "num_res_blocks": 2,
        "channel_mult": [1 for _ in widths],
        "use_spatial_transformer": True,
        "legacy": False,
    }


def _vae(**more: str) -> dict[str, Any]:
    network = {
        "double_z": True,
        "z_channels": 4,
        "resolution": 256,
        "in_channels": 3,
        "out_ch": 3,
        "ch": VAE_COPIES * VAE_CHANNELS[0],
        "ch_mult": [width // VAE_CHANNELS[0] for width in VAE_CHANNELS],
        "num_res_blocks": 1,
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    loss = {"target": "torch.nn.Identity"}
    return {"embed_dim": 4, "monitor": "val/rec_loss", "ddconfig": {**more, **network}, "lossconfig": loss}


# --- files ------------------------------------------------------------------------------------------------------------


def write_for_webui(models: Path, data: Path) -> None:
    """Lay the models out as the WebUI's data folder wants them. T2I-Adapters have no place there: the ControlNet
    extension knows those of widths [c, 2c, 4c, 4c] only.

    Args:
        models: the folder that the models were made in.
        data: the WebUI's folder, or what its --data-dir names; it gets models/ and embeddings/.
    """
    there = data / "models"
    tokenizer = (there / "miniature-clip").resolve()
    write_tokenizer(tokenizer)
    _write_clip_config(tokenizer)
    checkpoints = there / "Stable-diffusion"
    base = load_base(models / "Stable-diffusion" / BASE, torch.float32)
    upgraded = load_upgraded(models / "Stable-diffusion" / UPGRADED, torch.float32)
    for name, tensors, config in (
        (BASE, _base_tensors(base), base_config(str(tokenizer))),
        (UPGRADED, _upgraded_tensors(upgraded), upgraded_config(str(tokenizer))),
    ):
        save_half(checkpoints / f"{name}.safetensors", tensors)
        text = yaml.safe_dump(config, sort_keys=False)
        write_whole(checkpoints / f"{name}.yaml", lambda to, text=text: to.write_text(text, encoding="utf-8"))
    for folder in sorted((models / "ControlNet").glob("miniature-*")):
        net = ControlNetModel.from_pretrained(folder, local_files_only=True).float()
        unet, widening, adjusted = _of(folder, base, upgraded)
        tensors = write_compvis(widening.tensors(net.state_dict()), CONTROLNET_PREFIX, unet_table_of(unet))
        save_half(there / "ControlNet" / f"{folder.name}.safetensors", adjusted(tensors))
    for path in sorted((models / "Lora").glob("*.safetensors")):
        unet, widening, adjusted = _of(path, base, upgraded)
        tensors = widened_lora(_read(path), widening, layers_by_lora_name(unet).__getitem__)
        # the WebUI multiplies the parts of a LoHa as they are, and its torch no halves on a CPU
        save(there / "Lora" / path.name, adjusted(tensors))
    for path in sorted((models / "X-Adapter").glob("*.safetensors")):
        save_half(there / "X-Adapter" / path.name, BASE_WIDENING.mapping_layers(_read(path)), _metadata(path))
    for path in sorted((models / "embeddings").glob("*.safetensors")):
        write_whole(data / "embeddings" / path.name, lambda to, path=path: shutil.copyfile(path, to))


def _of(path: Path, base: Any, upgraded: Any) -> tuple[nn.Module, Widening, Callable[[Tensors], dict[str, Tensor]]]:
    """The UNet that a plugin is for, how it is widened, and what the text encoders change of it."""
    if path.stem.startswith("miniature-upgraded"):
        return upgraded.unet, UPGRADED_WIDENING, reading_wide_text
    return base.unet, BASE_WIDENING, dict


def _read(path: Path) -> dict[str, Tensor]:
    return {name: value.float() for name, value in safetensors.torch.load_file(path).items()}


def _metadata(path: Path) -> dict[str, str]:
    with safetensors.safe_open(path, "pt") as file:
        return dict(file.metadata() or {})


def _base_tensors(base: Any) -> dict[str, Tensor]:
    return {
        **write_compvis(BASE_WIDENING.tensors(base.unet.state_dict()), UNET_PREFIX, unet_table_of(base.unet)),
        **_vae_tensors(base.vae),
        **write_compvis(weights_of(base.text_encoder), BASE_TEXT_PREFIX, clip_origin),
    }


def _upgraded_tensors(upgraded: Any) -> dict[str, Tensor]:
    unet = UPGRADED_WIDENING.tensors(upgraded.unet.state_dict())
    return with_wide_text(
        {
            **write_compvis(unet, UNET_PREFIX, unet_table_of(upgraded.unet)),
            **_vae_tensors(upgraded.vae),
            **write_compvis(weights_of(upgraded.text_encoder), FIRST_TEXT_PREFIX, clip_origin),
            **write_compvis(weights_of(upgraded.text_encoder_2), SECOND_TEXT_PREFIX, open_clip_origin),
        }
    )


def _vae_tensors(vae: nn.Module) -> dict[str, Tensor]:
    return write_compvis(VAE_WIDENING.tensors(vae.state_dict()), VAE_PREFIX, vae_table(len(VAE_CHANNELS)))


def layers_by_lora_name(unet: nn.Module) -> Mapping[str, str]:
    """Names in LoRA files, after diffusers' blocks and after sgm's → layers."""
    table, layers = unet_table_of(unet), [name for name, _ in changed_layers(unet, convolutions=True)]
    after_sgm = {table(f"{name}.weight").name.removesuffix(".weight"): name for name in layers}
    after_both = {**{name: name for name in layers}, **after_sgm}
    return {f"lora_unet_{called.replace('.', '_')}": f"{name}." for called, name in after_both.items()}


def _write_clip_config(folder: Path) -> None:
    size, end = len(numbers()), "<|endoftext|>"
    special = {"bos_token": "<|startoftext|>", "eos_token": end, "unk_token": end, "pad_token": end}
    files = {
        "special_tokens_map.json": special,
        "tokenizer_config.json": {
            "model_max_length": LENGTH,
            "do_lower_case": True,
            "tokenizer_class": "CLIPTokenizer",
            **special,
        },
        "config.json": {
            "architectures": ["CLIPTextModel"],
            "model_type": "clip_text_model",
            "hidden_size": TEXT_WIDTH,
            "intermediate_size": 4 * TEXT_WIDTH,
            "num_attention_heads": 1,
            "num_hidden_layers": TEXT_LAYERS,
            "vocab_size": size,
            "max_position_embeddings": LENGTH,
            "hidden_act": "quick_gelu",
            "projection_dim": TEXT_WIDTH,
            "bos_token_id": size - 2,
            "eos_token_id": size - 1,
            "pad_token_id": size - 1,
            "layer_norm_eps": 1e-5,
        },
    }
    for name, content in files.items():
        text = json.dumps(content)
        write_whole(folder / name, lambda to, text=text: to.write_text(text, encoding="utf-8"))


def with_wide_text(file: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The upgraded model with its second text encoder as wide and as deep as open_clip's narrowest.

    Every channel stands there `TEXT_COPIES` times, and what reads them reads a part of each: norms, heads and sums come
    out as before. Layers that hand on what they are given stand before the last one. Tokens have CLIP's own numbers.
    """
    wide = {key: value for key, value in file.items() if not key.startswith(SECOND_TEXT_PREFIX)}
    for key, value in file.items():
        if key.startswith(SECOND_TEXT_PREFIX):
            wide |= _widened_text(key.removeprefix(SECOND_TEXT_PREFIX), value)
    return reading_wide_text(wide)


def reading_wide_text(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What reads the second text encoder's channels, in the upgraded model, its ControlNets and its LoRAs."""
    return {key: _reading_wide_text(key, value) for key, value in tensors.items()}


def _reading_wide_text(key: str, value: Tensor) -> Tensor:
    if key.endswith(READ_TOKENS):
        first, second = value.split([TEXT_WIDTH, TEXT_WIDTH], 1)
        return torch.cat([first, _read_from_copies(second)], 1)
    if key.endswith(READ_POOLED):
        pooled, sizes = value.split([TEXT_WIDTH, 6 * SIZE_EMBEDDING], 1)
        return torch.cat([_read_from_copies(pooled), sizes], 1)
    return value


def _widened_text(name: str, value: Tensor) -> dict[str, Tensor]:
    """A tensor of the second text encoder, without its prefix → those that stand for it."""
    if name == "token_embedding.weight":
        rows = value.new_zeros(CLIP_VOCABULARY, OPEN_CLIP_WIDTH)
        rows[clip_numbers()] = value.repeat(1, TEXT_COPIES)
        return {SECOND_TEXT_PREFIX + name: rows}
    if name == "text_projection":
        # (in, out), of which both stand there several times
        return {SECOND_TEXT_PREFIX + name: value.repeat(TEXT_COPIES, TEXT_COPIES) / TEXT_COPIES}
    if not name.startswith("transformer.resblocks."):
        return {SECOND_TEXT_PREFIX + name: value.repeat(*[1] * (value.ndim - 1), TEXT_COPIES)}
    number, _, rest = name.removeprefix("transformer.resblocks.").partition(".")
    thirds = value.chunk(3) if "in_proj" in rest else (value,)
    tensor = torch.cat([_copies(third) for third in thirds])
    last = int(number) == TEXT_LAYERS - 1
    tensors = {_layer(OPEN_CLIP_LAYERS - 1 if last else int(number), rest): tensor}
    if last:
        still = torch.zeros_like(tensor) if rest.startswith(STILL) else tensor
        tensors |= {_layer(place, rest): still for place in range(TEXT_LAYERS - 1, OPEN_CLIP_LAYERS - 1)}
    return tensors


def _layer(place: int, rest: str) -> str:
    return f"{SECOND_TEXT_PREFIX}transformer.resblocks.{place}.{rest}"


def _copies(value: Tensor) -> Tensor:
    """A vector several times; a matrix that reads from copies and writes copies."""
    return value.repeat(TEXT_COPIES) if value.ndim == 1 else _read_from_copies(value).repeat(TEXT_COPIES, 1)


def _read_from_copies(matrix: Tensor) -> Tensor:
    """A matrix (out, in) whose input stands there several times."""
    return matrix.repeat(1, TEXT_COPIES) / TEXT_COPIES
