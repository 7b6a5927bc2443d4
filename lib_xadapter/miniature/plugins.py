"""The plugins: control maps of scenes, low-rank changes of three formats, and a word of one's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..evaluation.maps import canny
from ..headless.model_files import unet_table_of
from .denoising import Controls
from .drawing import base_picture, depth_map, edge_map
from .latents import Rows
from .scenes import Scene, scene_of

# --- control maps -----------------------------------------------------------------------------------------------------


def maps_of(draw: Callable[[Scene], numpy.ndarray]) -> Controls:
    """Control maps of rows' scenes, (rows, 3, size, size), 0 to 1."""

    def controls(rows: Rows) -> Tensor:
        maps = torch.from_numpy(numpy.stack([draw(scene_of(seed)) for seed in rows.seeds])).float() / 255
        return maps[:, None].repeat(1, 3, 1, 1)

    return controls


def edges(scene: Scene, size: int) -> numpy.ndarray:
    """Of every other scene the true outlines, of the others what Canny finds, which is what users have."""
    if scene.grain % 2:
        return edge_map(scene, size)
    return numpy.asarray(canny(Image.fromarray(base_picture(scene, size))))


def depth(scene: Scene, size: int) -> numpy.ndarray:
    return depth_map(scene, size)


# --- low-rank changes -------------------------------------------------------------------------------------------------


class LowRank(nn.Module):
    """weight + up · down (LoRA, arXiv 2106.09685), for linear layers and convolutions."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        outputs, inputs = weight.shape[0], weight[0].numel()
        self.down = nn.Parameter(torch.randn(rank, inputs) / inputs**0.5)
        self.up = nn.Parameter(torch.zeros(outputs, rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.up @ self.down).reshape(weight.shape)

    def tensors(self, weight: Tensor) -> dict[str, Tensor]:
        """As kohya's trainer writes them; of a convolution down has the kernel."""
        rank, kernel = len(self.down), tuple(weight.shape[1:])
        ones = (1,) * (weight.ndim - 2)
        return {
            "lora_down.weight": self.down.reshape(rank, *kernel),
            "lora_up.weight": self.up.reshape(*self.up.shape, *ones),
            "alpha": torch.tensor(float(rank)),
        }


class Hadamard(nn.Module):
    """weight + (a₁ · b₁) ∘ (a₂ · b₂) (LoHa of LyCORIS, arXiv 2108.06098)."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        outputs, inputs = weight.shape[0], weight[0].numel()
        self.w1_a = nn.Parameter(torch.zeros(outputs, rank))
        self.w1_b = nn.Parameter(torch.randn(rank, inputs) / inputs**0.5)
        self.w2_a = nn.Parameter(torch.randn(outputs, rank))
        self.w2_b = nn.Parameter(torch.randn(rank, inputs) / rank**0.5)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + ((self.w1_a @ self.w1_b) * (self.w2_a @ self.w2_b)).reshape(weight.shape)

    def tensors(self, weight: Tensor) -> dict[str, Tensor]:
        rank = torch.tensor(float(len(self.w1_b)))
        return {f"hada_{name}": parameter for name, parameter in self.named_parameters()} | {"alpha": rank}


@dataclass(frozen=True)
class Format:
    """A format of LoRA files.

    Attributes:
        change: of a weight.
        convolutions: whether ResNet blocks are changed as well as attention.
        rank: of the change; of a Hadamard product its square.
    """

    change: type[LowRank] | type[Hadamard]
    convolutions: bool
    rank: int


FORMATS = {
    "palette": Format(LowRank, convolutions=False, rank=4),
    "lines": Format(LowRank, convolutions=True, rank=2),
    "pattern": Format(Hadamard, convolutions=False, rank=2),
}
"""Of each style: LoRA, LoCon, LoHa."""


def changed_layers(unet: nn.Module, convolutions: bool) -> Iterator[tuple[str, nn.Module]]:
    """The layers that a LoRA changes, by name."""
    for name, layer in unet.named_modules():
        attention = isinstance(layer, nn.Linear) and (".attn" in name or ".ff." in name)
        convolution = isinstance(layer, nn.Conv2d) and ".resnets." in name and convolutions
        if attention or convolution:
            yield name, layer


def add_changes(unet: nn.Module, form: Format, seed: int) -> nn.ModuleDict:
    """Freeze a UNet and let low-rank changes be learned in it, which are given back."""
    unet.requires_grad_(False)
    changes = nn.ModuleDict()
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        for name, layer in list(changed_layers(unet, form.convolutions)):
            change = form.change(layer.weight, form.rank)
            parametrize.register_parametrization(layer, "weight", change)
            changes[name.replace(".", "/")] = change
    return changes


def lora_tensors(unet: nn.Module, changes: nn.ModuleDict, compvis: bool) -> dict[str, Tensor]:
    """A LoRA file: kohya's names, after diffusers' blocks for SD1.5 and after sgm's for SDXL."""
    table = unet_table_of(unet)
    tensors = {}
    for place, change in changes.items():
        name = place.replace("/", ".")
        weight = unet.get_submodule(name).parametrizations.weight.original
        called = table(f"{name}.weight").name.removesuffix(".weight") if compvis else name
        for ending, tensor in change.tensors(weight).items():
            tensors[f"lora_unet_{called.replace('.', '_')}.{ending}"] = tensor.detach().clone()
    return tensors


# --- a word of one's own ----------------------------------------------------------------------------------------------


class OwnWord(nn.Module):
    """Vectors that stand for a word (textual inversion, arXiv 2208.01618), after all others in a text encoder's table.

    Args:
        encoder: CLIPTextModel, which is frozen and given a longer table.
        like: the token whose vector they begin as.
        vectors: how many.
    """

    def __init__(self, encoder: nn.Module, like: int, vectors: int = 2) -> None:
        super().__init__()
        encoder.requires_grad_(False)
        embeddings = getattr(encoder, "text_model", encoder).embeddings
        self._table = embeddings.token_embedding.weight.detach()
        self.vectors = nn.Parameter(self._table[like].repeat(vectors, 1).clone())
        self.tokens = [len(self._table) + number for number in range(vectors)]
        embeddings.token_embedding = _Lengthened(self)

    def table(self) -> Tensor:
        return torch.cat([self._table, self.vectors])


class _Lengthened(nn.Module):
    def __init__(self, word: OwnWord) -> None:
        super().__init__()
        self._word = [word]  # no child: its vectors are learned in one place alone

    def forward(self, tokens: Tensor) -> Tensor:
        return nn.functional.embedding(tokens, self._word[0].table())
