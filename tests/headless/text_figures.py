"""Prompts in the full grammar, and what the WebUI's own text encoding makes of them on small text encoders.

    WEBUI_DIR=… python -m tests.headless.text_figures

writes tests/golden/webui_text.npz: of each stretch of each prompt, some of the values.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import safetensors.torch
import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from lib_xadapter.headless.compvis_layout import clip_origin, open_clip_origin, write_compvis
from lib_xadapter.headless.inversions import Inversions
from lib_xadapter.headless.prompt_grammar import prompt_schedule
from lib_xadapter.headless.prompts import encode, encoders_of
from lib_xadapter.headless.tokenizers import OPEN_CLIP_PADDING, load_tokenizer, read_shipped_table
from tests.small_models import seeded
from tests.webui.server import Installation

GOLDEN = Path(__file__).parents[1] / "golden" / "webui_text.npz"
SCRIPT = Path(__file__).parent / "webui_text.py"
SAMPLES = 60
STEPS = 10
FAMILIES = ("sd1", "sd2", "sdxl")

LONG = ", ".join(f"a {thing} on a hill" for thing in "cat dog house tree boat cloud horse river stone bird".split())
PROMPTS: tuple[tuple[str, int], ...] = (
    ("a cat on a mat", 1),
    ("", 1),
    ("a (cat:1.4) [on] ((a)) mat", 1),
    ("a (cat:1.4) on a mat", 2),
    ("[a cat:a (dog:1.5) in fog:0.5] on a mat", 1),
    ("[cat|dog] in the (fog:0.7)", 1),
    (f"[a cat:{LONG}, {LONG}:4]", 1),
    (f"{LONG}, {LONG}", 1),
    ("a cat BREAK in the (fog:1.3) BREAK at night", 1),
    ("a cat, inked", 1),
    ("inked sketch of a (cat, inked:1.3) and inked", 2),
    ("widexl cat, inked", 1),
    (" ".join(["cat"] * 74) + " inked sketch", 1),
    ("[inked:a (cat:1.2):0.3]", 1),
)
INVERSIONS: Mapping[str, dict[str, tuple[int, int]]] = {
    "inked": {"string_to_param": (2, 1)},
    "inked sketch": {"emb_params": (3, 1)},
    "widexl": {"clip_l": (2, 1), "clip_g": (2, 1)},
    "tooWide": {"emb_params": (1, 2)},
}
"""Number of vectors, and their width in widths of the text encoder."""


@dataclass(frozen=True)
class SmallEncoders:
    """Text encoders with CLIP's whole vocabulary, as the WebUI's files have them and as ours."""

    clip: CLIPTextModel
    open_clip: CLIPTextModelWithProjection

    @classmethod
    def made(cls) -> SmallEncoders:
        return cls(
            seeded(CLIPTextModel(_config("quick_gelu")), "figures.clip", gain=1.5),
            seeded(CLIPTextModelWithProjection(_config("gelu", 3)), "figures.open_clip", gain=1.5),
        )

    def write(self, folder: Path) -> None:
        for name, module, origin in (
            ("clip", self.clip, clip_origin),
            ("open_clip", self.open_clip, open_clip_origin),
        ):
            weights = {key: value for key, value in module.state_dict().items() if value.dtype.is_floating_point}
            safetensors.torch.save_file(write_compvis(weights, "", origin), folder / f"{name}.safetensors")

    def pipeline(self, family: str) -> Any:
        """What stands for a pipeline where prompts are encoded."""
        tokenizer, second = load_tokenizer(), load_tokenizer(None, OPEN_CLIP_PADDING)
        unet = SimpleNamespace(config=SimpleNamespace(use_linear_projection=family != "sd1"))
        if family == "sd2":
            # its last layer is not used
            module = CLIPTextModel(_config("gelu")).eval()
            # with and without a prefix, as transformers has it
            state = {name.removeprefix("text_model."): value for name, value in self.open_clip.state_dict().items()}
            module.load_state_dict({name: state[name.removeprefix("text_model.")] for name in module.state_dict()})
            return SimpleNamespace(unet=unet, tokenizer=second, text_encoder=module)
        parts = SimpleNamespace(unet=unet, tokenizer=tokenizer, text_encoder=self.clip)
        if family == "sdxl":
            parts.tokenizer_2, parts.text_encoder_2 = second, self.open_clip
        return parts


def _config(activation: str, layers: int = 2) -> CLIPTextConfig:
    return CLIPTextConfig(**_sizes(activation, layers))


def _sizes(activation: str, layers: int) -> dict[str, Any]:
    return {
        "vocab_size": 49408,
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": layers,
        "num_attention_heads": 1,
        "hidden_act": activation,
        "projection_dim": 64,
        "bos_token_id": 49406,
        "eos_token_id": 49407,
        "pad_token_id": 49407,
    }


def write_tokenizer(folder: Path) -> None:
    """As older versions of transformers read it."""
    vocabulary, merges = read_shipped_table()
    end = "<|endoftext|>"
    special = {"bos_token": "<|startoftext|>", "eos_token": end, "unk_token": end, "pad_token": end}
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer", **special}))


def write_inversions(folder: Path) -> None:
    folder.mkdir()
    generator = torch.Generator().manual_seed(3)
    for name, parts in INVERSIONS.items():
        vectors = {key: torch.randn(number, width * 64, generator=generator) for key, (number, width) in parts.items()}
        if "string_to_param" in vectors:
            data = {"string_to_token": {"*": 265}, "string_to_param": {"*": vectors["string_to_param"]}, "name": name}
            torch.save(data, folder / f"{name}.pt")
        else:
            safetensors.torch.save_file(vectors, folder / f"{name}.safetensors")


def told_here(encoders: SmallEncoders, embeddings: Path) -> dict[str, Tensor]:
    """What each family's model is told, under the script's names."""
    found = {}
    for family in FAMILIES:
        pipeline, inversions = encoders.pipeline(family), Inversions.below(embeddings)
        for number, (prompt, clip_skip) in enumerate(PROMPTS):
            texts = [one.text for one in prompt_schedule(prompt, STEPS)]
            each = [encode(texts, encoder) for encoder in encoders_of(pipeline, clip_skip, inversions)]
            for place in range(len(texts)):
                said = [of_encoder[place] for of_encoder in each]
                found[f"{family}/{number}/{place}/tokens"] = torch.cat([one.tokens[0] for one in said], dim=-1)
                if said[-1].pooled is not None:
                    found[f"{family}/{number}/{place}/pooled"] = said[-1].pooled[0]
    return found


def of_the_webui(installation: Installation, encoders: SmallEncoders, folder: Path) -> dict[str, Tensor]:
    """The same by the WebUI's own code."""
    encoders.write(folder)
    write_tokenizer(folder / "tokenizer")
    asked = {"clip": _sizes("quick_gelu", 2), "prompts": PROMPTS, "steps": STEPS}
    (folder / "asked.json").write_text(json.dumps(asked))
    command = [installation.python, SCRIPT, installation.folder, folder]
    ended = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=900)
    if ended.returncode:
        raise RuntimeError(ended.stderr)
    return safetensors.torch.load_file(folder / "told.safetensors")


def sampled(tensor: Tensor) -> numpy.ndarray:
    """Some values, spread evenly over all channels."""
    flat = tensor.flatten()
    return flat[:: max(1, len(flat) // SAMPLES) | 1].numpy()


def main() -> None:
    installation = Installation.from_environment()
    if installation is None:
        raise SystemExit("WEBUI_DIR names no WebUI.")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inversions(folder / "embeddings")
        told = of_the_webui(installation, SmallEncoders.made(), folder)
    numpy.savez_compressed(GOLDEN, **{key: sampled(value) for key, value in told.items()})


if __name__ == "__main__":
    main()
