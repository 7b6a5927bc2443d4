"""A base that was trained on in one style, all of its UNet: what users call a fine-tuned checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch

from lib_xadapter.headless.model_files import load_base
from lib_xadapter.miniature.architectures import BaseText
from lib_xadapter.miniature.denoising import Denoiser, denoising_loss
from lib_xadapter.miniature.drawing import base_picture
from lib_xadapter.miniature.finished import MiniatureModels
from lib_xadapter.miniature.latents import Source, fill
from lib_xadapter.miniature.learning import Course, learn
from lib_xadapter.miniature.scenes import Scene
from lib_xadapter.miniature.styles import styled_picture
from lib_xadapter.miniature.worlds import Picture, first_scene

STYLE = "pattern"
PICTURES = 2048
COURSE = Course(steps=600, batch=16, learning_rate=1e-3, warmup=50)


def fine_tune(models: MiniatureModels, folder: Path) -> Path:
    """The base, trained on; a folder of diffusers, which stays where it is there.

    Args:
        models: the miniature ones.
        folder: for pictures, state and the finished model.
    """
    finished = folder / f"miniature-base-{STYLE}"
    # what a pipeline writes last
    if (finished / "model_index.json").is_file():
        return finished
    pipeline = load_base(models.base, torch.float32, models.tokenizer)
    text = BaseText()
    text.encoder = pipeline.text_encoder.requires_grad_(False)
    unet = pipeline.unet.requires_grad_(True)

    def styled(scene: Scene) -> Picture:
        return styled_picture(base_picture(scene), scene, STYLE)

    bank = fill(
        Source(styled, first_scene("fine-tuning"), PICTURES), pipeline.vae, folder / "latents", "fine-tuned latents"
    )
    learn(unet, denoising_loss(Denoiser(unet, text), bank, COURSE.batch), COURSE, folder, "fine-tuned base")
    pipeline.to(torch.float16).save_pretrained(finished)
    return finished
