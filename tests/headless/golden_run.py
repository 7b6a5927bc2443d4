"""The runs of the released pipeline in tests/golden/pipeline.npz, as requests of ours."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from torch import Tensor

from lib_xadapter.headless.models import with_controls
from lib_xadapter.headless.pipeline import Noise, NoisePerImage, Request
from lib_xadapter.settings import Settings
from tests.guided_unets import Prompts
from tests.seeded import fill, seeded
from tests.small_unets import base_unet, upgraded_unet

SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@dataclass(frozen=True)
class GoldenRun:
    """One row of the table of runs."""

    name: str
    base_size: tuple[int, int]
    switch_point: float
    weight: float
    control_scale: float
    cfg_scale: float

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the upgraded picture in pixels."""
        height, width = self.base_size
        return 16 * width, 16 * height

    def noise(self, kind: str) -> Tensor:
        height, width = self.base_size
        factor = 2 if kind.startswith("upgraded") else 1
        return seeded(f"pipeline.{self.name}.noise.{kind}", (1, 4, factor * height, factor * width))[0]

    def request(self) -> Request:
        guided = self.cfg_scale > 1
        width, height = self.size
        base = {"cond": seeded("pipeline.base.prompt", (1, 77, 48))}
        upgraded = {
            "cond": seeded("pipeline.upgraded.prompt", (1, 77, 80)),
            "pooled_cond": seeded("pipeline.upgraded.pooled", (1, 40)),
        }
        if guided:
            base["uncond"] = seeded("pipeline.base.negative", (1, 77, 48))
            upgraded["uncond"] = seeded("pipeline.upgraded.negative", (1, 77, 80))
            upgraded["pooled_uncond"] = seeded("pipeline.upgraded.negative_pooled", (1, 40))
        control = (seeded("pipeline.control", (1, 3, height // 2, width // 2)) > 0.5).float()
        unused = torch.Generator()
        noise = Noise(
            self.noise("base.init"), self.noise("upgraded.renoise"), self.noise("base.renoise"), *[unused] * 4
        )
        return Request(
            base={
                **Prompts(**base).arguments(),
                "image": control,
                "controlnet_conditioning_scale": self.control_scale,
                "guidance_scale": self.cfg_scale,
                "width": width // 2,
                "height": height // 2,
            },
            upgraded={
                **Prompts(**upgraded).arguments(),
                "guidance_scale": self.cfg_scale,
                "width": width,
                "height": height,
            },
            settings=Settings(switch_point=self.switch_point, weight=self.weight),
            steps=10,
            noise=NoisePerImage([noise]),
            images=1,
            size=self.size,
            base_size=(width // 2, height // 2),
            sampler="DDIM",
        )


RUNS = (
    GoldenRun("canny", (16, 16), 1.0, 1.2, 1.5, 7.5),
    GoldenRun("sdedit", (16, 16), 1.0, 0.0, 1.5, 7.5),
    GoldenRun("depth", (16, 24), 0.8, 1.0, 1.0, 5.0),
    GoldenRun("nocfg", (16, 16), 0.6, 1.0, 1.0, 1.0),
)


def small_vae(name: str, scaling_factor: float) -> AutoencoderKL:
    """A VAE that encodes without spread."""
    vae = AutoencoderKL(
        block_out_channels=(32,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        layers_per_block=1,
        scaling_factor=scaling_factor,
    )
    fill(vae, f"{name}.vae.")
    vae.quant_conv.weight[4:] = 0
    vae.quant_conv.bias[4:] = -30
    return vae


def base_pipeline() -> StableDiffusionControlNetPipeline:
    """With its ControlNet."""
    base = StableDiffusionPipeline(
        vae=small_vae("base", 0.18215),
        text_encoder=None,
        tokenizer=None,
        unet=base_unet(),
        scheduler=DDIMScheduler(**SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return with_controls(base, [small_controlnet(base.unet)])


def upgraded_pipeline() -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline(
        vae=small_vae("upgraded", 0.13025),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=upgraded_unet(),
        scheduler=DDIMScheduler(**SCHEDULER),
        add_watermarker=False,
    )


def small_controlnet(unet: torch.nn.Module) -> ControlNetModel:
    return fill(ControlNetModel.from_unet(unet), "base.controlnet.")
