"""Which model a LoRA file belongs to, from the names and shapes of its tensors alone: metadata can be missing or wrong.

Every rule below looks at the whole file and gives the models that it leaves possible. What a model has and has not
comes first (`STRUCTURE`), as it holds for models of any width; then the widths of the released models (`WIDTHS`); last
what trainers are used to do (`HABITS`). Rules of structure that contradict each other mean some other model; a rule of
the other two is passed over where it contradicts what came before it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Literal

from .checkpoint_files import SD_UNET, SDXL_UNET, UnetLayout
from .families import FAMILY_OF_CONTEXT_WIDTH, FAMILY_OF_EMBEDDING_WIDTH
from .lora_layers import (
    COMPVIS_BLOCK,
    FIRST_TEXT_ENCODER,
    OPEN_CLIP,
    OTHER_MODEL,
    SECOND_TEXT_ENCODER,
    SIZE_EMBEDDING,
    TEXT_ENCODER,
    THIRD_TEXT_ENCODER,
    UNET,
    LoraContents,
    LoraLayer,
    read_lora_contents,
)
from .tensor_files import read_tensor_infos

LoraBase = Literal["sd1", "sd2", "sdxl", "unknown"]
Models = frozenset[str]
Rule = Callable[[LoraContents], Models]

SD1: Models = frozenset({"sd1"})
SD2: Models = frozenset({"sd2"})
SDXL: Models = frozenset({"sdxl"})
SD = SD1 | SD2
ANY = SD | SDXL
NONE: Models = frozenset()


# --- structure: what a model has and has not --------------------------------------------------------------------------

CLIP_L_LAYERS = 12


def other_models_parts(lora: LoraContents) -> Models:
    """SD3, Flux and their like: transformers that are no UNet, a third text encoder."""
    return NONE if any(lora.of_part(OTHER_MODEL, THIRD_TEXT_ENCODER)) else ANY


def second_text_encoder(lora: LoraContents) -> Models:
    """Only SDXL has two text encoders, and textual inversions with vectors for both."""
    two_vectors = any(name in ("clip_l", "clip_g") for name, _ in lora.embeddings)
    return SDXL if two_vectors or any(lora.of_part(SECOND_TEXT_ENCODER)) else ANY


def size_embedding(lora: LoraContents) -> Models:
    """Only SDXL's UNet is told the picture's size: `label_emb` in CompVis' names, `add_embedding` in diffusers'."""
    return SDXL if any(re.search(SIZE_EMBEDDING, layer.name) for layer in lora.of_part(UNET)) else ANY


def unet_places(lora: LoraContents) -> Models:
    """SD's UNet has four levels, the finest three with attention; SDXL's has three, the coarsest two with attention."""
    return _all_of(
        _models_of(layer.place.exists_in(SD_UNET), layer.place.exists_in(SDXL_UNET))
        for layer in lora.of_part(UNET)
        if layer.place
    )


def transformer_depth(lora: LoraContents) -> Models:
    """SD has one transformer block in each attention layer, SDXL two or ten."""
    later_blocks = (layer for layer in lora.of_part(UNET) if layer.place and (layer.place.transformer_block or 0) > 0)
    return SDXL if any(later_blocks) else ANY


def convolutional_projections(lora: LoraContents) -> Models:
    """SD1 leads into and out of its transformers by 1x1 convolutions, SD2 and SDXL by linear layers."""
    return SD1 if any(layer.convolutional for layer in _projections(lora)) else ANY


def text_encoder_depth(lora: LoraContents) -> Models:
    """CLIP-L, the text encoder of SD1 and SDXL's first, has 12 layers; OpenCLIP-H, that of SD2, has 23."""
    return SD2 if max(_text_layer_numbers(lora), default=0) >= CLIP_L_LAYERS else ANY


def open_clip_alone(lora: LoraContents) -> Models:
    """The WebUI's own name for the layers of SD2's text encoder."""
    return SD2 if any(lora.of_part(OPEN_CLIP)) else ANY


STRUCTURE: tuple[Rule, ...] = (
    other_models_parts,
    second_text_encoder,
    size_embedding,
    unet_places,
    transformer_depth,
    convolutional_projections,
    text_encoder_depth,
    open_clip_alone,
)


# --- widths of the released models ------------------------------------------------------------------------------------

# CLIP-L, OpenCLIP-H and OpenCLIP-bigG, each with the inside of its MLP, which is four times as wide
MODELS_OF_TEXT_WIDTH = {768: SD1 | SDXL, 3072: SD1 | SDXL, 1024: SD2, 4096: SD2, 1280: SDXL, 5120: SDXL}


def context_width(lora: LoraContents) -> Models:
    """Cross-attention takes its keys and values from the text encoder's output, 768, 1024 or 2048 wide."""
    keys_and_values = (layer for layer in lora.of_part(UNET) if layer.name.endswith(("attn2_to_k", "attn2_to_v")))
    return _all_of(_family(FAMILY_OF_CONTEXT_WIDTH, layer.in_width) for layer in keys_and_values)


def decoder_width(lora: LoraContents) -> Models:
    """At the same level of the decoder SD is twice as wide as SDXL, as it has one level more."""
    return _all_of(
        _models_of(layer.out_width in _out_widths(layer, SD_UNET), layer.out_width in _out_widths(layer, SDXL_UNET))
        for layer in lora.of_part(UNET)
        if layer.place and layer.place.exists_in(SD_UNET) and layer.place.exists_in(SDXL_UNET)
    )


def text_width(lora: LoraContents) -> Models:
    """The text encoders differ in width; SDXL's first is SD1's."""
    return _all_of(
        MODELS_OF_TEXT_WIDTH.get(width, ANY)
        for layer in lora.of_part(TEXT_ENCODER, FIRST_TEXT_ENCODER)
        for width in (layer.in_width, layer.out_width)
    )


def embedding_width(lora: LoraContents) -> Models:
    """Bundled textual inversions are as wide as the text encoder that they are for."""
    return _all_of(_family(FAMILY_OF_EMBEDDING_WIDTH, shape[-1]) for _, shape in lora.embeddings if shape)


WIDTHS: tuple[Rule, ...] = (context_width, decoder_width, text_width, embedding_width)


# --- habits of trainers -----------------------------------------------------------------------------------------------


def linear_projections(lora: LoraContents) -> Models:
    """Not of SD1, though some tools write its 1x1 convolutions with two dimensions too."""
    return SD2 | SDXL if any(layer.convolutional is False for layer in _projections(lora)) else ANY


def compvis_names(lora: LoraContents) -> Models:
    """kohya's trainer and its like call SDXL's blocks as CompVis does and SD's as diffusers does."""
    names = (layer.name for layer in lora.of_part(UNET))
    return SDXL if any(re.match(rf"(?:lora|oft)_unet_{COMPVIS_BLOCK}", name) for name in names) else ANY


def single_transformer_blocks(lora: LoraContents) -> Models:
    """Several attention layers of which only block 0 is trained: in SDXL, nobody leaves out all the others."""
    attention_layers = {
        (layer.place.side, layer.place.level, layer.place.index)
        for layer in lora.of_part(UNET)
        if layer.place and layer.place.transformer_block is not None
    }
    return SD if len(attention_layers) > 1 else ANY


def numbered_text_encoder(lora: LoraContents) -> Models:
    """Trainers number a text encoder ("te1") where the model has two; a few of SD1's files do so too."""
    return SDXL if any(lora.of_part(FIRST_TEXT_ENCODER)) else ANY


def lone_text_encoder(lora: LoraContents) -> Models:
    """A text encoder without a number, and no second one beside it."""
    return SD if any(lora.of_part(TEXT_ENCODER)) else ANY


HABITS: tuple[Rule, ...] = (
    linear_projections,
    compvis_names,
    single_transformer_blocks,
    numbered_text_encoder,
    lone_text_encoder,
)


# --- the answer -------------------------------------------------------------------------------------------------------


def detect_lora_base(path: str | os.PathLike[str]) -> LoraBase:
    """The model that a LoRA file was made for; "unknown" for other models' LoRAs and where the file does not tell.

    Knows the formats that the WebUI's Lora extension reads, under kohya's, LyCORIS', CompVis', diffusers' and peft's
    names. Of a safetensors file only the header is read, and of that never the metadata.

    Raises:
        WrongFile: the file is missing, cut off, or holds no tensors by name.
    """
    lora = read_lora_contents(read_tensor_infos(path))
    models = ANY
    for rule in STRUCTURE:
        models &= rule(lora)
    for rule in (*WIDTHS, *HABITS):
        models = (models & rule(lora)) or models
    if models == SD:
        # (IA)³, OFT and norms of the UNet alone look the same in both, and LoRAs of SD1 are by far the more common
        return "sd1"
    return next(iter(models)) if len(models) == 1 else "unknown"


def _family(families: Mapping[int, str], width: int) -> Models:
    """The family of a width; another width says nothing."""
    return frozenset({families[width]}) if width in families else ANY


def _models_of(fits_sd: bool, fits_sdxl: bool) -> Models:
    """What fits both or neither says nothing."""
    if fits_sd == fits_sdxl:
        return ANY
    return SD if fits_sd else SDXL


def _all_of(findings: Iterable[Models]) -> Models:
    """The models that every finding leaves possible."""
    return ANY.intersection(*findings)


def _projections(lora: LoraContents) -> Iterator[LoraLayer]:
    return (layer for layer in lora.of_part(UNET) if layer.name.endswith(("_proj_in", "_proj_out")))


def _text_layer_numbers(lora: LoraContents) -> Iterator[int]:
    """Numbers, from 0, of the layers of a lone or first text encoder."""
    for layer in lora.of_part(TEXT_ENCODER, FIRST_TEXT_ENCODER):
        if found := re.search(r"encoder_layers_(\d+)_", layer.name):
            yield int(found[1])


def _out_widths(layer: LoraLayer, layout: UnetLayout) -> tuple[int, ...]:
    """Output widths that the layer can have in a UNet of the given layout."""
    channels = layout.channels[layer.place.encoder_level(layout)]
    if layer.name.endswith("ff_net_0_proj"):  # four times the width, and as much for its gates
        return (8 * channels,)
    if layer.name.endswith("ff_net_2"):  # (IA)³ scales what it takes, which is four times the width
        return (channels, 4 * channels)
    if layer.name.endswith(("_norm1", "_in_layers_0")) and layer.place.kind == "resnet":
        return ()  # takes the skip connection too
    return (channels,)
