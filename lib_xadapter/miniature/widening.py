"""The same models, wider, for hosts whose norms have 32 groups: each channel stands there several times.

A channel's copies carry its value, and what reads them reads a part of each, so that every sum comes out as before.
The channels of a UNet's tensor repeat in blocks of its width; as all its layers are of that width, groups of a norm
fall on copies of the groups that they were. A VAE's widths may differ, as none of its layers reads two others. Inside
an attention whole heads repeat, and queries are made smaller by what longer products grow by.

Names are those of diffusers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

Tensors = Mapping[str, Tensor]
QUERIES = re.compile(r"\.to_q\.")
INNER_OUT = re.compile(r"\.to_[qkv]\.")
INNER_IN = re.compile(r"\.to_out\.0\.")
CONTEXT_IN = re.compile(r"\.attn2\.to_[kv]\.")
TIME_IN = re.compile(r"^time_embedding\.linear_1\.")
"""The layer that reads the sines and cosines of a timestep, of which there are as many as channels."""
GIVEN_IN = re.compile(
    r"^conv_in\.|^add_embedding\.linear_1\.|^controlnet_cond_embedding\.|^(en|de)coder\.conv_in\.|^quant_conv\."
    r"|^post_quant_conv\.|^adapter\.conv_in\."
)
"""Layers that read what is no channel of the model."""
GIVEN_OUT = re.compile(
    r"^conv_out\.|^controlnet_cond_embedding\.(conv_in|blocks)|^(en|de)coder\.conv_out\.|^quant_conv\.|^post_quant_conv\."
)
"""Layers that write what is no channel of the model."""


@dataclass(frozen=True)
class Widening:
    """How a model's channels repeat.

    Attributes:
        width: of all its levels; None for a VAE.
        copies: of each channel.
        head: channels of an attention head; None where there is only one.
    """

    width: int | None
    copies: int
    head: int | None

    def tensors(self, narrow: Tensors) -> dict[str, Tensor]:
        """Of a UNet, a ControlNet, a VAE or a T2I-Adapter."""
        return {name: self.tensor(name, value) for name, value in narrow.items()}

    def tensor(self, name: str, value: Tensor) -> Tensor:
        """One of them, by its name."""
        wide = self.written(name, value)
        return self.read(name, wide) if value.ndim > 1 else wide

    def written(self, name: str, value: Tensor) -> Tensor:
        """A layer's weight, or what else has its outputs first, with outputs that repeat."""
        if GIVEN_OUT.search(name):
            return value
        wide = self.with_outputs(name, value)
        return wide * self.copies**-0.5 if QUERIES.search(name) else wide

    def read(self, name: str, value: Tensor) -> Tensor:
        """A layer's weight, or what else has its inputs second, for inputs that repeat."""
        if TIME_IN.search(name):
            return self._among_more_frequencies(value)
        if GIVEN_IN.search(name) or CONTEXT_IN.search(name):
            return value
        return self.with_inputs(name, value) / self.copies

    def with_outputs(self, name: str, value: Tensor) -> Tensor:
        """What a layer writes, as often as it stands there, whatever it is multiplied by."""
        return _repeated(value, 0, self.head if INNER_OUT.search(name) else self.width, self.copies)

    def with_inputs(self, name: str, value: Tensor) -> Tensor:
        """What reads each input, as often as the input stands there."""
        return _repeated(value, 1, self.head if INNER_IN.search(name) else self.width, self.copies)

    def _among_more_frequencies(self, value: Tensor) -> Tensor:
        """Frequency n of the narrow model is frequency `copies` · n of the wide one; cosines come first, then sines."""
        halves = value.unflatten(1, (2, -1))
        wide = value.new_zeros(len(value), 2, self.copies * halves.shape[2])
        wide[:, :, :: self.copies] = halves
        return wide.flatten(1)

    def mapping_layers(self, narrow: Tensors) -> dict[str, Tensor]:
        """Mapping layers between two such models, of which both repeat alike."""
        return {name: self._of_mapping(name, value) for name, value in narrow.items()}

    def _of_mapping(self, name: str, value: Tensor) -> Tensor:
        if value.ndim == 1:
            return _repeated(value, 0, self.width, self.copies)
        # a transposed convolution has its inputs first
        outputs, inputs = (1, 0) if ".up_opt." in name else (0, 1)
        wide = _repeated(value, outputs, self.width, self.copies)
        return _repeated(wide, inputs, self.width, self.copies) / self.copies


def _repeated(value: Tensor, axis: int, block: int | None, copies: int) -> Tensor:
    """Blocks along an axis, each several times in a row; all of it where no block is given."""
    blocks = value.unflatten(axis, (-1, 1, block or value.shape[axis]))
    return blocks.repeat_interleave(copies, axis + 1).flatten(axis, axis + 2)


def widened_lora(narrow: Tensors, widening: Widening, layer_of: Callable[[str], str]) -> dict[str, Tensor]:
    """A LoRA, LoCon or LoHa for the wide model.

    Args:
        narrow: by the names of its file.
        widening: of the UNet.
        layer_of: what stands before the first dot of a name → the layer's own name, with a dot at its end.
    """
    wide = {}
    for name, value in narrow.items():
        called, _, kind = name.partition(".")
        layer = layer_of(called)
        if kind.startswith(("lora_up", "hada_w1_a")):
            value = widening.written(layer, value)
        elif kind.startswith("hada_w2_a"):
            # the second factor is multiplied with the first: it repeats as it is
            value = widening.with_outputs(layer, value)
        elif kind.startswith(("lora_down", "hada_w1_b")):
            value = widening.read(layer, value)
        elif kind.startswith("hada_w2_b") and not CONTEXT_IN.search(layer):
            value = widening.with_inputs(layer, value)
        wide[name] = value
    return wide
