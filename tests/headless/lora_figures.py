"""LoRA files of every kind for the small models, and what the WebUI's own Lora extension makes of them.

    WEBUI_DIR=… python -m tests.headless.lora_figures

writes tests/golden/webui_loras.npz: of every weight and bias that a LoRA changes, some of the values.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy
import safetensors.torch
import torch
from torch import Tensor

from lib_xadapter.headless.lora_names import Lora
from tests import lora_formats
from tests.headless.small_sd2 import saved, sd2_weights
from tests.lora_formats import Format, Layer, Model, Shapes, file_of, kohya, kohya_text
from tests.small_models import SmallModels, make_small_models
from tests.webui.server import Installation
from tests.webui.small_loras import filled

GOLDEN = Path(__file__).parents[1] / "golden" / "webui_loras.npz"
SCRIPT = Path(__file__).parent / "webui_loras.py"
SAMPLES = 24

MODELS: Mapping[str, Model] = {
    "base": replace(lora_formats.SD15, channels=(32, 64, 128, 128), context_width=64, text_encoders=((64, 2),)),
    "sd2": replace(lora_formats.SD21, channels=(32, 64, 128, 128), context_width=64, text_encoders=((64, 2),)),
    "upgraded": replace(
        lora_formats.SDXL, channels=(32, 64, 128), depths=(0, 1, 2), context_width=128, text_encoders=((64, 2),) * 2
    ),
}
LAYERS = (
    "down_blocks.1.resnets.1.conv2",
    "down_blocks.1.resnets.1.norm2",
    "down_blocks.1.attentions.1.proj_in",
    "down_blocks.1.attentions.1.transformer_blocks.0.attn1.to_q",
    "down_blocks.1.attentions.1.transformer_blocks.0.attn1.to_out.0",
    "down_blocks.1.attentions.1.transformer_blocks.0.attn2.to_k",
    "down_blocks.1.attentions.1.transformer_blocks.0.ff.net.2",
    "down_blocks.1.attentions.1.transformer_blocks.0.norm1",
)
"""One of each form."""
LAST_TEXT_LAYER = "text_model.encoder.layers.1."


def full_difference(layer: Layer) -> Shapes:
    """With one of the bias where the layer has a bias."""
    difference = lora_formats.full(layer)
    return difference if not layer.name.endswith(("to_q", "to_k")) else {"diff": difference["diff"]}


def glora_of_linear_layers(layer: Layer) -> Shapes:
    """The extension cannot multiply those of convolutions."""
    return {} if layer.kernel else lora_formats.glora(layer)


def dora_of_loha(layer: Layer) -> Shapes:
    return lora_formats.loha(layer) | {"alpha": (), "dora_scale": lora_formats.dora(layer)["dora_scale"]}


# of GLoRA, the extension reads the older names only
KINDS: Mapping[str, Format] = {
    **{name: make for name, make in lora_formats.FORMATS.items() if name != "newer_glora"},
    "full": full_difference,
    "glora": glora_of_linear_layers,
    "dora_of_loha": dora_of_loha,
}
OF_ATTENTION = ("lora", "dora", "loha", "lokr", "glora", "oft", "butterfly_oft")
"""Kinds that change all that an attention layer of OpenCLIP, which is one module in the WebUI, is made of."""


@dataclass(frozen=True)
class Case:
    """A LoRA file for one of the small models, and the weights that it is used with."""

    name: str
    model: str
    shapes: Shapes
    weight: float = 1.0
    unet_weight: float | None = None
    rank: int | None = None

    def write(self, folder: Path) -> Lora:
        path = folder / f"{self.name}.safetensors"
        safetensors.torch.save_file(_with_alphas(filled(self.shapes)), path)
        return Lora(path, self.weight, self.unet_weight, self.rank)


def _with_alphas(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """That of OFT limits how far it turns, the others scale."""
    limited = {name.rpartition(".")[0] for name in tensors if name.endswith("oft_blocks")}
    alphas = {name: 0.02 if name.rpartition(".")[0] in limited else 0.7 for name in tensors if name.endswith(".alpha")}
    return tensors | {name: torch.tensor(value) for name, value in alphas.items()}


def cases() -> list[Case]:
    found = []
    for name, make in KINDS.items():
        found.append(Case(f"base {name}", "base", {**_unet(make, "base"), **_text(make, "base")}))
        of_text = _text(make, "upgraded") if name in OF_ATTENTION else {}
        found.append(Case(f"upgraded {name}", "upgraded", {**_unet(make, "upgraded"), **of_text}))
        if name in OF_ATTENTION:
            found.append(Case(f"sd2 {name}", "sd2", {**_unet(make, "sd2"), **_text(make, "sd2")}))
    both = {**_unet(lora_formats.lora, "base"), **_text(lora_formats.lora, "base")}
    return [
        *found,
        Case("base two weights", "base", both, 0.3, 0.9),
        Case("base negative", "base", both, -0.5),
        Case("base one rank", "base", both, rank=1),
        Case("base half dora", "base", _unet(lora_formats.dora, "base"), 0.5),
        Case("base half norm", "base", _unet(lora_formats.norm, "base"), 0.5),
        Case("base half full", "base", _unet(full_difference, "base"), 0.5),
    ]


def _unet(make: Format, model: str) -> Shapes:
    return file_of((layer for layer in MODELS[model].unet_layers() if layer.name in LAYERS), make, kohya)


def _text(make: Format, model: str) -> Shapes:
    encoders = range(len(MODELS[model].text_encoders))
    shapes: Shapes = {}
    for encoder in encoders:
        layers = (layer for layer in MODELS[model].text_layers(encoder) if layer.name.startswith(LAST_TEXT_LAYER))
        shapes |= file_of(layers, make, kohya_text(encoder if len(encoders) > 1 else None))
    return shapes


def of_the_webui(
    installation: Installation, small: SmallModels, asked: Sequence[Case], folder: Path
) -> dict[str, dict[str, Tensor]]:
    """What the extension changes, by case and by the checkpoint's key."""
    changed: dict[str, dict[str, Tensor]] = {case.name: {} for case in asked}
    sd2 = saved(sd2_weights(small.base), folder / "sd2.safetensors")
    for model, checkpoint in (("base", small.base), ("sd2", sd2), ("upgraded", small.upgraded)):
        out = folder / f"{model}.out"
        loras = [_told(case.write(folder)) for case in asked if case.model == model]
        if not loras:
            continue
        command = [installation.python, SCRIPT, installation.folder, checkpoint, out, *loras]
        ended = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600)
        if ended.returncode:
            raise RuntimeError(ended.stderr)
        for name, tensor in safetensors.torch.load_file(out).items():
            case, key = name.split("/", 1)
            changed[case][key] = tensor
    return changed


def _told(lora: Lora) -> str:
    """As the script takes it."""
    unet = lora.weight if lora.unet_weight is None else lora.unet_weight
    return f"{lora.path}={lora.weight},{unet},{'' if lora.rank is None else lora.rank}"


def sampled(tensor: Tensor) -> numpy.ndarray:
    """Some values, spread evenly."""
    flat = tensor.flatten()
    return flat[:: max(1, len(flat) // SAMPLES)].numpy()


def main() -> None:
    installation = Installation.from_environment()
    if installation is None:
        raise SystemExit("WEBUI_DIR names no WebUI.")
    with tempfile.TemporaryDirectory() as folder:
        small = make_small_models(Path(folder))
        changed = of_the_webui(installation, small, cases(), Path(folder))
    GOLDEN.parent.mkdir(exist_ok=True)
    numpy.savez_compressed(
        GOLDEN, **{f"{case}/{key}": sampled(value) for case, found in changed.items() for key, value in found.items()}
    )


if __name__ == "__main__":
    main()
