"""LoRA files of every format for models of any width: names and shapes alone, the weights are a hole in the file."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

Shape = tuple[int, ...]
Shapes = dict[str, Shape]
RANK = 2


def save_shapes(shapes: Shapes, path: Path, metadata: dict[str, str] | None = None) -> Path:
    """A safetensors file in float16 whose weights take no room on the disk."""
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": (begin, end)}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


# --- models -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """A layer under diffusers' name; `kernel` None is a linear layer, 0 a norm."""

    name: str
    out_width: int
    in_width: int
    kernel: int | None = None


@dataclass(frozen=True)
class Model:
    """What the names and shapes of a model's layers follow from.

    Attributes:
        channels: of each encoder level, finest first.
        depths: transformer blocks of each attention layer at that level, 0 for no attention.
        text_encoders: width and number of layers of each.
    """

    channels: tuple[int, ...]
    depths: tuple[int, ...]
    context_width: int
    linear_projections: bool
    text_encoders: tuple[tuple[int, int], ...]

    def unet_layers(self) -> Iterator[Layer]:
        """Layers of the UNet's blocks, without those whose input joins a skip connection."""
        last = len(self.channels) - 1
        for level in range(last + 1):
            yield from self._level(f"down_blocks.{level}", level, layers=2)
            if level < last:
                yield Layer(f"down_blocks.{level}.downsamplers.0.conv", *[self.channels[level]] * 2, 3)
        middle_depth = max(self.depths[-1], 1)
        yield from self._attention("mid_block.attentions.0", self.channels[-1], middle_depth)
        for level in range(last + 1):
            yield from self._level(f"up_blocks.{level}", last - level, layers=3)
            if level < last:
                yield Layer(f"up_blocks.{level}.upsamplers.0.conv", *[self.channels[last - level]] * 2, 3)

    def text_layers(self, encoder: int) -> Iterator[Layer]:
        """Layers of one text encoder, counted from 0, without its name."""
        width, layers = self.text_encoders[encoder]
        for number in range(layers):
            name = f"text_model.encoder.layers.{number}"
            for projection in ("q", "k", "v", "out"):
                yield Layer(f"{name}.self_attn.{projection}_proj", width, width)
            yield Layer(f"{name}.mlp.fc1", 4 * width, width)
            yield Layer(f"{name}.mlp.fc2", width, 4 * width)
            yield Layer(f"{name}.layer_norm1", width, width, 0)

    def _level(self, name: str, level: int, layers: int) -> Iterator[Layer]:
        width = self.channels[level]
        for index in range(layers):
            yield Layer(f"{name}.resnets.{index}.conv2", width, width, 3)
            yield Layer(f"{name}.resnets.{index}.norm2", width, width, 0)
            yield Layer(f"{name}.resnets.{index}.time_emb_proj", width, 4 * self.channels[0])
            if self.depths[level]:
                yield from self._attention(f"{name}.attentions.{index}", width, self.depths[level])

    def _attention(self, name: str, width: int, depth: int) -> Iterator[Layer]:
        projection = Layer(name, width, width, None if self.linear_projections else 1)
        yield replace(projection, name=f"{name}.proj_in")
        for block in range(depth):
            within = f"{name}.transformer_blocks.{block}"
            for attention, context in (("attn1", width), ("attn2", self.context_width)):
                yield Layer(f"{within}.{attention}.to_q", width, width)
                yield Layer(f"{within}.{attention}.to_k", width, context)
                yield Layer(f"{within}.{attention}.to_v", width, context)
                yield Layer(f"{within}.{attention}.to_out.0", width, width)
            yield Layer(f"{within}.ff.net.0.proj", 8 * width, width)
            yield Layer(f"{within}.ff.net.2", width, 4 * width)
            yield Layer(f"{within}.norm1", width, width, 0)
        yield replace(projection, name=f"{name}.proj_out")


SD15 = Model((320, 640, 1280, 1280), (1, 1, 1, 0), 768, False, ((768, 12),))
SD21 = Model((320, 640, 1280, 1280), (1, 1, 1, 0), 1024, True, ((1024, 23),))
# three of the ten transformer blocks that SDXL has at its coarsest level: more of the same would only take time
SDXL = Model((320, 640, 1280), (0, 2, 3), 2048, True, ((768, 12), (1280, 32)))
MODELS = {"sd1": SD15, "sd2": SD21, "sdxl": SDXL}

# a tenth of the released widths, all the structure
NARROW_MODELS = {
    "sd1": replace(SD15, channels=(32, 64, 128, 128), context_width=64, text_encoders=((64, 12),)),
    "sd2": replace(SD21, channels=(32, 64, 128, 128), context_width=64, text_encoders=((64, 23),)),
    "sdxl": replace(SDXL, channels=(32, 64, 128), depths=(0, 1, 2), context_width=320, text_encoders=((64, 12),) * 2),
}


# --- names ------------------------------------------------------------------------------------------------------------

Naming = Callable[[str], str]
COMPVIS_RESNETS = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "norm2": "out_layers.0",
    "time_emb_proj": "emb_layers.1",
}


def kohya(name: str) -> str:
    return "lora_unet_" + name.replace(".", "_")


def kohya_oft(name: str) -> str:
    return "oft_unet_" + name.replace(".", "_")


def compvis(name: str) -> str:
    return "lora_unet_" + compvis_name(name).replace(".", "_")


def webui(name: str) -> str:
    return "diffusion_model_" + compvis_name(name).replace(".", "_")


def diffusers(name: str) -> str:
    return "unet." + name


def peft(name: str) -> str:
    return "base_model.model." + name


def compvis_name(name: str) -> str:
    """The CompVis name of a layer under diffusers' name."""
    side, level, kind, index, rest = re.fullmatch(r"(down|mid|up)_blocks?\.?(\d*)\.(\w+?)\.(\d+)\.(.+)", name).groups()
    rest = COMPVIS_RESNETS.get(rest, rest)
    layer = 1 if kind == "attentions" else 0
    if side == "mid":
        return f"middle_block.{layer}.{rest}"
    if kind == "downsamplers":
        return f"input_blocks.{3 * int(level) + 3}.0.op"
    if kind == "upsamplers":
        return f"output_blocks.{3 * int(level) + 2}.2.conv"
    if side == "down":
        return f"input_blocks.{3 * int(level) + int(index) + 1}.{layer}.{rest}"
    return f"output_blocks.{3 * int(level) + int(index)}.{layer}.{rest}"


def kohya_text(encoder: int | None) -> Naming:
    """Names of a lone text encoder's layers (None), or of one of several."""
    return lambda name: f"lora_te{'' if encoder is None else encoder + 1}_" + name.replace(".", "_")


def diffusers_text(encoder: int | None) -> Naming:
    return lambda name: f"text_encoder{f'_{encoder + 1}' if encoder else ''}.{name}"


# --- formats ----------------------------------------------------------------------------------------------------------

Format = Callable[[Layer], Shapes]


def weight_shape(layer: Layer) -> Shape:
    return (layer.out_width, layer.in_width) + (layer.kernel,) * 2 * bool(layer.kernel)


def ones(layer: Layer) -> Shape:
    return (1, 1) if layer.kernel else ()


def lora(layer: Layer) -> Shapes:
    kernel = weight_shape(layer)[2:]
    return {
        "lora_down.weight": (RANK, layer.in_width, *kernel),
        "lora_up.weight": (layer.out_width, RANK, *ones(layer)),
        "alpha": (),
    }


def lora_with_core(layer: Layer) -> Shapes:
    """CP decomposition of a convolution."""
    if (layer.kernel or 0) < 3:
        return lora(layer)
    return {
        "lora_down.weight": (RANK, layer.in_width, 1, 1),
        "lora_mid.weight": (RANK, RANK, layer.kernel, layer.kernel),
        "lora_up.weight": (layer.out_width, RANK, 1, 1),
    }


def dora(layer: Layer) -> Shapes:
    return lora(layer) | {"dora_scale": (layer.out_width, 1, *ones(layer))}


def older_dora(layer: Layer) -> Shapes:
    return lora(layer) | {"dora_scale": (1, layer.in_width, *ones(layer))}


def loha(layer: Layer) -> Shapes:
    inside = layer.in_width * (layer.kernel or 1) ** 2
    return {f"hada_w{i}_{half}": shape for i in (1, 2) for half, shape in halves(layer.out_width, inside)}


def loha_with_core(layer: Layer) -> Shapes:
    if (layer.kernel or 0) < 3:
        return loha(layer)
    shapes = {f"hada_w{i}_b": (RANK, layer.in_width) for i in (1, 2)}
    shapes |= {f"hada_w{i}_a": (RANK, layer.out_width) for i in (1, 2)}
    return shapes | {f"hada_t{i}": (RANK, RANK, layer.kernel, layer.kernel) for i in (1, 2)}


def lokr(layer: Layer) -> Shapes:
    inside = layer.in_width // 8 * (layer.kernel or 1) ** 2
    return {"lokr_w1": (4, 8)} | {f"lokr_w2_{half}": shape for half, shape in halves(layer.out_width // 4, inside)}


def lokr_of_halves(layer: Layer) -> Shapes:
    shapes = {f"lokr_w1_{half}": shape for half, shape in halves(8, 4)}
    return shapes | {"lokr_w2": (layer.out_width // 8, layer.in_width // 4, *weight_shape(layer)[2:])}


def lokr_whole(layer: Layer) -> Shapes:
    return {"lokr_w1": (4, 8), "lokr_w2": (layer.out_width // 4, layer.in_width // 8, *weight_shape(layer)[2:])}


def lokr_all_of_halves(layer: Layer) -> Shapes:
    inside = layer.in_width // 4 * (layer.kernel or 1) ** 2
    shapes = {f"lokr_w1_{half}": shape for half, shape in halves(8, 4)}
    return shapes | {f"lokr_w2_{half}": shape for half, shape in halves(layer.out_width // 8, inside)}


def lokr_with_core(layer: Layer) -> Shapes:
    if (layer.kernel or 0) < 3:
        return lokr(layer)
    core = {"lokr_t2": (RANK, RANK, layer.kernel, layer.kernel)}
    return core | {
        "lokr_w1": (4, 8),
        "lokr_w2_a": (RANK, layer.out_width // 4),
        "lokr_w2_b": (RANK, layer.in_width // 8),
    }


def halves(outside: int, inside: int) -> tuple[tuple[str, Shape], ...]:
    return ("a", (outside, RANK)), ("b", (RANK, inside))


def glora(layer: Layer) -> Shapes:
    kernel = ones(layer)
    return {
        "a1.weight": (RANK, layer.in_width, *kernel),
        "a2.weight": (layer.in_width, RANK, *kernel),
        "b1.weight": (RANK, layer.in_width, *kernel),
        "b2.weight": (layer.out_width, RANK, *kernel),
        "alpha": (),
    }


def newer_glora(layer: Layer) -> Shapes:
    """The same with the two halves called the other way round."""
    swapped = {"a1.weight": "a2.weight", "a2.weight": "a1.weight", "b1.weight": "b2.weight", "b2.weight": "b1.weight"}
    return {swapped.get(name, name): shape for name, shape in glora(layer).items()}


def ia3(layer: Layer) -> Shapes:
    """Scales of keys and values, and of what the MLP's second layer takes."""
    on_input = layer.name.endswith(("ff.net.2", "fc2"))
    if not on_input and not layer.name.endswith(("to_k", "to_v", "k_proj", "v_proj")):
        return {}
    return {"weight": (layer.in_width if on_input else layer.out_width,), "on_input": ()}


def oft(layer: Layer) -> Shapes:
    return {"oft_blocks": (4, layer.out_width // 4, layer.out_width // 4), "alpha": ()}


def older_oft(layer: Layer) -> Shapes:
    return {"oft_diag": (layer.out_width // 4, 4, 4), "alpha": ()}


def butterfly_oft(layer: Layer) -> Shapes:
    return {"oft_blocks": (3, layer.out_width // 8, 8, 8), "rescale": (layer.out_width, 1)}


def full(layer: Layer) -> Shapes:
    return {"diff": weight_shape(layer), "diff_b": (layer.out_width,)}


def norm(layer: Layer) -> Shapes:
    return {"w_norm": (layer.out_width,), "b_norm": (layer.out_width,)}


def diffusers_lora(layer: Layer) -> Shapes:
    shapes = lora(layer)
    return {"lora.down.weight": shapes["lora_down.weight"], "lora.up.weight": shapes["lora_up.weight"]}


def peft_lora(layer: Layer) -> Shapes:
    shapes = lora(layer)
    return {"lora_A.weight": shapes["lora_down.weight"], "lora_B.weight": shapes["lora_up.weight"]}


def peft_dora(layer: Layer) -> Shapes:
    return peft_lora(layer) | {"lora_magnitude_vector": (layer.out_width,)}


FORMATS = {
    maker.__name__: maker
    for maker in (
        lora,
        lora_with_core,
        dora,
        older_dora,
        loha,
        loha_with_core,
        lokr,
        lokr_whole,
        lokr_of_halves,
        lokr_all_of_halves,
        lokr_with_core,
        glora,
        newer_glora,
        ia3,
        oft,
        older_oft,
        butterfly_oft,
        full,
        norm,
    )
}

# formats that hold nothing of the text encoder's width in the UNet, nor of the shape of its projections
BLIND_TO_THE_CONTEXT = {"ia3", "oft", "older_oft", "butterfly_oft", "norm"}


def file_of(layers: Iterable[Layer], make: Format, naming: Naming) -> Shapes:
    """The tensors of a LoRA file for the given layers."""
    wanted = [layer for layer in layers if (layer.kernel == 0) == (make is norm)]
    if make is full:  # the whole would be as large as the model
        wanted = [layer for layer in wanted if layer.name.endswith(("to_k", "k_proj"))]
    return {f"{naming(layer.name)}.{parameter}": shape for layer in wanted for parameter, shape in make(layer).items()}


def unet_file(model: Model, make: Format, naming: Naming = kohya) -> Shapes:
    return file_of(model.unet_layers(), make, naming)


def text_file(model: Model, make: Format, naming: Callable[[int | None], Naming] = kohya_text) -> Shapes:
    encoders = range(len(model.text_encoders))
    numbered = len(encoders) > 1
    shapes: Shapes = {}
    for encoder in encoders:
        shapes |= file_of(model.text_layers(encoder), make, naming(encoder if numbered else None))
    return shapes
