"""The miniature models as a user's files: single files with their .yaml, and what the WebUI wants beside.

Both hosts read the same names. For the WebUI the tokenizer stands in the .yaml by its absolute path, and open_clip
knows no text encoder narrower than `OPEN_CLIP_WIDTH`: the channels of the second one are written several times side by
side, which changes nothing but rounding.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import yaml
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
    write_compvis,
)
from ..headless.model_configs import SCALING_FACTORS, SIZE_EMBEDDING
from ..headless.model_files import unet_table_of
from ..headless.saving import write_whole
from .architectures import (
    BASE_CHANNELS,
    BASE_HEADS,
    HEAD_WIDTH,
    TEXT_LAYERS,
    TEXT_WIDTH,
    UPGRADED_CHANNELS,
    VAE_CHANNELS,
    BaseText,
    UpgradedText,
)
from .vocabulary import LENGTH, clip_numbers, numbers, write_tokenizer

BASE, UPGRADED = "miniature-base", "miniature-upgraded"
OPEN_CLIP = "ViT-S-32-alt"
OPEN_CLIP_WIDTH, OPEN_CLIP_LAYERS, CLIP_VOCABULARY = 256, 10, 49408
"""Of the narrowest text encoder in open_clip's table."""
COPIES = OPEN_CLIP_WIDTH // TEXT_WIDTH
STILL = ("attn.out_proj", "mlp.c_proj")
"""What ends each half of a layer: with zeros there, the layer hands on what it is given."""


def base_tensors(unet: nn.Module, vae: nn.Module, text: BaseText) -> dict[str, Tensor]:
    """The base as a single file."""
    return {
        **write_compvis(unet.state_dict(), UNET_PREFIX, unet_table_of(unet)),
        **write_compvis(vae.state_dict(), VAE_PREFIX, vae_table(len(vae.config.block_out_channels))),
        **write_compvis(_weights(text.encoder), BASE_TEXT_PREFIX, clip_origin),
    }


def upgraded_tensors(unet: nn.Module, vae: nn.Module, text: UpgradedText) -> dict[str, Tensor]:
    """The upgraded model as a single file."""
    return {
        **write_compvis(unet.state_dict(), UNET_PREFIX, unet_table_of(unet)),
        **write_compvis(vae.state_dict(), VAE_PREFIX, vae_table(len(vae.config.block_out_channels))),
        **write_compvis(_weights(text.first), FIRST_TEXT_PREFIX, clip_origin),
        **write_compvis(_weights(text.second), SECOND_TEXT_PREFIX, open_clip_origin),
    }


def controlnet_tensors(net: nn.Module, unet: nn.Module) -> dict[str, Tensor]:
    """A ControlNet as a single file, by the names of the UNet that it is for."""
    return write_compvis(net.state_dict(), CONTROLNET_PREFIX, unet_table_of(unet))


def _weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in module.state_dict().items() if value.dtype.is_floating_point}


def save_half(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors as fp16 safetensors."""
    halves = {name: value.detach().half().contiguous() for name, value in tensors.items()}
    written = safetensors.torch.save(halves, metadata=dict(metadata or {}))
    write_whole(path, lambda to: to.write_bytes(written))


def write_configs(folder: Path, tokenizer: str = "../tokenizer") -> None:
    """The .yaml beside both checkpoints, which say how many heads there are."""
    for name, config in ((BASE, base_config(tokenizer)), (UPGRADED, upgraded_config(tokenizer, TEXT_WIDTH))):
        told = yaml.safe_dump(config, sort_keys=False)
        write_whole(folder / f"{name}.yaml", lambda to, told=told: to.write_text(told, encoding="utf-8"))


def base_config(tokenizer: str) -> dict[str, Any]:
    """The base as ldm builds it (after v1-inference.yaml of the WebUI)."""
    widths = BASE_CHANNELS
    unet = {
        **_unet(widths),
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


def upgraded_config(tokenizer: str, second_width: int) -> dict[str, Any]:
    """The upgraded model as sgm builds it (after sd_xl_base.yaml); `second_width` is its second text encoder's."""
    sgm = "sgm.modules"
    diffusion = f"{sgm}.diffusionmodules"
    unet = {
        **_unet(UPGRADED_CHANNELS),
        "adm_in_channels": second_width + 6 * SIZE_EMBEDDING,
        "num_classes": "sequential",
        "attention_resolutions": [4, 2],
        "num_head_channels": HEAD_WIDTH,
        "use_linear_in_transformer": True,
        "transformer_depth": [1, 1, 1],
        "context_dim": TEXT_WIDTH + second_width,
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
        "model_channels": widths[0],
        "num_res_blocks": 2,
        "channel_mult": [width // widths[0] for width in widths],
        "use_spatial_transformer": True,
        "legacy": False,
    }


def _vae(**more: str) -> dict[str, Any]:
    widths = VAE_CHANNELS
    network = {
        "double_z": True,
        "z_channels": 4,
        "resolution": 256,
        "in_channels": 3,
        "out_ch": 3,
        "ch": widths[0],
        "ch_mult": [width // widths[0] for width in widths],
        "num_res_blocks": 1,
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    loss = {"target": "torch.nn.Identity"}
    return {"embed_dim": 4, "monitor": "val/rec_loss", "ddconfig": {**more, **network}, "lossconfig": loss}


# --- for the WebUI ----------------------------------------------------------------------------------------------------


def write_for_webui(models: Path, data: Path) -> None:
    """Lay the models out as the WebUI's data folder wants them, with a .yaml that it can build them by.

    Args:
        models: the folder that the models were made in.
        data: the WebUI's folder, or what its --data-dir names; it gets models/ and embeddings/.
    """
    there = data / "models"
    tokenizer = (there / "miniature-clip").resolve()
    write_tokenizer(tokenizer)
    _write_clip_config(tokenizer)
    for kind in ("Lora", "ControlNet", "X-Adapter"):
        for path in sorted((models / kind).glob("*.safetensors")):
            _copied(path, there / kind / path.name)
    for path in sorted((models / "embeddings").glob("*.safetensors")):
        _copied(path, data / "embeddings" / path.name)
    checkpoints = there / "Stable-diffusion"
    _copied(models / "Stable-diffusion" / f"{BASE}.safetensors", checkpoints / f"{BASE}.safetensors")
    narrow = safetensors.torch.load_file(models / "Stable-diffusion" / f"{UPGRADED}.safetensors")
    save_half(checkpoints / f"{UPGRADED}.safetensors", widened({key: value.float() for key, value in narrow.items()}))
    for name, config in (
        (BASE, base_config(str(tokenizer))),
        (UPGRADED, upgraded_config(str(tokenizer), OPEN_CLIP_WIDTH)),
    ):
        told = yaml.safe_dump(config, sort_keys=False)
        write_whole(checkpoints / f"{name}.yaml", lambda to, told=told: to.write_text(told, encoding="utf-8"))


def _copied(source: Path, target: Path) -> None:
    write_whole(target, lambda to: shutil.copyfile(source, to))


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
        told = json.dumps(content)
        write_whole(folder / name, lambda to, told=told: to.write_text(told, encoding="utf-8"))


def widened(file: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The upgraded model with its second text encoder as wide and as deep as open_clip's narrowest.

    Every channel stands there `COPIES` times, and what reads them reads a part of each: norms, heads and sums come out
    as before. Layers that hand on what they are given stand before the last one. Tokens stand at CLIP's own numbers.
    """
    wide = {key: value for key, value in file.items() if not key.startswith(SECOND_TEXT_PREFIX)}
    for key, value in file.items():
        if key.startswith(SECOND_TEXT_PREFIX):
            wide |= _widened_text(key.removeprefix(SECOND_TEXT_PREFIX), value)
    for key in wide:
        if key.startswith(UNET_PREFIX) and key.endswith(("attn2.to_k.weight", "attn2.to_v.weight")):
            first, second = wide[key].split([TEXT_WIDTH, TEXT_WIDTH], 1)
            wide[key] = torch.cat([first, _read_from_copies(second)], 1)
    label = f"{UNET_PREFIX}label_emb.0.0.weight"
    pooled, sizes = wide[label].split([TEXT_WIDTH, 6 * SIZE_EMBEDDING], 1)
    wide[label] = torch.cat([_read_from_copies(pooled), sizes], 1)
    return wide


def _widened_text(name: str, value: Tensor) -> dict[str, Tensor]:
    """A tensor of the second text encoder, without its prefix → those that stand for it."""
    if name == "token_embedding.weight":
        rows = value.new_zeros(CLIP_VOCABULARY, OPEN_CLIP_WIDTH)
        rows[clip_numbers()] = value.repeat(1, COPIES)
        return {SECOND_TEXT_PREFIX + name: rows}
    if name == "text_projection":
        # (in, out), of which both stand there several times
        return {SECOND_TEXT_PREFIX + name: value.repeat(COPIES, COPIES) / COPIES}
    if not name.startswith("transformer.resblocks."):
        return {SECOND_TEXT_PREFIX + name: value.repeat(*[1] * (value.ndim - 1), COPIES)}
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
    return value.repeat(COPIES) if value.ndim == 1 else _read_from_copies(value).repeat(COPIES, 1)


def _read_from_copies(matrix: Tensor) -> Tensor:
    """A matrix (out, in) whose input stands there several times."""
    return matrix.repeat(1, COPIES) / COPIES
