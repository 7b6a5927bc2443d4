"""Ties the joint stage to the WebUI's samplers: noise levels, rows, and the base's own guided evaluation.

Order inside the WebUI (`sd_samplers_cfg_denoiser.py`, `CFGDenoiser.forward`): one call of the CFG denoiser is one model
evaluation; it builds a batch of conds and unconds and passes it to the inner model whole or in slices.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from modules import prompt_parser, sd_samplers_kdiffusion, shared
from modules.processing import StableDiffusionProcessingTxt2Img
from modules.sd_samplers_cfg_denoiser import CFGDenoiser, catenate_conds
from modules.sd_samplers_common import Sampler
from modules.sd_samplers_timesteps import CFGDenoiserTimesteps
from torch import Tensor

from ..errors import XAdapterError
from ..joint_stage import BaseStep, JointStage
from ..rows import batch_rows
from ..taps import FeatureReader
from .base_model import BaseModel
from .seeded import blank_conditioning


@contextmanager
def lockstep(stage: JointStage, sampler: Sampler) -> Iterator[None]:
    """While open, every model evaluation of the sampler is one of the joint stage."""
    upgraded, denoiser = shared.sd_model, sampler.model_wrap_cfg
    rows = 0

    def before_evaluation(module: CFGDenoiser, args: tuple, kwargs: dict[str, Any]) -> None:
        nonlocal rows
        # the refiner may have become the current model; it is no upgraded model of ours
        if shared.state.interrupted or shared.state.skipped or shared.sd_model is not upgraded:
            return
        layout = batch_rows([len(conds) for conds in kwargs["cond"].batch])
        rows = len(layout)
        stage.advance(noise_level(denoiser, args[1]), progress(denoiser), layout)

    def before_call(module: torch.nn.Module, args: tuple) -> None:
        stage.select(rows_in_batch(args[0], rows))

    with ExitStack() as hooks:
        hooks.enter_context(stage.coupled_to(upgraded.model.diffusion_model))
        hooks.callback(denoiser.register_forward_pre_hook(before_evaluation, with_kwargs=True).remove)
        hooks.callback(denoiser.inner_model.register_forward_pre_hook(before_call).remove)
        hooks.callback(denoiser.inner_model.register_forward_hook(lambda *_: stage.select(None)).remove)
        yield


def noise_level(denoiser: CFGDenoiser, asked: Tensor) -> float:
    """σ of what a sampler asks for: a σ already, or a timestep where the sampler counts in those.

    Args:
        asked: (images,), all alike.
    """
    level = float(asked[0])
    if not isinstance(denoiser, CFGDenoiserTimesteps):
        return level
    return timestep_to_sigma(level, denoiser.alphas)


def timestep_to_sigma(timestep: float, alphas_cumprod: Tensor) -> float:
    """σ = √((1 − ᾱ) / ᾱ) at a timestep, log σ linear between two of them (UniPC asks for fractions)."""
    place = min(max(timestep, 0.0), len(alphas_cumprod) - 1.0)
    low = math.floor(place)
    high = min(low + 1, len(alphas_cumprod) - 1)
    sigmas = [math.sqrt((1 - alpha) / alpha) for alpha in alphas_cumprod[[low, high]].double().tolist()]
    return sigmas[0] ** (1 - place + low) * sigmas[1] ** (place - low)


def progress(denoiser: CFGDenoiser) -> float:
    """How much of the sampling has gone, 0..1; an adaptive sampler can take more evaluations than it has steps."""
    return min(denoiser.step / max(denoiser.total_steps, 1), 1.0)


def rows_in_batch(part: Tensor, rows: int) -> slice:
    """Where a slice that the CFG denoiser passes on lies in its batch, told by its place in the batch's memory.

    Raises:
        XAdapterError: it is no slice of a batch of so many rows.
    """
    if len(part) == rows:
        return slice(0, rows)
    row = part[0].numel()
    if part.untyped_storage().nbytes() != rows * row * part.element_size() or not part.is_contiguous():
        raise XAdapterError(
            f"Another extension passed {len(part)} rows to the model that are no part of the {rows} of this step; "
            "X-Adapter cannot tell which prompt they belong to."
        )
    first = part.storage_offset() // row
    return slice(first, first + len(part))


class BaseEvaluation:
    """Evaluates the base at a noise level, with its own prompts, guidance scale and plugins.

    Args:
        base: the base model.
        job: its processing object, prompts encoded.
        reader: collects its features.
        stage_one: the noise level of each sampling step of stage 1, which prompt schedules are counted in.
    """

    def __init__(
        self, base: BaseModel, job: StableDiffusionProcessingTxt2Img, reader: FeatureReader, stage_one: Sequence[float]
    ) -> None:
        self._base, self._job, self._reader, self._stage_one = base, job, reader, stage_one
        with base.current():
            self._guidance = sd_samplers_kdiffusion.CFGDenoiserKDiffusion(sampler=None)
            self._denoise = self._guidance.inner_model
            self._conditioning = blank_conditioning(job)

    def __call__(self, latent: Tensor, sigma: float) -> BaseStep:
        step = self.prompt_step(sigma)
        with self._base.current():
            conds_list, cond = prompt_parser.reconstruct_multicond_batch(self._job.c, step)
            uncond = prompt_parser.reconstruct_cond_batch(self._job.uc, step)
            layout = batch_rows([len(conds) for conds in conds_list])
            images = [row.image for row in layout]
            self._reader.clear()
            denoised = torch.cat(
                [
                    self._denoised(latent[images[rows]], sigma, given, self._conditioning[images[rows]])
                    for rows, given in self._calls(len(images), cond, uncond)
                ]
            )
        guided = self._guidance.combine_denoised(denoised, conds_list, uncond, self._job.cfg_scale)
        return BaseStep(guided, self._reader.take(), layout)

    def prompt_step(self, sigma: float) -> int:
        """The step of stage 1 whose noise level is nearest: where `[a:b:0.5]` stands at this noise level."""
        distances = [abs(math.log(max(level, 1e-8) / max(sigma, 1e-8))) for level in self._stage_one]
        return min(range(len(distances)), key=distances.__getitem__, default=0)

    def _calls(self, rows: int, cond: Any, uncond: Any) -> list[tuple[slice, Any]]:
        if shared.opts.pad_cond_uncond and cond.shape[1] != uncond.shape[1]:
            cond, uncond = self._guidance.pad_cond_uncond(cond, uncond)
        if shared.opts.batch_cond_uncond and cond.shape[1] == uncond.shape[1]:
            return [(slice(0, rows), catenate_conds([cond, uncond]))]
        return [(slice(0, len(cond)), cond), (slice(len(cond), rows), uncond)]

    def _denoised(self, latent: Tensor, sigma: float, cond: Tensor, image_conditioning: Tensor) -> Tensor:
        conditions = {"c_crossattn": [cond], "c_concat": [image_conditioning]}
        return self._denoise(latent, latent.new_full((len(latent),), sigma), cond=conditions)
