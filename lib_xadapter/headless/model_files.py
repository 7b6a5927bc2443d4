"""Models from the user's files: single files as the WebUI keeps them, and folders of diffusers. Nothing is fetched."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    T2IAdapter,
    UNet2DConditionModel,
)
from diffusers.configuration_utils import FrozenDict
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from ..checkpoint_files import detect_checkpoint_family, input_channels
from ..errors import DoesNotFit, WrongFile
from ..families import BASE_FAMILIES, FAMILY_NAMES
from ..mapping import read_weights
from ..pickled_weights import read_pickle
from .compvis_layout import (
    BASE_TEXT_PREFIX,
    CONTROLNET_PREFIX,
    FIRST_TEXT_PREFIX,
    SD2_TEXT_PREFIX,
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
from .inpainting import LATENT_CHANNELS
from .model_configs import (
    CLIP_L,
    OPEN_CLIP,
    OPEN_CLIP_H,
    FileShapes,
    YamlConfig,
    read_yaml_beside,
    scheduler_config,
    text_config,
    unet_config,
    vae_config,
)
from .tokenizers import OPEN_CLIP_PADDING, load_tokenizer

BASE_PIPELINES = ("StableDiffusionPipeline", "StableDiffusionInpaintPipeline")
UPGRADED_PIPELINES = ("StableDiffusionXLPipeline", "StableDiffusionXLInpaintPipeline")
EDM_KEYS = frozenset({"edm_mean", "edm_std"})
"""Of a single file, what its latents are centred by."""
EDM_CONFIG = "sigma_data"
"""What every scheduler of EDM's is told, and no other."""
INPUT_CHANNELS = (4, 9)
"""Of ordinary models and of those for inpainting."""


def family_of(pipeline: Any) -> str:
    """Of SD1.5 ("sd1"), SD2 ("sd2") or SDXL ("sdxl"): SD1's UNet alone leads into its transformers by convolutions."""
    if getattr(pipeline, "text_encoder_2", None) is not None:
        return "sdxl"
    return "sd2" if pipeline.unet.config.use_linear_projection else "sd1"


def load_base(path: Path, dtype: torch.dtype, tokenizer: Path | None = None) -> StableDiffusionPipeline:
    """SD1.5 or SD2, for inpainting or not, from a single file or a folder of diffusers.

    Args:
        path: the file or folder.
        dtype: of UNet and text encoder; the VAE stays in float32.
        tokenizer: a folder with CLIP's vocabulary, for single files; None looks into the installed packages.

    Raises:
        WrongFile: naming what is missing, or the family that the file is of instead.
    """
    if path.is_dir():
        return _load_folder(StableDiffusionPipeline, path, BASE_FAMILIES, BASE_PIPELINES, dtype, safety_checker=None)
    file = _SingleFile(path, BASE_FAMILIES, dtype)
    is_sd2 = file.family == "sd2"
    prefix, layout = (SD2_TEXT_PREFIX, OPEN_CLIP_H) if is_sd2 else (BASE_TEXT_PREFIX, CLIP_L)
    encoder = text_config(file.shapes, prefix, layout)
    unet = file.unet()
    return StableDiffusionPipeline(
        vae=file.vae(),
        text_encoder=file.part(lambda: CLIPTextModel(encoder), prefix, open_clip_origin if is_sd2 else clip_origin),
        tokenizer=load_tokenizer(tokenizer, OPEN_CLIP_PADDING) if is_sd2 else load_tokenizer(tokenizer),
        unet=unet,
        scheduler=file.scheduler(unet),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def load_upgraded(path: Path, dtype: torch.dtype, tokenizer: Path | None = None) -> StableDiffusionXLPipeline:
    """SDXL, for inpainting or not; arguments and errors as for `load_base`."""
    if path.is_dir():
        return _load_folder(StableDiffusionXLPipeline, path, ("sdxl",), UPGRADED_PIPELINES, dtype)
    file = _SingleFile(path, ("sdxl",), dtype)
    first = text_config(file.shapes, FIRST_TEXT_PREFIX, CLIP_L)
    second = text_config(file.shapes, SECOND_TEXT_PREFIX, OPEN_CLIP)
    unet = file.unet()
    return StableDiffusionXLPipeline(
        vae=file.vae(),
        text_encoder=file.part(lambda: CLIPTextModel(first), FIRST_TEXT_PREFIX, clip_origin),
        text_encoder_2=file.part(lambda: CLIPTextModelWithProjection(second), SECOND_TEXT_PREFIX, open_clip_origin),
        tokenizer=load_tokenizer(tokenizer),
        tokenizer_2=load_tokenizer(tokenizer, OPEN_CLIP_PADDING),
        unet=unet,
        scheduler=file.scheduler(unet),
        add_watermarker=False,
    )


def load_control(path: Path, unet: UNet2DConditionModel, dtype: torch.dtype) -> ControlNetModel | T2IAdapter:
    """A ControlNet as by `load_controlnet`, or a T2I-Adapter from a folder of diffusers; errors as there."""
    if not _is_t2i_adapter(path):
        return load_controlnet(path, unet, dtype)
    adapter = _from_pretrained(T2IAdapter, path, dtype)
    given, taken = list(adapter.config.channels), list(unet.config.block_out_channels)
    if given != taken:
        raise DoesNotFit(
            f"The T2I-Adapter {path.name} gives features of {', '.join(map(str, given))} channels, the model takes "
            f"{', '.join(map(str, taken))}: it was made for another one."
        )
    return adapter.eval().requires_grad_(False)


def _is_t2i_adapter(path: Path) -> bool:
    try:
        return json.loads((path / "config.json").read_text(encoding="utf-8"))["_class_name"] == T2IAdapter.__name__
    except (OSError, ValueError, KeyError, TypeError):
        return False


def load_controlnet(path: Path, unet: UNet2DConditionModel, dtype: torch.dtype) -> ControlNetModel:
    """A ControlNet for a UNet, from a single file (CompVis or diffusers layout) or a folder of diffusers.

    Raises:
        WrongFile: it is no ControlNet.
        DoesNotFit: it was made for another model.
    """
    if path.is_dir():
        net = _from_pretrained(ControlNetOfLatents, path, dtype)
    else:
        file = read_weights(path)
        with torch.device("meta"):
            net = _controlnet_like(unet, attention=any("transformer_blocks" in key for key in file))
        weights = _controlnet_weights(path.name, file, net, unet)
        check_finite(weights, path.name)
        with_weights(net, weights, dtype)
    if net.config.cross_attention_dim not in (unet.config.cross_attention_dim, None):
        raise DoesNotFit(
            f"The ControlNet {path.name} takes prompts of {net.config.cross_attention_dim} channels, "
            f"the model gives {unet.config.cross_attention_dim}: it was made for another one."
        )
    return net.eval().requires_grad_(False)


class ControlNetOfLatents(ControlNetModel):
    """Beside an inpainting model, a ControlNet gets the latent alone."""

    def forward(self, sample: Tensor, *arguments: Any, **named: Any) -> Any:
        return super().forward(sample[:, : self.config.in_channels], *arguments, **named)


def _controlnet_like(unet: UNet2DConditionModel, attention: bool) -> ControlNetModel:
    """One with the layers of a UNet's encoder; SDXL's small ones have none of its attention."""
    net = ControlNetOfLatents.from_unet(_without_mask(unet), load_weights_from_unet=False)
    if attention:
        return net
    levels = len(net.config.block_out_channels)
    bare = {"down_block_types": ("DownBlock2D",) * levels, "mid_block_type": "UNetMidBlock2D"}
    return ControlNetOfLatents.from_config({**net.config, **bare, "cross_attention_dim": None})


def _without_mask(unet: UNet2DConditionModel) -> Any:
    """A UNet's config, of an ordinary model, as diffusers makes ControlNets from one."""
    return SimpleNamespace(config=FrozenDict({**unet.config, "in_channels": LATENT_CHANNELS}))


def _controlnet_weights(
    name: str, file: Mapping[str, Tensor], net: ControlNetModel, unet: UNet2DConditionModel
) -> dict[str, Tensor]:
    prefix = CONTROLNET_PREFIX if any(key.startswith(CONTROLNET_PREFIX) for key in file) else ""
    if "controlnet_mid_block.weight" in file:
        table: Table = _unchanged
    elif f"{prefix}middle_block_out.0.weight" in file:
        table = unet_table_of(unet)
    else:
        raise WrongFile(f"{name} is no ControlNet: it misses 'middle_block_out.0.weight'.")
    try:
        return read_compvis(file, prefix, net, table, name)
    except WrongFile as error:
        raise DoesNotFit(f"The ControlNet does not fit the model: {error}") from error


def unet_table_of(unet: UNet2DConditionModel) -> Table:
    """The table of names for a UNet, and for ControlNets made from it."""
    types = unet.config.up_block_types
    return unet_table(level for level, kind in enumerate(types) if kind.startswith("CrossAttn"))


def _unchanged(name: str) -> Origin:
    return Origin(name)


class _SingleFile:
    """A checkpoint file while its parts are taken out."""

    def __init__(self, path: Path, families: Sequence[str], dtype: torch.dtype) -> None:
        self.family = detect_checkpoint_family(path)
        if self.family not in families:
            known = self.family in FAMILY_NAMES
            what = f"a checkpoint of {FAMILY_NAMES[self.family]}" if known else "no checkpoint that is known"
            raise WrongFile(f"{path.name} is {what}, expected {_either(families)}.")
        check_channels(path.name, input_channels(path))
        self._path = path
        self._dtype = dtype
        self._config: YamlConfig = read_yaml_beside(path)
        self._weights = read_checkpoint(path)
        check_noise_levels(path.name, is_edm=not EDM_KEYS.isdisjoint(self._weights))
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
        config = unet_config(self.shapes, self.family, self._config)
        levels = [level for level, kind in enumerate(config["up_block_types"]) if kind.startswith("CrossAttn")]
        return self.part(lambda: UNet2DConditionModel(**config), UNET_PREFIX, unet_table(levels))

    def vae(self) -> AutoencoderKL:
        config = vae_config(self.shapes, self.family)
        table = vae_table(len(config["block_out_channels"]))
        return self.part(lambda: AutoencoderKL(**config), VAE_PREFIX, table, torch.float32)

    def scheduler(self, unet: UNet2DConditionModel) -> DDIMScheduler:
        predicts = self._config.prediction_type
        if predicts is None:
            # SD2's checkpoints do not say it; those for inpainting all predict the noise
            asked = self.family == "sd2" and unet.config.in_channels == LATENT_CHANNELS
            predicts = "v_prediction" if asked and predicts_velocity(unet) else "epsilon"
        return DDIMScheduler(**scheduler_config(self.shapes, predicts))


@torch.no_grad()
def predicts_velocity(unet: UNet2DConditionModel) -> bool:
    """Whether an SD2 model predicts the velocity, told by what it makes of even grey at the noisiest timestep.

    The WebUI's way, for checkpoints without a yaml (`modules/sd_models_config.py`): who predicts the noise gives about
    its input back.
    """
    latent = torch.full((1, LATENT_CHANNELS, 8, 8), 0.5, dtype=unet.dtype)
    prompt = torch.full((1, 2, unet.config.cross_attention_dim), 0.5, dtype=unet.dtype)
    return float((unet(latent, 999, prompt).sample - latent).float().mean()) < -1


def check_channels(name: str, channels: int | None) -> None:
    """Raises: WrongFile: the model takes more than latents, or latents with a mask and a picture."""
    if channels not in INPUT_CHANNELS:
        raise WrongFile(
            f"{name} takes {channels} channels, expected 4, or 9 for inpainting: it is made to edit pictures by words "
            "or depth, which is not read here."
        )


def check_noise_levels(name: str, is_edm: bool) -> None:
    """Raises: WrongFile: noise and latents are scaled as in EDM (arXiv 2206.00364), which no timestep stands for."""
    if is_edm:
        raise WrongFile(
            f"{name} was trained by the rules of EDM, as Playground v2.5 was: its noise levels and latents are not "
            "those of SD1.5 and SDXL, so that they cannot be brought together here."
        )


def _either(families: Sequence[str]) -> str:
    return " or ".join(FAMILY_NAMES[family] for family in families)


def check_finite(weights: Mapping[str, Tensor], file_name: str) -> None:
    """Raises: WrongFile: naming the first tensor that holds NaN or infinite values."""
    for name, tensor in weights.items():
        if not bool(torch.isfinite(tensor).all()):
            raise WrongFile(f"{file_name}: '{name}' holds NaN or infinite values.")


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint; those of a pickle lie under "state_dict"."""
    if path.suffix.lower() == ".safetensors":
        return read_weights(path)
    found = read_pickle(path)
    if not isinstance(found, dict):
        raise WrongFile(f"{path.name} holds something other than named tensors.")
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


def _load_folder(
    kind: type, path: Path, families: Sequence[str], names: Sequence[str], dtype: torch.dtype, **parts: Any
) -> Any:
    index = path / "model_index.json"
    if not index.is_file():
        raise WrongFile(f"The folder {path} is no model of diffusers: it misses model_index.json.")
    try:
        name = json.loads(index.read_text(encoding="utf-8")).get("_class_name")
    except ValueError as error:
        raise WrongFile(f"{index} is no JSON: {error}.") from error
    if name not in names:
        raise WrongFile(f"The folder {path} holds a {name}, expected {_either(families)} ({' or '.join(names)}).")
    pipeline = _from_pretrained(kind, path, dtype, **parts)
    check_channels(f"The folder {path}", pipeline.unet.config.in_channels)
    is_edm = EDM_CONFIG in pipeline.scheduler.config or bool(getattr(pipeline.vae.config, "latents_mean", None))
    check_noise_levels(f"The folder {path}", is_edm)
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
