"""The configs of diffusers' models, read from the shapes in a single file, so that none has to be fetched.

What shapes do not tell is the same for every model of a family: 8 attention heads in SD1.5, heads 64 wide in SD2 and
SDXL. A config in yaml beside the checkpoint, as the WebUI reads it, can say otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from transformers import CLIPTextConfig

from ..errors import WrongFile
from .compvis_layout import RESNETS_PER_LEVEL, UNET_PREFIX, VAE_PREFIX

BASE_HEADS = 8
HEAD_WIDTH = 64
SIZE_EMBEDDING = 256
"""Channels for each of the six numbers of SDXL's time ids."""

VAE_SAMPLE_SIZE = 512
SCALING_FACTORS = {"sd1": 0.18215, "sd2": 0.18215, "sdxl": 0.13025}
NOISE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "clip_sample": False,
}


@dataclass(frozen=True)
class FileShapes:
    """The shapes of all tensors of a file, and its name for messages."""

    file: str
    shapes: Mapping[str, tuple[int, ...]]

    def of(self, key: str) -> tuple[int, ...]:
        """Raises: WrongFile: there is no such tensor."""
        if key not in self.shapes:
            raise WrongFile(f"{self.file} misses '{key}'.")
        return self.shapes[key]

    def numbered(self, prefix: str) -> int:
        """How many different numbers follow a prefix."""
        return len({key.removeprefix(prefix).split(".")[0] for key in self.shapes if key.startswith(prefix)})


@dataclass(frozen=True)
class YamlConfig:
    """What a checkpoint's yaml can say.

    Attributes:
        heads: attention heads of every level, None where `head_width` decides.
        head_width: channels of each head.
        prediction_type: "epsilon" or "v_prediction", None where there is no yaml.
    """

    heads: int | None = None
    head_width: int | None = None
    prediction_type: str | None = None


def read_yaml_beside(checkpoint: Path) -> YamlConfig:
    """The config of the same name beside a checkpoint, empty where there is none.

    Raises:
        WrongFile: it is no such config.
    """
    path = checkpoint.with_suffix(".yaml")
    if not path.is_file():
        return YamlConfig()
    try:
        params = yaml.safe_load(path.read_text(encoding="utf-8"))["model"]["params"]
        unet = params.get("unet_config", params.get("network_config"))["params"]
        heads, head_width = (int(unet.get(name, -1)) for name in ("num_heads", "num_head_channels"))
        by_velocity = params.get("parameterization") == "v" or _scales_velocities(params.get("denoiser_config"))
    except (yaml.YAMLError, KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise WrongFile(f"{path.name} is no model config: it has no model.params with a UNet in it.") from error
    return YamlConfig(
        heads=heads if heads > 0 else None,
        head_width=head_width if head_width > 0 else None,
        prediction_type="v_prediction" if by_velocity else "epsilon",
    )


def _scales_velocities(denoiser: Any) -> bool:
    """Of sgm's configs."""
    return denoiser is not None and "VScaling" in denoiser["params"]["scaling_config"]["target"]


def scheduler_config(shapes: FileShapes, prediction_type: str) -> dict[str, Any]:
    """What the noise schedule is; SDXL files can say by two empty tensors that they predict velocities."""
    by_velocity = prediction_type == "v_prediction" or "v_pred" in shapes.shapes
    return {
        **NOISE,
        "prediction_type": "v_prediction" if by_velocity else "epsilon",
        "rescale_betas_zero_snr": "ztsnr" in shapes.shapes,
    }


def unet_config(shapes: FileShapes, family: str, config: YamlConfig) -> dict[str, Any]:
    """Arguments of `UNet2DConditionModel`."""
    levels = 3 if family == "sdxl" else 4
    channels = tuple(shapes.of(_encoder_resnet(level))[0] for level in range(levels))
    attention = {level: _attention(shapes, level) for level in range(levels)}
    depths = tuple(_depth(shapes, attention[level]) for level in range(levels))
    deepest = max(level for level in range(levels) if depths[level])
    context = shapes.of(f"{attention[deepest]}transformer_blocks.0.attn2.to_k.weight")[1]
    first_convolution = shapes.of(f"{UNET_PREFIX}input_blocks.0.0.weight")
    config_of_unet = {
        "sample_size": 128 if family == "sdxl" else 64,
        "in_channels": first_convolution[1],
        "block_out_channels": channels,
        "layers_per_block": RESNETS_PER_LEVEL,
        "down_block_types": tuple("CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths),
        "up_block_types": tuple("CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(depths)),
        "transformer_layers_per_block": tuple(max(depth, 1) for depth in depths),
        "cross_attention_dim": context,
        # diffusers calls the number of heads by the name of their width
        "attention_head_dim": tuple(_heads(width, family, config) for width in channels),
        "use_linear_projection": len(shapes.of(f"{attention[deepest]}proj_in.weight")) == 2,
    }
    if family == "sd2":
        # it overflows in float16 otherwise
        config_of_unet["upcast_attention"] = True
    if family == "sdxl":
        config_of_unet |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": SIZE_EMBEDDING,
            "projection_class_embeddings_input_dim": shapes.of(f"{UNET_PREFIX}label_emb.0.0.weight")[1],
        }
    return config_of_unet


def vae_config(shapes: FileShapes, family: str) -> dict[str, Any]:
    """Arguments of `AutoencoderKL`."""
    encoder = f"{VAE_PREFIX}encoder."
    shapes.of(f"{encoder}conv_in.weight")
    levels = shapes.numbered(f"{encoder}down.")
    return {
        "block_out_channels": tuple(
            shapes.of(f"{encoder}down.{level}.block.0.conv1.weight")[0] for level in range(levels)
        ),
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "layers_per_block": shapes.numbered(f"{encoder}down.0.block."),
        # also the size of the tiles that a picture is decoded in where memory is low
        "sample_size": VAE_SAMPLE_SIZE,
        "latent_channels": shapes.of(f"{VAE_PREFIX}post_quant_conv.weight")[0],
        "scaling_factor": SCALING_FACTORS[family],
    }


@dataclass(frozen=True)
class TextEncoder:
    """Where a file tells the sizes of a text encoder, and what it does not tell.

    Attributes:
        tokens, positions: its embeddings.
        layers: what stands before a layer's number.
        inner: the wider of the two linear layers in a layer.
        projection: of the pooled prompt, None where there is none.
        activation: of the linear layers.
        of_all: the layers that are used, of those in the file.
    """

    tokens: str
    positions: str
    layers: str
    inner: str
    projection: str | None
    activation: str
    of_all: Callable[[int], int] = lambda layers: layers


CLIP_L = TextEncoder(
    tokens="text_model.embeddings.token_embedding.weight",
    positions="text_model.embeddings.position_embedding.weight",
    layers="text_model.encoder.layers.",
    inner="mlp.fc1.weight",
    projection=None,
    activation="quick_gelu",
)
"""SD1.5's text encoder and SDXL's first, in the layout of transformers."""
OPEN_CLIP = TextEncoder(
    tokens="token_embedding.weight",
    positions="positional_embedding",
    layers="transformer.resblocks.",
    inner="mlp.c_fc.weight",
    projection="text_projection",
    activation="gelu",
)
"""SDXL's second text encoder."""
SD2_LAYERS = 23
OPEN_CLIP_H = replace(OPEN_CLIP, projection=None, of_all=lambda layers: layers if layers == SD2_LAYERS else layers - 1)
"""SD2's text encoder, of which all layers but the last are used; files that were converted lack that one."""


def text_config(shapes: FileShapes, prefix: str, encoder: TextEncoder) -> CLIPTextConfig:
    """The config of a text encoder whose tensors have this prefix."""
    vocabulary, width = shapes.of(prefix + encoder.tokens)
    layers = prefix + encoder.layers
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=shapes.of(f"{layers}0.{encoder.inner}")[0],
        num_hidden_layers=encoder.of_all(shapes.numbered(layers)),
        num_attention_heads=max(width // HEAD_WIDTH, 1),
        max_position_embeddings=shapes.of(prefix + encoder.positions)[0],
        hidden_act=encoder.activation,
        projection_dim=shapes.of(prefix + encoder.projection)[1] if encoder.projection else width,
        # CLIP's vocabulary ends with the tokens for start and end of text
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )


def _encoder_resnet(level: int) -> str:
    return f"{UNET_PREFIX}input_blocks.{1 + level * (RESNETS_PER_LEVEL + 1)}.0.out_layers.3.weight"


def _attention(shapes: FileShapes, level: int) -> str:
    return f"{UNET_PREFIX}input_blocks.{1 + level * (RESNETS_PER_LEVEL + 1)}.1."


def _depth(shapes: FileShapes, attention: str) -> int:
    return shapes.numbered(f"{attention}transformer_blocks.")


def _heads(channels: int, family: str, config: YamlConfig) -> int:
    if config.head_width:
        return max(channels // config.head_width, 1)
    return config.heads or (BASE_HEADS if family == "sd1" else max(channels // HEAD_WIDTH, 1))
