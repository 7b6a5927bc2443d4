"""The networks by which `evaluate` measures miniature pictures, of transformers' classes: a CLIP, a depth estimator."""

from __future__ import annotations

from pathlib import Path

import numpy
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    GLPNConfig,
    GLPNForDepthEstimation,
    GLPNImageProcessor,
)

from ..headless.tokenizers import load_tokenizer
from .captions import caption_of, facts_of
from .drawing import base_picture, depth_map, upgraded_picture
from .learning import Drawn, Loss
from .scenes import Scene
from .styles import STYLES, styled_picture
from .vocabulary import LENGTH, numbers
from .worlds import Picture, random_scene, tensor_of, tokens_of

SEEN = 64
"""Pixels that both networks see pictures at."""
WIDTH, LAYERS, HEADS, PATCH = 48, 2, 4, 8
"""Of the CLIP."""
SCALE = 20.0
"""By which it multiplies cosines."""
DEEPEST = 10.0
"""What the depth estimator says where a depth map is white."""


def clip() -> CLIPModel:
    layers = {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "projection_dim": WIDTH,
    }
    end = len(numbers()) - 1
    text = {"vocab_size": end + 1, "max_position_embeddings": LENGTH, "bos_token_id": end - 1, "eos_token_id": end}
    config = CLIPConfig(
        text_config={**layers, **text, "pad_token_id": end},
        vision_config={**layers, "image_size": SEEN, "patch_size": PATCH},
        projection_dim=WIDTH,
    )
    return CLIPModel(config)


class ClipWithStyles(nn.Module):
    """A CLIP, and a layer that tells the style of a picture from its embedding: captions tell nothing of styles."""

    def __init__(self) -> None:
        super().__init__()
        self.clip = clip()
        self.style = nn.Linear(WIDTH, 2 * (1 + len(STYLES)))


def clip_loss(model: ClipWithStyles, batch: int) -> Loss:
    """Which caption belongs to which picture (Radford et al., 2021), and of which world and style each picture is."""
    mean, deviation = (torch.tensor(values)[:, None, None] for values in _preprocessed())

    def loss(drawn: Drawn) -> Tensor:
        scenes, looks, pictures = _drawn_scenes(drawn, batch)
        pixels = ((tensor_of(pictures) + 1) / 2 - mean) / deviation
        tokens = tokens_of([caption_of(facts_of(scene)) for scene in scenes])
        seen = functional.normalize(model.clip.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
        read = functional.normalize(model.clip.get_text_features(input_ids=tokens).pooler_output, dim=-1)
        alike, own = SCALE * seen @ read.T, torch.arange(batch)
        matched = functional.cross_entropy(alike, own) + functional.cross_entropy(alike.T, own)
        return matched / 2 + functional.cross_entropy(SCALE * model.style(seen), torch.from_numpy(looks))

    return loss


def _drawn_scenes(drawn: Drawn, batch: int) -> tuple[list[Scene], numpy.ndarray, list[Picture]]:
    """Scenes, the look of each, and their pictures in it."""
    scenes = [random_scene(drawn.numbers) for _ in range(batch)]
    looks = drawn.numbers.integers(2 * (1 + len(STYLES)), size=batch)
    return scenes, looks, [_looking(scene, int(look)) for scene, look in zip(scenes, looks, strict=True)]


def _looking(scene: Scene, look: int) -> Picture:
    """A scene in one of both worlds and one of all styles, or none."""
    world, style = divmod(look, 1 + len(STYLES))
    picture = upgraded_picture(scene, SEEN) if world else base_picture(scene, SEEN)
    return styled_picture(picture, scene, STYLES[style - 1]) if style else picture


def _preprocessed() -> tuple[list[float], list[float]]:
    """Mean and deviation of each channel, as CLIP takes them."""
    processor = CLIPImageProcessor()
    return list(processor.image_mean), list(processor.image_std)


def save_clip(model: CLIPModel, folder: Path, tokenizer: Path) -> None:
    """As `evaluate --clip` reads it."""
    model.half().save_pretrained(folder)
    pictures = CLIPImageProcessor(size={"shortest_edge": SEEN}, crop_size={"height": SEEN, "width": SEEN})
    CLIPProcessor(pictures, load_tokenizer(tokenizer)).save_pretrained(folder)


def depth_estimator() -> GLPNForDepthEstimation:
    return GLPNForDepthEstimation(
        GLPNConfig(
            hidden_sizes=[16, 24, 32, 40],
            depths=[1, 1, 1, 1],
            num_attention_heads=[1, 1, 2, 2],
            mlp_ratios=[2, 2, 2, 2],
            decoder_hidden_size=24,
            max_depth=int(DEEPEST),
        )
    )


def depth_loss(model: nn.Module, batch: int) -> Loss:
    """Absolute error of the depth of pictures of both worlds, plain and styled."""

    def loss(drawn: Drawn) -> Tensor:
        scenes, _, pictures = _drawn_scenes(drawn, batch)
        true = torch.from_numpy(numpy.stack([depth_map(scene, SEEN) for scene in scenes])).float() / 255
        predicted = model(pixel_values=(tensor_of(pictures) + 1) / 2).predicted_depth
        return (predicted - DEEPEST * true).abs().mean() / DEEPEST

    return loss


def save_depth_estimator(model: GLPNForDepthEstimation, folder: Path) -> None:
    """As `evaluate --depth` reads it."""
    model.half().save_pretrained(folder)
    GLPNImageProcessor(do_resize=True, size_divisor=32, do_rescale=True).save_pretrained(folder)
