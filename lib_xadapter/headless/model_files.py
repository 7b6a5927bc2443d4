"""Models from the user's files: single files as the WebUI keeps them, and folders of diffusers. Nothing is fetched."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from ..checkpoint_files import detect_checkpoint_family, input_channels
from ..errors import DoesNotFit, WrongFile
from ..families import FAMILY_NAMES
from ..mapping import read_weights
from .compvis_layout import (
    BASE_TEXT_PREFIX,
    CONTROLNET_PREFIX,
    FIRST_TEXT_PREFIX,
    SECOND_TEXT_PREFIX,
    UNET_PREFIX,
    VAE_PREFIX,
    Origin,
    Table,
    clip_origin,
    open_clip_origin,
    read_compvis,
    unet_table,
    vae_table,
)
from .model_configs import (
    CLIP_L,
    OPEN_CLIP,
    FileShapes,
    YamlConfig,
    read_yaml_beside,
    scheduler_config,
    text_config,
    unet_config,
    vae_config,
)
from .tokenizers import SDXL_SECOND_PADDING, load_tokenizer

PIPELINES = {"sd1": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}


def load_base(path: Path, dtype: torch.dtype, tokenizer: Path | None = None) -> StableDiffusionPipeline:
    """SD1.5 from a single file or a folder of diffusers.

    Args:
        path: the file or folder.
        dtype: of UNet and text encoder; the VAE stays in float32.
        tokenizer: a folder with CLIP's vocabulary, for single files; None looks into the installed packages.

    Raises:
        WrongFile: naming what is missing, or the family that the file is of instead.
    """
    if path.is_dir():
        return _load_folder(StableDiffusionPipeline, path, "sd1", dtype, safety_checker=None)
    file = _SingleFile(path, "sd1", dtype)
    encoder = text_config(file.shapes, BASE_TEXT_PREFIX, CLIP_L)
    return StableDiffusionPipeline(
        vae=file.vae(),
        text_encoder=file.part(lambda: CLIPTextModel(encoder), BASE_TEXT_PREFIX, clip_origin),
        tokenizer=load_tokenizer(tokenizer),
        unet=file.unet(),
        scheduler=file.scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def load_upgraded(path: Path, dtype: torch.dtype, tokenizer: Path | None = None) -> StableDiffusionXLPipeline:
    """SDXL from a single file or a folder of diffusers; arguments and errors as for `load_base`."""
    if path.is_dir():
        return _load_folder(StableDiffusionXLPipeline, path, "sdxl", dtype)
    file = _SingleFile(path, "sdxl", dtype)
    first = text_config(file.shapes, FIRST_TEXT_PREFIX, CLIP_L)
    second = text_config(file.shapes, SECOND_TEXT_PREFIX, OPEN_CLIP)
    return StableDiffusionXLPipeline(
        vae=file.vae(),
        text_encoder=file.part(lambda: CLIPTextModel(first), FIRST_TEXT_PREFIX, clip_origin),
        text_encoder_2=file.part(lambda: CLIPTextModelWithProjection(second), SECOND_TEXT_PREFIX, open_clip_origin),
        tokenizer=load_tokenizer(tokenizer),
        tokenizer_2=load_tokenizer(tokenizer, SDXL_SECOND_PADDING),
        unet=file.unet(),
        scheduler=file.scheduler(),
        add_watermarker=False,
    )


def load_controlnet(path: Path, base_unet: UNet2DConditionModel, dtype: torch.dtype) -> ControlNetModel:
    """A ControlNet for a base, from a single file (CompVis or diffusers layout) or a folder of diffusers.

    Raises:
        WrongFile: it is no ControlNet.
        DoesNotFit: it was made for another model.
    """
    if path.is_dir():
        net = _from_pretrained(ControlNetModel, path, dtype)
    else:
        with torch.device("meta"):
            net = ControlNetModel.from_unet(base_unet, load_weights_from_unet=False)
        weights = _controlnet_weights(path, net, base_unet)
        check_finite(weights, path.name)
        with_weights(net, weights, dtype)
    if net.config.cross_attention_dim != base_unet.config.cross_attention_dim:
        raise DoesNotFit(
            f"The ControlNet {path.name} takes prompts of {net.config.cross_attention_dim} channels, "
            f"the base gives {base_unet.config.cross_attention_dim}: it was made for another model."
        )
    return net.eval().requires_grad_(False)


def _controlnet_weights(path: Path, net: ControlNetModel, base_unet: UNet2DConditionModel) -> dict[str, Tensor]:
    file = read_weights(path)
    prefix = CONTROLNET_PREFIX if any(key.startswith(CONTROLNET_PREFIX) for key in file) else ""
    if "controlnet_mid_block.weight" in file:
        table: Table = _unchanged
    elif f"{prefix}middle_block_out.0.weight" in file:
        table = unet_table_of(base_unet)
    else:
        raise WrongFile(f"{path.name} is no ControlNet: it misses 'middle_block_out.0.weight'.")
    try:
        return read_compvis(file, prefix, net, table, path.name)
    except WrongFile as error:
        raise DoesNotFit(f"The ControlNet does not fit the base model: {error}") from error


def unet_table_of(unet: UNet2DConditionModel) -> Table:
    """The table of names for a UNet, and for ControlNets made from it."""
    types = unet.config.up_block_types
    return unet_table(level for level, kind in enumerate(types) if kind.startswith("CrossAttn"))


def _unchanged(name: str) -> Origin:
    return Origin(name)


class _SingleFile:
    """A checkpoint file while its parts are taken out."""

    def __init__(self, path: Path, family: str, dtype: torch.dtype) -> None:
        found = detect_checkpoint_family(path)
        if found != family:
            what = f"a checkpoint of {FAMILY_NAMES[found]}" if found in FAMILY_NAMES else "no checkpoint that is known"
            raise WrongFile(f"{path.name} is {what}, expected {FAMILY_NAMES[family]}.")
        if input_channels(path) != 4:
            raise WrongFile(f"{path.name} is an inpainting checkpoint ({input_channels(path)} channels), expected 4.")
        self._path = path
        self._family = family
        self._dtype = dtype
        self._config: YamlConfig = read_yaml_beside(path)
        self._weights = read_checkpoint(path)
        self.shapes = FileShapes(path.name, {key: tuple(value.shape) for key, value in self._weights.items()})

    def part(self, make: Callable[[], nn.Module], prefix: str, table: Table, dtype: torch.dtype | None = None) -> Any:
        """A module with the file's weights."""
        with torch.device("meta"):
            module = make()
        state = read_compvis(self._weights, prefix, module, table, self._path.name)
        for name, tensor in state.items():
            if not bool(torch.isfinite(tensor).all()):
                raise WrongFile(f"{self._path.name}: '{prefix}{table(name).name}' holds NaN or infinite values.")
        return with_weights(module, state, dtype or self._dtype)

    def unet(self) -> UNet2DConditionModel:
        config = unet_config(self.shapes, self._family, self._config)
        levels = [level for level, kind in enumerate(config["up_block_types"]) if kind.startswith("CrossAttn")]
        return self.part(lambda: UNet2DConditionModel(**config), UNET_PREFIX, unet_table(levels))

    def vae(self) -> AutoencoderKL:
        config = vae_config(self.shapes, self._family)
        table = vae_table(len(config["block_out_channels"]))
        return self.part(lambda: AutoencoderKL(**config), VAE_PREFIX, table, torch.float32)

    def scheduler(self) -> DDIMScheduler:
        return DDIMScheduler(**scheduler_config(self.shapes, self._config))


def check_finite(weights: Mapping[str, Tensor], file_name: str) -> None:
    """Raises: WrongFile: naming the first tensor that holds NaN or infinite values."""
    for name, tensor in weights.items():
        if not bool(torch.isfinite(tensor).all()):
            raise WrongFile(f"{file_name}: '{name}' holds NaN or infinite values.")


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint; those of a pickle lie under "state_dict"."""
    if path.suffix.lower() == ".safetensors":
        return read_weights(path)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a pickle can fail in any way
        raise WrongFile(f"{path.name} is cut off or holds more than tensors: convert it to safetensors.") from error
    found = found.get("state_dict", found)
    return {key: value for key, value in found.items() if isinstance(value, Tensor)}


def with_weights(module: nn.Module, state: dict[str, Tensor], dtype: torch.dtype) -> nn.Module:
    """A module made on the meta device, with its weights."""
    weights = {name: tensor.to(dtype) for name, tensor in state.items()}
    module.load_state_dict(weights, assign=True, strict=False)
    for child in module.modules():
        # a buffer that files leave out, as it only counts
        if getattr(getattr(child, "position_ids", None), "is_meta", False):
            child.position_ids = torch.arange(child.position_ids.shape[-1])[None]
    return module.eval().requires_grad_(False)


def _load_folder(kind: type, path: Path, family: str, dtype: torch.dtype, **parts: Any) -> Any:
    index = path / "model_index.json"
    if not index.is_file():
        raise WrongFile(f"The folder {path} is no model of diffusers: it misses model_index.json.")
    try:
        name = json.loads(index.read_text(encoding="utf-8")).get("_class_name")
    except ValueError as error:
        raise WrongFile(f"{index} is no JSON: {error}.") from error
    if name != PIPELINES[family]:
        raise WrongFile(f"The folder {path} holds a {name}, expected {FAMILY_NAMES[family]} ({PIPELINES[family]}).")
    pipeline = _from_pretrained(kind, path, dtype, **parts)
    pipeline.vae.to(torch.float32)
    for module in pipeline.components.values():
        if isinstance(module, nn.Module):
            module.eval().requires_grad_(False)
    return pipeline


def _from_pretrained(kind: type, path: Path, dtype: torch.dtype, **more: Any) -> Any:
    try:
        return kind.from_pretrained(str(path), dtype=dtype, local_files_only=True, **more)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        lines = str(error).strip().splitlines()
        raise WrongFile(f"The folder {path} cannot be read: {lines[0] if lines else type(error).__name__}") from error
