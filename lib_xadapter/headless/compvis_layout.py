"""How tensors of diffusers' models are called in single files, the CompVis layout, and the way between the two.

Sources: ldm `openaimodel.py` and `diffusionmodules/model.py`, sgm `openaimodel.py`, ControlNet `cldm.py`, open_clip
`transformer.py`. One table for reading and writing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import WrongFile

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
BASE_TEXT_PREFIX = "cond_stage_model.transformer."
SD2_TEXT_PREFIX = "cond_stage_model.model."
FIRST_TEXT_PREFIX = "conditioner.embedders.0.transformer."
SECOND_TEXT_PREFIX = "conditioner.embedders.1.model."
CONTROLNET_PREFIX = "control_model."

RESNETS_PER_LEVEL = 2


@dataclass(frozen=True)
class Origin:
    """Where a tensor of diffusers lies in a single file.

    Attributes:
        name: the tensor there.
        third: which third of it, where query, key and value are one tensor.
        transposed: whether it is stored the other way round.
    """

    name: str
    third: int | None = None
    transposed: bool = False


Table = Callable[[str], Origin]
"""A tensor's name in diffusers → its origin."""

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "controlnet_cond_embedding.conv_in": "input_hint_block.0",
    "controlnet_cond_embedding.conv_out": "input_hint_block.14",
    "controlnet_mid_block": "middle_block_out.0",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP_ENDS = {
    "embeddings.token_embedding": "token_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm": "ln_final",
}
OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
QUERY_KEY_VALUE = re.compile(r"self_attn\.([qkv])_proj\.(weight|bias)")


def unet_table(attention_levels: Iterable[int]) -> Table:
    """The table of a UNet or ControlNet.

    Args:
        attention_levels: decoder levels, coarsest first, that have attention: their upsampling stands behind it.
    """
    with_attention = frozenset(attention_levels)

    def origin(name: str) -> Origin:
        for ours, theirs in UNET_ENDS.items():
            if name.startswith(f"{ours}."):
                return Origin(theirs + name.removeprefix(ours))
        block, layer, rest = _unet_block(name, with_attention)
        return Origin(f"{block}.{layer}.{_renamed(rest, RESNET)}" if rest else f"{block}.{layer}")

    return origin


def _unet_block(name: str, with_attention: frozenset[int]) -> tuple[str, str, str]:
    """Block, layer in it, and the rest of the name."""
    if found := re.fullmatch(r"controlnet_down_blocks\.(\d+)\.(.+)", name):
        return f"zero_convs.{found[1]}", "0", found[2]
    if found := re.fullmatch(r"controlnet_cond_embedding\.blocks\.(\d+)\.(.+)", name):
        return "input_hint_block", str(2 * int(found[1]) + 2), found[2]
    if found := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", name):
        return "middle_block", "1" if found[1] == "attentions" else str(2 * int(found[2])), found[3]
    found = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", name)
    if found is None:
        raise KeyError(name)
    side, level, kind, index, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
    if kind == "downsamplers":
        return f"input_blocks.{(level + 1) * (RESNETS_PER_LEVEL + 1)}", "0", rest.replace("conv.", "op.")
    if kind == "upsamplers":
        layer = "2" if level in with_attention else "1"
        return f"output_blocks.{level * (RESNETS_PER_LEVEL + 1) + RESNETS_PER_LEVEL}", layer, rest
    first = 1 if side == "down" else 0
    blocks = "input_blocks" if side == "down" else "output_blocks"
    layer = "1" if kind == "attentions" else "0"
    return f"{blocks}.{first + level * (RESNETS_PER_LEVEL + 1) + index}", layer, rest


def vae_table(levels: int) -> Table:
    """The table of a VAE with so many levels."""

    def origin(name: str) -> Origin:
        name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
        if found := re.fullmatch(r"(.+)\.mid_block\.attentions\.0\.(.+)", name):
            return Origin(f"{found[1]}.mid.attn_1.{_renamed(found[2], VAE_ATTENTION)}")
        name = re.sub(r"up_blocks\.(\d+)", lambda found: f"up.{levels - 1 - int(found[1])}", name)
        name = name.replace("down_blocks.", "down.").replace(".resnets.", ".block.")
        return Origin(name.replace("downsamplers.0", "downsample").replace("upsamplers.0", "upsample"))

    return origin


def clip_origin(name: str) -> Origin:
    """The table of CLIP-L, which single files hold in the layout of transformers."""
    return Origin(f"text_model.{name.removeprefix('text_model.')}")


def open_clip_origin(name: str) -> Origin:
    """The table of OpenCLIP, SD2's text encoder and SDXL's second."""
    name = name.removeprefix("text_model.")
    if name == "text_projection.weight":
        return Origin("text_projection", transposed=True)
    found = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)", name)
    if found is None:
        return Origin(_renamed(name, OPEN_CLIP_ENDS))
    block, rest = f"transformer.resblocks.{found[1]}", found[2]
    if part := QUERY_KEY_VALUE.fullmatch(rest):
        return Origin(f"{block}.attn.in_proj_{part[2]}", third="qkv".index(part[1]))
    return Origin(f"{block}.{_renamed(rest, OPEN_CLIP_LAYER)}")


def read_compvis(
    file: Mapping[str, Tensor], prefix: str, module: torch.nn.Module, table: Table, file_name: str
) -> dict[str, Tensor]:
    """The state dict of a module of diffusers, from a single file.

    Args:
        file: all tensors of the file.
        prefix: of the module's tensors in it.
        module: on the meta device; its shapes are what is expected.
        table: of the module.
        file_name: for messages.

    Raises:
        WrongFile: naming the first tensor that is missing or of another shape.
    """
    state = {}
    for name, wanted in module.state_dict().items():
        if name.endswith("position_ids"):
            continue
        origin = table(name)
        key = prefix + origin.name
        if key not in file:
            raise WrongFile(f"{file_name} misses '{key}'.")
        state[name] = _read(file[key], origin, wanted.shape, key, file_name)
    return state


def _read(tensor: Tensor, origin: Origin, shape: torch.Size, key: str, file_name: str) -> Tensor:
    if origin.third is not None:
        tensor = tensor.chunk(3)[origin.third]
    if origin.transposed:
        tensor = tensor.T
    # a 1x1 convolution here can be a linear layer there
    if _without_kernel(tensor.shape) != _without_kernel(shape):
        found = "x".join(map(str, tensor.shape))
        raise WrongFile(f"{file_name}: '{key}' is {found}, expected {'x'.join(map(str, shape))}.")
    return tensor.reshape(shape).contiguous()


def _without_kernel(shape: torch.Size) -> tuple[int, ...]:
    return tuple(shape[:2]) if shape[2:] == (1, 1) else tuple(shape)


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """A state dict without what counts positions, which files do not hold."""
    return {key: value for key, value in module.state_dict().items() if value.dtype.is_floating_point}


def write_compvis(state: Mapping[str, Tensor], prefix: str, table: Table) -> dict[str, Tensor]:
    """The other way: a module's state dict under the names of single files."""
    file: dict[str, Tensor] = {}
    thirds: dict[str, dict[int, Tensor]] = {}
    for name, tensor in state.items():
        origin = table(name)
        key = prefix + origin.name
        if origin.third is not None:
            thirds.setdefault(key, {})[origin.third] = tensor
        elif ".attn_1." in key and tensor.ndim == 2:
            file[key] = tensor[:, :, None, None]
        else:
            file[key] = (tensor.T if origin.transposed else tensor).contiguous()
    return file | {key: torch.cat([parts[third] for third in range(3)]) for key, parts in thirds.items()}


def _renamed(name: str, names: Mapping[str, str]) -> str:
    for ours, theirs in names.items():
        if name == ours or name.startswith(f"{ours}."):
            return theirs + name.removeprefix(ours)
    return name
