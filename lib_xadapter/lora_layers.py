"""What a LoRA file changes: which layers, where in the model they stand, and how wide they are.

Three questions, three tables: `MODEL_PARTS` says which part of a model a key belongs to, `PLACES` where in the UNet a
layer stands, `FORMATS` what a format's tensors tell of the width of the layer that they change.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from .checkpoint_files import INPUT_BLOCKS_PER_LEVEL, UnetLayout
from .tensor_files import TensorInfo

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]


@dataclass(frozen=True)
class Place:
    """Where in a UNet a layer stands, in diffusers' terms: "down" is the encoder, "up" the decoder.

    Attributes:
        level: block of the encoder from the finest, of the decoder from the coarsest; 0 in the middle.
        index: which of the level's layers of that kind.
        transformer_block: which transformer block of an attention layer, None outside of them.
    """

    side: Literal["down", "mid", "up"]
    level: int
    kind: Literal["attention", "resnet", "sampler"]
    index: int
    transformer_block: int | None

    def encoder_level(self, layout: UnetLayout) -> int:
        """The encoder level of the same size in a UNet of the given layout."""
        if self.side == "mid":
            return len(layout.channels) - 1
        return layout.encoder_level(self.level) if self.side == "up" else self.level

    def exists_in(self, layout: UnetLayout) -> bool:
        """Whether a UNet of the given layout has a layer here."""
        if self.side == "mid":
            return True
        if self.kind == "attention":
            return self.encoder_level(layout) in layout.attention_levels
        return self.level < len(layout.channels) - (self.kind == "sampler")


@dataclass(frozen=True)
class LoraLayer:
    """A layer that the file changes.

    Attributes:
        part: a name of `MODEL_PARTS`.
        name: the layer's name with underscores for dots.
        place: where it stands, for a layer of a UNet's blocks.
        in_width, out_width: of the changed layer, None where the format does not tell.
        convolutional: whether it is a convolution, None where the format does not tell.
    """

    part: str
    name: str
    place: Place | None
    in_width: int | None
    out_width: int | None
    convolutional: bool | None


@dataclass(frozen=True)
class LoraContents:
    """What a LoRA file holds.

    Attributes:
        layers: the layers it changes.
        embeddings: shapes of the bundled textual inversions' vectors, as (name of the vector, shape).
    """

    layers: tuple[LoraLayer, ...]
    embeddings: tuple[tuple[str, Shape], ...]

    def of_part(self, *parts: str) -> Iterator[LoraLayer]:
        """The layers of the given parts of the model."""
        return (layer for layer in self.layers if layer.part in parts)


# --- which part of the model ------------------------------------------------------------------------------------------

OTHER_MODEL = "other model"
THIRD_TEXT_ENCODER = "third text encoder"
SECOND_TEXT_ENCODER = "second text encoder"
FIRST_TEXT_ENCODER = "first text encoder"
TEXT_ENCODER = "text encoder"
OPEN_CLIP = "OpenCLIP"
UNET = "unet"

PREFIX = r"^(?:base_model_model_|lycoris_)*(?:lora_|oft_)?"
DIFFUSERS_BLOCK = r"(?:(?:down|up)_blocks_\d|mid_block_)"
COMPVIS_BLOCK = r"(?:(?:input|output)_blocks_\d|middle_block_)"
SIZE_EMBEDDING = r"(?:label_emb_|add_embedding_)"
UNET_LAYER = rf"(?:{DIFFUSERS_BLOCK}|{COMPVIS_BLOCK}|{SIZE_EMBEDDING})"
CLIP_LAYER = r"(?:encoder_layers_\d|embeddings_|final_layer_norm|text_projection)"

# keys with underscores for dots; the first row that is found in a key tells the part it belongs to
MODEL_PARTS = (
    # SD3, Flux, PixArt: transformer blocks right under the model, or blocks of two streams
    (OTHER_MODEL, re.compile(r"(?:^|[a-z]_)transformer_blocks_\d|(?:joint|double|single)_blocks_\d")),
    # Lumina, Wan and others: numbered blocks right under the model
    (OTHER_MODEL, re.compile(PREFIX + r"(?:unet|transformer|diffusion_model)_(?:blocks|layers)_\d")),
    (THIRD_TEXT_ENCODER, re.compile(PREFIX + r"(?:te3|text_encoder_3)_")),
    (SECOND_TEXT_ENCODER, re.compile(rf"{PREFIX}(?:te2|text_encoder_2)_(?:text_model_)?{CLIP_LAYER}")),
    (FIRST_TEXT_ENCODER, re.compile(rf"{PREFIX}te1_(?:text_model_)?{CLIP_LAYER}")),
    (TEXT_ENCODER, re.compile(rf"{PREFIX}(?:(?:te|text_encoder)_(?:text_model_)?|text_model_){CLIP_LAYER}")),
    # the names of the WebUI's own modules, which its Lora extension takes too
    (SECOND_TEXT_ENCODER, re.compile(r"^1_model_transformer_resblocks_")),
    (FIRST_TEXT_ENCODER, re.compile(rf"^0_transformer_text_model_{CLIP_LAYER}")),
    (TEXT_ENCODER, re.compile(rf"^transformer_text_model_{CLIP_LAYER}")),
    (OPEN_CLIP, re.compile(r"^model_transformer_resblocks_")),
    (UNET, re.compile(rf"{PREFIX}(?:unet_|(?:model_)?diffusion_model_)?{UNET_LAYER}")),
)


def model_part(key: str) -> str | None:
    """The part of a model that a key with underscores for dots belongs to, None where nothing can be learned."""
    return next((part for part, pattern in MODEL_PARTS if pattern.search(key)), None)


# --- where in the UNet ------------------------------------------------------------------------------------------------

# one row a naming: diffusers' blocks, and CompVis' blocks, whose numbers run through all levels
PLACES = (
    re.compile(r"(?P<side>down|up)_blocks_(?P<level>\d+)_(?P<kind>[a-z]+)_(?P<index>\d+)_(?P<rest>.+)"),
    re.compile(r"(?P<side>mid)_block_(?P<kind>[a-z]+)_(?P<index>\d+)_(?P<rest>.+)"),
    re.compile(r"(?P<side>input|output)_blocks_(?P<block>\d+)_\d+_(?P<rest>.+)"),
    re.compile(r"(?P<side>middle)_block_(?P<block>\d+)_(?P<rest>.+)"),
)
KINDS = {"attentions": "attention", "resnets": "resnet", "downsamplers": "sampler", "upsamplers": "sampler"}
COMPVIS_KINDS = (
    ("attention", re.compile(r"transformer_blocks_|proj_in|proj_out|norm")),
    ("resnet", re.compile(r"in_layers_|out_layers_|emb_layers_|skip_connection")),
    ("sampler", re.compile(r"op|conv")),
)
TRANSFORMER_BLOCK = re.compile(r"transformer_blocks_(\d+)_")


def read_place(name: str) -> Place | None:
    """Where in the UNet a layer stands, None outside its blocks (embeddings, first and last convolution)."""
    found = next((match for pattern in PLACES if (match := pattern.search(name))), None)
    if found is None:
        return None
    return _compvis_place(found) if "block" in found.groupdict() else _diffusers_place(found)


def _diffusers_place(found: re.Match[str]) -> Place | None:
    kind = KINDS.get(found["kind"])
    level = int(found.groupdict().get("level", 0))
    return kind and Place(found["side"], level, kind, int(found["index"]), _transformer_block(found["rest"]))


def _compvis_place(found: re.Match[str]) -> Place | None:
    kind = next((kind for kind, pattern in COMPVIS_KINDS if pattern.match(found["rest"])), None)
    block = int(found["block"])
    if kind is None or (found["side"] == "input" and block == 0):
        return None
    if found["side"] == "middle":
        return Place("mid", 0, kind, 0, _transformer_block(found["rest"]))
    # the encoder's first convolution is a block of its own, the decoder has none
    side, block = ("down", block - 1) if found["side"] == "input" else ("up", block)
    level, index = divmod(block, INPUT_BLOCKS_PER_LEVEL)
    return Place(side, level, kind, index, _transformer_block(found["rest"]))


def _transformer_block(rest: str) -> int | None:
    found = TRANSFORMER_BLOCK.match(rest)
    return int(found[1]) if found else None


# --- how wide: what the tensors of each format tell -------------------------------------------------------------------


@dataclass(frozen=True)
class LoraFormat:
    """A kind of LoRA: the tensors that a layer of it must have, and what their shapes tell of the changed layer."""

    needs: tuple[str, ...]
    in_width: Callable[[Shapes], int | None]
    out_width: Callable[[Shapes], int | None]


def _axis(name: str, axis: int) -> Callable[[Shapes], int | None]:
    return lambda shapes: shapes[name][axis] if axis < len(shapes[name]) else None


def _unknown_width(shapes: Shapes) -> None:
    return None


def _loha_out(shapes: Shapes) -> int | None:
    """w1 = w1_a · w1_b; with a core t1 (CP decomposition) w1_a is stored transposed."""
    return _axis("hada_w1_a", 1 if "hada_t1" in shapes else 0)(shapes)


def _lokr_in(shapes: Shapes) -> int | None:
    """w1 ⊗ w2: the widths of the two factors multiply."""
    return _product(_lokr_factor(shapes, 1, "b", 1), _lokr_factor(shapes, 2, "b", 1))


def _lokr_out(shapes: Shapes) -> int | None:
    second = _lokr_factor(shapes, 2, "a", 1 if "lokr_t2" in shapes else 0)
    return _product(_lokr_factor(shapes, 1, "a", 0), second)


def _lokr_factor(shapes: Shapes, number: int, half: str, half_axis: int) -> int | None:
    """One width of w1 or w2, which are stored whole or as a product of two halves."""
    whole = f"lokr_w{number}"
    return _axis(whole, "ab".index(half))(shapes) if whole in shapes else _axis(f"{whole}_{half}", half_axis)(shapes)


def _product(*widths: int | None) -> int | None:
    return None if None in widths else math.prod(widths)


def _glora_in(shapes: Shapes) -> int | None:
    """a1 and a2 lead from the input width to the rank and back, in either order; the rank is the smaller."""
    return max(shapes["a1_weight"][:2], default=None)


def _glora_out(shapes: Shapes) -> int | None:
    """Of b1 and b2 one leads to the rank and the other from it to the output, in either order."""
    rank = min(shapes["a1_weight"][:2], default=None)
    into_rank, from_rank = shapes["b1_weight"][:2], shapes["b2_weight"][:2]
    return from_rank[0] if into_rank[:1] == (rank,) and from_rank else next(iter(into_rank), None)


def _ia3_width(shapes: Shapes) -> int | None:
    """One number a channel: of the output, or of the input, which only the tensor `on_input` would tell."""
    return max(shapes["weight"], default=None)


def _oft_out(name: str) -> Callable[[Shapes], int | None]:
    """Rotations of the output channels: (blocks, size, size), butterfly (steps, blocks, size, size)."""
    return lambda shapes: math.prod(shapes[name][-3:-1]) if len(shapes[name]) >= 3 else None


# the first row whose tensors a layer has is its format; the names are those of `PARAMETERS`, dots as underscores
FORMATS = (
    LoraFormat(("down", "up"), _axis("down", 1), _axis("up", 0)),  # LoRA, LoCon, DoRA
    LoraFormat(("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), _axis("hada_w1_b", 1), _loha_out),
    LoraFormat(("lokr_w1", "lokr_w2"), _lokr_in, _lokr_out),
    LoraFormat(("lokr_w1", "lokr_w2_a", "lokr_w2_b"), _lokr_in, _lokr_out),
    LoraFormat(("lokr_w1_a", "lokr_w1_b", "lokr_w2"), _lokr_in, _lokr_out),
    LoraFormat(("lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b"), _lokr_in, _lokr_out),
    LoraFormat(("a1_weight", "a2_weight", "b1_weight", "b2_weight"), _glora_in, _glora_out),
    LoraFormat(("weight", "on_input"), _ia3_width, _ia3_width),
    LoraFormat(("diff",), _axis("diff", 1), _axis("diff", 0)),  # full difference
    LoraFormat(("w_norm", "b_norm"), _unknown_width, _axis("w_norm", 0)),
    LoraFormat(("oft_blocks",), _unknown_width, _oft_out("oft_blocks")),  # kohya's and LyCORIS' OFT, butterfly OFT
    LoraFormat(("oft_diag",), _unknown_width, _oft_out("oft_diag")),  # OFT of older LyCORIS
)

# kohya and LyCORIS, diffusers, peft
PARAMETERS = re.compile(
    r"(?P<layer>.+?)_(?:"
    r"(?P<down>lora_(?:linear_layer_)?down_weight|lora_A_(?:\w+_)?weight)|"
    r"(?P<up>lora_(?:linear_layer_)?up_weight|lora_B_(?:\w+_)?weight)|"
    r"(?P<other>hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2)|[ab][12]_weight|weight|on_input|diff|"
    r"diff_b|w_norm|b_norm|oft_blocks|oft_diag|rescale|dora_scale|lora_mid_weight|alpha|scale)|"
    r"(?P<lora_magnitude_vector>lora_magnitude_vector(?:_\w+)?)"
    r")"
)
# tensors that have four dimensions where the changed layer is a convolution
OF_THE_WEIGHTS_DIMENSIONS = ("down", "diff", "dora_scale", "a1_weight", "lokr_w2", "weight")


def _convolutional(shapes: Shapes) -> bool | None:
    dimensions = {len(shapes[name]) for name in OF_THE_WEIGHTS_DIMENSIONS if name in shapes}
    if 4 in dimensions:
        return True
    # (IA)³, whose one tensor is called "weight", flattens its scales
    return False if 2 in dimensions and "weight" not in shapes else None


# --- reading ----------------------------------------------------------------------------------------------------------

BUNDLED_EMBEDDING = re.compile(r"bundle_emb\.[^.]+\.(?P<vector>.+)")


def split_key(key: str) -> tuple[str, str] | None:
    """The layer and the parameter of a key, with underscores for dots; None for a key of no known form.

    The parameters of LoRA itself are "down" and "up" in every naming.
    """
    found = PARAMETERS.fullmatch(key.replace(".", "_"))
    if found is None:
        return None
    # where older diffusers kept its LoRA layers
    return found["layer"].replace("_processor_", "_"), found["other"] or found.lastgroup


def without_prefix(layer: str) -> str:
    """The name of a layer without what trainers write in front of it."""
    return re.sub(PREFIX, "", layer)


def read_lora_contents(tensors: Mapping[str, TensorInfo]) -> LoraContents:
    """The layers and bundled embeddings that the tensors of a LoRA file are for; other tensors are passed over."""
    embeddings = []
    shapes_of_layers: dict[str, dict[str, Shape]] = {}
    for key, info in tensors.items():
        if bundled := BUNDLED_EMBEDDING.fullmatch(key):
            embeddings.append((bundled["vector"], info.shape))
        elif found := split_key(key):
            layer, parameter = found
            shapes_of_layers.setdefault(layer, {})[parameter] = info.shape
    layers = (_read_layer(name, shapes) for name, shapes in shapes_of_layers.items())
    return LoraContents(tuple(layer for layer in layers if layer), tuple(embeddings))


def _read_layer(name: str, shapes: Shapes) -> LoraLayer | None:
    part = model_part(name)
    lora_format = next((row for row in FORMATS if all(needed in shapes for needed in row.needs)), None)
    if part is None or lora_format is None:
        return None
    return LoraLayer(
        part=part,
        name=name,
        place=read_place(name) if part == UNET else None,
        in_width=lora_format.in_width(shapes),
        out_width=lora_format.out_width(shapes),
        convolutional=_convolutional(shapes),
    )
