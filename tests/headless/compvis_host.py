"""A host of the core made of the real ldm classes: UNets, VAEs and the DDIM sampler of the CompVis code base.

The WebUI builds on the same classes. Says by a second way what a picture must be, by the released pipeline's rules.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.modules.diffusionmodules.model import Decoder, Encoder
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.modules.diffusionmodules.util import timestep_embedding
from PIL import Image
from torch import Tensor, nn

from lib_xadapter.evaluations import Evaluation
from lib_xadapter.feature_sources import BaseDenoiser, BaseStep, Lockstep, OncePerLevel
from lib_xadapter.headless.compvis_layout import UNET_PREFIX, VAE_PREFIX
from lib_xadapter.headless.model_configs import SIZE_EMBEDDING
from lib_xadapter.headless.pipeline import Request
from lib_xadapter.joint_stage import Coupling, JointStage
from lib_xadapter.mapping import MappingLayers
from lib_xadapter.mapping_paths import EagerMapping
from lib_xadapter.rows import batch_rows
from lib_xadapter.taps import FeatureReader, read_features
from lib_xadapter.trajectory import Trajectory
from tests.guided_unets import Prompts

ROWS = batch_rows([1])
UNCOND_FIRST = [1, 0]
"""ldm's sampler puts the uncond before the cond."""

FIRST_ORDER = 1
"""The released pipeline steps the base by the sampler's own order, DDIM's."""

File = Mapping[str, Tensor]


def part(file: File, prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in file.items() if key.startswith(prefix)}


SMALL_UNET = {
    "image_size": 32,
    "in_channels": 4,
    "model_channels": 32,
    "out_channels": 4,
    "num_res_blocks": 2,
    "use_spatial_transformer": True,
    "legacy": False,
}


def compvis_base(file: File) -> UNetModel:
    """The small SD1.5, as `v1-inference.yaml` would have it."""
    attention = {"attention_resolutions": [4, 2, 1], "num_heads": 8, "context_dim": 64}
    return loaded(UNetModel(**SMALL_UNET, channel_mult=[1, 2, 4, 4], **attention), part(file, UNET_PREFIX))


def compvis_upgraded(file: File) -> UNetModel:
    """The small SDXL with one transformer block everywhere, as `sd_xl_base.yaml` would have it."""
    attention = {"attention_resolutions": [4, 2], "num_head_channels": 64, "context_dim": 128}
    unet = UNetModel(**SMALL_UNET, channel_mult=[1, 2, 4], **attention, use_linear_in_transformer=True)
    # SDXL's embedding of pooled prompt and sizes came to these classes later, in sgm
    weights = part(file, UNET_PREFIX)
    width, told = weights["label_emb.0.0.weight"].shape
    unet.num_classes = "sequential"
    unet.label_emb = nn.Sequential(nn.Sequential(nn.Linear(told, width), nn.SiLU(), nn.Linear(width, width)))
    return loaded(unet, weights)


def loaded(module: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    module.load_state_dict(weights)
    return module.eval().requires_grad_(False)


class CompVisVae:
    """ldm's encoder and decoder with the convolutions between them."""

    def __init__(self, file: File, scaling_factor: float) -> None:
        shape = {
            "ch": 32,
            "out_ch": 3,
            "ch_mult": (1, 1, 1, 1),
            "num_res_blocks": 1,
            "attn_resolutions": [],
            "in_channels": 3,
            "resolution": 64,
            "z_channels": 4,
        }
        weights = part(file, VAE_PREFIX)
        self._scaling_factor = scaling_factor
        self._encoder = loaded(Encoder(**shape, double_z=True), part(weights, "encoder."))
        self._decoder = loaded(Decoder(**shape), part(weights, "decoder."))
        self._quant = loaded(nn.Conv2d(8, 8, 1), part(weights, "quant_conv."))
        self._post_quant = loaded(nn.Conv2d(4, 4, 1), part(weights, "post_quant_conv."))

    def picture(self, latent: Tensor) -> Image.Image:
        pixels = self._decoder(self._post_quant(latent / self._scaling_factor))[0]
        grey = (pixels / 2 + 0.5).clamp(0, 1).mul(255).round().byte()
        return Image.fromarray(grey.permute(1, 2, 0).numpy())

    def latent(self, picture: Image.Image) -> Tensor:
        """The mean of the posterior."""
        pixels = torch.from_numpy(numpy.array(picture, dtype=numpy.float32)).permute(2, 0, 1)[None] / 127.5 - 1
        return self._quant(self._encoder(pixels))[:, :4] * self._scaling_factor


@dataclass
class SamplerModel:
    """What ldm's sampler asks of a model."""

    apply: Callable[[Tensor, Tensor, Tensor], Tensor]
    device: str = "cpu"
    num_timesteps: int = 1000
    parameterization: str = "eps"

    def __post_init__(self) -> None:
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, self.num_timesteps, dtype=torch.float64) ** 2
        self.betas = betas
        self.alphas_cumprod = (1 - betas).cumprod(0)
        self.alphas_cumprod_prev = torch.cat([torch.ones(1), self.alphas_cumprod[:-1]])

    def apply_model(self, latent: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        # with current numpy the sampler's own factors are double
        return self.apply(latent.float(), timestep, context)

    def sigma(self, timestep: Tensor) -> float:
        alpha = float(self.alphas_cumprod[int(timestep[0])])
        return math.sqrt((1 - alpha) / alpha)


@dataclass(frozen=True)
class CompVisHost:
    """Two stages for one image, by ldm's classes and the core alone."""

    base: UNetModel
    upgraded: UNetModel
    base_vae: CompVisVae
    upgraded_vae: CompVisVae
    adapter: MappingLayers

    @torch.no_grad()
    def base_latents(self, request: Request) -> Tensor:
        sampler = DDIMSampler(SamplerModel(lambda x, t, context: self.base(x, t, context=context)))
        noise = request.noise.base()
        prompts = prompts_of(request.base)
        return sampler.sample(
            request.steps,
            1,
            noise.shape[1:],
            prompts.cond,
            x_T=noise,
            unconditional_conditioning=prompts.uncond,
            unconditional_guidance_scale=request.upgraded["guidance_scale"],
            verbose=False,
        )[0]

    @torch.no_grad()
    def upgraded_latents(self, request: Request, finished: Tensor, size: tuple[int, int], joint_steps: int) -> Tensor:
        noise, prompts = request.noise.noises[0], prompts_of(request.upgraded, request.size)
        clean = self.upgraded_vae.latent(self.base_vae.picture(finished).resize(size, Image.Resampling.BICUBIC))
        with read_features(self.base) as reader:
            trajectory = Trajectory(noise.base_again[None], finished, FIRST_ORDER)
            source = OncePerLevel(Lockstep(self._lockstep_base(request, reader), trajectory))
            stage = JointStage(source, Coupling(EagerMapping(self.adapter), request.settings.weights))
            model = SamplerModel(lambda x, t, context: self._joint(stage, model, request, x, t, context))
            sampler = DDIMSampler(model)
            sampler.make_schedule(request.steps, verbose=False)
            start = sampler.stochastic_encode(clean, torch.tensor([joint_steps - 1]), noise=noise.upgraded[None])
            finished = sampler.decode(
                start.float(),
                prompts.cond,
                joint_steps,
                unconditional_conditioning=prompts.uncond,
                unconditional_guidance_scale=request.upgraded["guidance_scale"],
            )
        return finished.float()

    def _joint(
        self, stage: JointStage, model: SamplerModel, request: Request, x: Tensor, t: Tensor, context: Tensor
    ) -> Tensor:
        rows = [ROWS[place] for place in UNCOND_FIRST]
        evaluation = stage.evaluate(Evaluation(model.sigma(t), step=0, progress=0.5), rows)
        told = told_to_sdxl(prompts_of(request.upgraded, request.size))[UNCOND_FIRST]
        with evaluation.fused_into(self.upgraded, slice(0, 2)):
            return self.upgraded(x, t, context=context, y=told)

    def _lockstep_base(self, request: Request, reader: FeatureReader) -> BaseDenoiser:
        context = torch.cat([request.base["prompt_embeds"], request.base["negative_prompt_embeds"]])
        model = SamplerModel(lambda *arguments: arguments[0])
        levels = ((1 - model.alphas_cumprod) / model.alphas_cumprod).sqrt()

        def evaluate(latent: Tensor, evaluation: Evaluation) -> BaseStep:
            sigma = evaluation.sigma
            timestep = (levels - sigma).abs().argmin().repeat(2)
            scaled = latent / math.sqrt(1 + sigma**2)
            cond, uncond = self.base(torch.cat([scaled] * 2), timestep, context=context).chunk(2)
            noise = uncond + request.base["guidance_scale"] * (cond - uncond)
            return BaseStep(reader.take(), ROWS, latent - sigma * noise)

        return evaluate


def prompts_of(told: Mapping[str, Any], size: tuple[int, int] = (0, 0)) -> Prompts:
    """What a pipeline of diffusers is told, with the sizes that it adds."""
    width, height = size
    return Prompts(
        told["prompt_embeds"],
        told["negative_prompt_embeds"],
        told.get("pooled_prompt_embeds"),
        told.get("negative_pooled_prompt_embeds"),
        torch.tensor([[height, width, 0, 0, height, width]]).float(),
    )


def told_to_sdxl(prompts: Prompts) -> Tensor:
    """Pooled prompt and embedded sizes, cond and uncond, as sgm's conditioner joins them."""
    sizes = timestep_embedding(prompts.time_ids[0], SIZE_EMBEDDING).flatten()
    return torch.stack([torch.cat([pooled[0], sizes]) for pooled in (prompts.pooled_cond, prompts.pooled_uncond)])
