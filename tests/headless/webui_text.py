"""The WebUI's own text encoding on small text encoders, without a WebUI around it.

    python webui_text.py WEBUI FOLDER

To be run with the WebUI's own Python. FOLDER holds `asked.json` (see text_figures.py), a tokenizer, `embeddings/` and
the text encoders' weights; `told.safetensors` is written there: what each model is told at each stretch of each prompt.
The WebUI's parser, tokens, emphasis and textual inversions are its own; what they import beside is replaced by mocks.
"""

import ast
import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import open_clip
import torch
from open_clip.model import CLIP
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer


class WebUI:
    """The parts of the WebUI that make embeddings of prompts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.modules = MagicMock()
        self.modules.devices.device = self.modules.devices.cpu = torch.device("cpu")
        self.modules.devices.cond_cast_unet = lambda tensor: tensor
        self.modules.shared.opts = self.opts = MagicMock(
            emphasis="Original",
            comma_padding_backtrack=20,
            CLIP_stop_at_last_layers=1,
            sdxl_clip_l_skip=False,
            use_old_emphasis_implementation=False,
            textual_inversion_add_hashes_to_infotext=False,
        )
        sys.modules["modules"], sys.modules["modules.shared"] = self.modules, self.modules.shared
        self.parser, self.emphasis = self.load("prompt_parser"), self.load("sd_emphasis")
        self.clip, self.open_clip = self.load("sd_hijack_clip"), self.load("sd_hijack_open_clip")
        for name in ("dataset", "learn_schedule", "image_embedding", "saving_settings"):
            sys.modules[f"modules.textual_inversion.{name}"] = MagicMock()
        sys.modules["modules.textual_inversion"] = self.modules.textual_inversion
        self.inversions = self.load("textual_inversion/textual_inversion")
        self.with_fixes = self.taken(
            folder / "modules/sd_hijack.py", "EmbeddingsWithFixes", devices=self.modules.devices
        )

    def load(self, name: str):
        """A module of the WebUI."""
        path = self.folder / f"modules/{name}.py"
        spec = importlib.util.spec_from_file_location(f"modules.{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        setattr(self.modules, path.stem, module)
        spec.loader.exec_module(module)
        return module

    @staticmethod
    def taken(path: Path, name: str, **known):
        """A class of a module that imports too much."""
        found = next(node for node in ast.parse(path.read_text()).body if getattr(node, "name", None) == name)
        space = {"torch": torch, "open_clip": open_clip, "AbstractEncoder": nn.Module, "AbstractEmbModel": nn.Module}
        space |= {"autocast": lambda function: function, **known}
        exec(compile(ast.Module([found], []), str(path), "exec"), space)
        return space[name]

    def ldm(self, name: str):
        return self.taken(
            self.folder / "repositories/stable-diffusion-stability-ai/ldm/modules/encoders/modules.py", name
        )

    def sgm(self, name: str):
        return self.taken(self.folder / "repositories/generative-models/sgm/modules/encoders/modules.py", name)


def clip_encoder(webui: WebUI, folder: Path, config: dict, file: str, key: str, **own):
    """CLIP-L with textual inversions under a key."""
    transformer = CLIPTextModel(CLIPTextConfig(**config)).eval()
    missing = transformer.load_state_dict(load_file(folder / file), strict=False).missing_keys
    assert not [name for name in missing if "position_ids" not in name], missing
    hijack = SimpleNamespace(fixes=None, extra_generation_params={}, embedding_db=None)
    embeddings = transformer.text_model.embeddings
    embeddings.token_embedding = webui.with_fixes(embeddings.token_embedding, hijack, key)
    wrapped = nn.Module()
    wrapped.tokenizer, wrapped.transformer = CLIPTokenizer.from_pretrained(folder / "tokenizer"), transformer
    for name, value in own.items():
        setattr(wrapped, name, value)
    return wrapped, hijack


def open_clip_encoder(webui: WebUI, folder: Path, kind: type, width: int, layers: int, file: str, key: str, **own):
    """An OpenCLIP text encoder."""
    text = {"context_length": 77, "vocab_size": 49408, "width": width, "heads": 1, "layers": layers}
    model = CLIP(width, {"image_size": 32, "layers": 1, "width": 64, "patch_size": 32}, text).eval()
    del model.visual
    wrong = model.load_state_dict(load_file(folder / file), strict=False)
    assert set(wrong.missing_keys) <= {"logit_scale"} and not wrong.unexpected_keys, wrong
    hijack = SimpleNamespace(fixes=None, extra_generation_params={}, embedding_db=None)
    model.token_embedding = webui.with_fixes(model.token_embedding, hijack, key)
    wrapped = kind.__new__(kind)
    nn.Module.__init__(wrapped)
    wrapped.model = model
    for name, value in own.items():
        setattr(wrapped, name, value)
    return wrapped, hijack


def text_encoders(webui: WebUI, folder: Path, family: str, asked: dict) -> list:
    """Those of a family, as the WebUI wraps them."""
    if family == "sd1":
        wrapped, hijack = clip_encoder(webui, folder, asked["clip"], "clip.safetensors", "clip_l")
        return [webui.clip.FrozenCLIPEmbedderWithCustomWords(wrapped, hijack)]
    width = asked["clip"]["hidden_size"]
    if family == "sd2":
        wrapped, hijack = open_clip_encoder(
            webui, folder, webui.ldm("FrozenOpenCLIPEmbedder"), width, 3, "open_clip.safetensors", "clip_g", layer_idx=1
        )
        return [webui.open_clip.FrozenOpenCLIPEmbedderWithCustomWords(wrapped, hijack)]
    layers = asked["clip"]["num_hidden_layers"]
    first = clip_encoder(
        webui, folder, asked["clip"], "clip.safetensors", "clip_l", layer="hidden", layer_idx=layers - 1
    )
    own = {"layer": "penultimate", "layer_idx": 1, "legacy": False, "return_pooled": True}
    second = open_clip_encoder(
        webui, folder, webui.sgm("FrozenOpenCLIPEmbedder2"), width, 3, "open_clip.safetensors", "clip_g", **own
    )
    return [
        webui.clip.FrozenCLIPEmbedderForSDXLWithCustomWords(*first),
        webui.open_clip.FrozenOpenCLIPEmbedder2WithCustomWords(*second),
    ]


@torch.no_grad()
def told(webui: WebUI, folder: Path, family: str, asked: dict) -> dict[str, torch.Tensor]:
    """What a family's model is told, by prompt, clip skip and stretch."""
    encoders = text_encoders(webui, folder, family, asked)
    webui.modules.shared.sd_model = SimpleNamespace(cond_stage_model=encoders[0])
    database = webui.inversions.EmbeddingDatabase()
    database.expected_shape = asked["clip"]["hidden_size"] * len(encoders)
    database.load_from_dir(webui.inversions.DirWithTextualInversionEmbeddings(str(folder / "embeddings")))
    for encoder in encoders:
        encoder.hijack.embedding_db = database
    found = {}
    for number, (prompt, clip_skip) in enumerate(asked["prompts"]):
        webui.opts.CLIP_stop_at_last_layers = clip_skip
        schedule = webui.parser.get_learned_conditioning_prompt_schedules([prompt], asked["steps"])[0]
        texts = [text for _, text in schedule]
        said = [encoder(texts) for encoder in encoders]
        tokens = torch.cat([one[0] if isinstance(one, tuple) else one for one in said], dim=-1)
        for place in range(len(texts)):
            found[f"{family}/{number}/{place}/tokens"] = tokens[place].clone()
            if isinstance(said[-1], tuple):
                found[f"{family}/{number}/{place}/pooled"] = said[-1][1][place].clone()
    return found


def main() -> None:
    webui, folder = WebUI(Path(sys.argv[1])), Path(sys.argv[2])
    asked = json.loads((folder / "asked.json").read_text())
    found = {}
    for family in ("sd1", "sd2", "sdxl"):
        found |= told(webui, folder, family, asked)
    save_file(found, folder / "told.safetensors")


if __name__ == "__main__":
    main()
