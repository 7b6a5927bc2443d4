"""Small networks with random weights, as the folders and files that `evaluate` is given."""

from __future__ import annotations

import os
from pathlib import Path

import numpy
import pytest
from PIL import Image, ImageDraw

os.environ["HF_HUB_OFFLINE"] = "1"
for package in ("diffusers", "torch_fidelity", "skimage", "cv2"):
    pytest.importorskip(package, reason="needs the extra 'evaluate'")


@pytest.fixture(scope="session")
def own_controlnet(small, tmp_path_factory) -> Path:
    """A ControlNet of SDXL itself."""
    import safetensors.torch
    import torch
    from diffusers import ControlNetModel

    from tests.small_models import seeded, upgraded_unet

    net = seeded(ControlNetModel.from_unet(upgraded_unet()), "upgraded.controlnet", gain=1.2)
    path = tmp_path_factory.mktemp("own") / "own-edges.safetensors"
    safetensors.torch.save_file({name: tensor.to(torch.float32) for name, tensor in net.state_dict().items()}, path)
    return path


@pytest.fixture(scope="session")
def clip_folder(small, tmp_path_factory) -> Path:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    from lib_xadapter.headless.tokenizers import load_tokenizer
    from tests.small_models import seeded, text_config

    folder = tmp_path_factory.mktemp("clip")
    narrow = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
    told = CLIPConfig(
        text_config=text_config("gelu").to_dict(),
        vision_config={**narrow, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    seeded(CLIPModel(told), "clip").save_pretrained(folder)
    pictures = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(pictures, load_tokenizer(small.tokenizer)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def depth_folder(tmp_path_factory) -> Path:
    from transformers import DPTConfig, DPTForDepthEstimation, DPTImageProcessor

    from tests.small_models import seeded

    folder = tmp_path_factory.mktemp("depth")
    told = DPTConfig(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
        neck_hidden_sizes=[16] * 4,
        fusion_hidden_size=16,
        backbone_out_indices=[0, 1, 2, 3],
    )
    network = seeded(DPTForDepthEstimation(told), "depth")
    # what is below 0 at the end is cut off
    network.head.head[-2].bias.fill_(5.0)
    network.save_pretrained(folder)
    DPTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory) -> Path:
    """Weights in the layout that torch-fidelity reads."""
    import torch
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Module, "load_state_dict", lambda self, state: None)
        patch.setattr(torch, "load", lambda *_, **__: {})
        network = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path="none")
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture
def noise() -> numpy.random.Generator:
    return numpy.random.default_rng(5)


@pytest.fixture(scope="session")
def captioned(tmp_path_factory) -> Path:
    """A folder of two pictures of other shapes than are made, with captions."""
    folder = tmp_path_factory.mktemp("captioned")
    for place, (name, size) in enumerate((("ball", (160, 96)), ("moon", (96, 120)))):
        picture = Image.new("RGB", size, (60 * place, 90, 120))
        ImageDraw.Draw(picture).ellipse((20, 20, 80 + 8 * place, 80), fill="yellow", outline="red")
        picture.save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"a yellow {name} (number {place}) at 10:30")
    return folder
