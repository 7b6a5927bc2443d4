"""The base's guided evaluation inside the WebUI, as the joint stage asks for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from modules import prompt_parser, sd_samplers_kdiffusion, shared
from modules.processing import StableDiffusionProcessing
from modules.sd_samplers_cfg_denoiser import catenate_conds
from torch import Tensor

from ...evaluations import Evaluation, nearest_level
from ...families import FAMILY_NAMES
from ...feature_sources import BaseStep
from ...rows import batch_rows, take_rows
from ...taps import FeatureReader
from ..sampling.mask_blending import MaskBlending
from ..sampling.seeded import blank_conditioning
from . import plugins
from .base_model import BaseModel
from .host_state import count_steps_anew


class BaseEvaluation:
    """Evaluates the base at a noise level, with its own prompts, guidance scale and plugins.

    Raises `WrongFile` where a LoRA does not fit the base's layers.

    Args:
        base: the base model.
        job: its processing object, prompts encoded.
        reader: collects its features.
        stage_one: the noise level of each sampling step of stage 1, which prompt schedules are counted in.
        total_steps: evaluations of SDXL's sampler, which they are counted in where there is no stage 1.
        blending: what scripts do where a mask is blended in.
    """

    def __init__(
        self,
        base: BaseModel,
        job: StableDiffusionProcessing,
        reader: FeatureReader,
        stage_one: Sequence[float],
        total_steps: int,
        blending: MaskBlending,
    ) -> None:
        self._base, self._job, self._reader, self._stage_one = base, job, reader, stage_one
        self._total_steps, self._blending = total_steps, blending
        self._cond, self._uncond = job.get_conds()
        # as the WebUI's own samplers ask for it: txt2img has none
        self._is_masked = getattr(job, "mask", None) is not None
        with base.current():
            count_steps_anew()
            self._guidance = sd_samplers_kdiffusion.CFGDenoiserKDiffusion(sampler=None)
            self._denoise = self._guidance.inner_model
            given = getattr(job, "image_conditioning", None)
            self._conditioning = blank_conditioning(job) if given is None else given

    def __call__(self, latent: Tensor, evaluation: Evaluation) -> BaseStep:
        sigma, step = evaluation.sigma, self.prompt_step(evaluation)
        with self._base.current():
            conds_list, cond = prompt_parser.reconstruct_multicond_batch(self._cond, step)
            uncond = prompt_parser.reconstruct_cond_batch(self._uncond, step)
            layout = batch_rows([len(conds) for conds in conds_list])
            images = [row.image for row in layout]
            batch, conditioning = take_rows(latent, images), take_rows(self._conditioning, images)
            self._reader.clear()
            denoised = torch.cat(
                [
                    self._denoised(batch[rows], sigma, given, conditioning[rows])
                    for rows, given in self._calls(len(images), cond, uncond)
                ]
            )
            # the WebUI applies LoRAs when layers are called, here for the first time where there is no stage 1
            plugins.check_applied(FAMILY_NAMES[self._base.family])
        guided = self._guidance.combine_denoised(denoised, conds_list, uncond, self._job.cfg_scale)
        if self._is_masked:
            levels = latent.new_full((len(latent),), sigma)
            guided = self._blending.at_step(self._job, self._guidance, guided, levels)
        return BaseStep(self._reader.take(), layout, guided)

    def prompt_step(self, evaluation: Evaluation) -> int:
        """Where `[a:b:0.5]` is: at the nearest noise level of stage 1; without one, as far as SDXL has come."""
        if not self._stage_one:
            # a quotient times its divisor may fall short of the whole number that it was
            return int(evaluation.progress * self._total_steps + 1e-6)
        return nearest_level(self._stage_one, evaluation.sigma)

    def _calls(self, rows: int, cond: Any, uncond: Any) -> list[tuple[slice, Any]]:
        if shared.opts.pad_cond_uncond and cond.shape[1] != uncond.shape[1]:
            cond, uncond = self._guidance.pad_cond_uncond(cond, uncond)
        if shared.opts.batch_cond_uncond and cond.shape[1] == uncond.shape[1]:
            return [(slice(0, rows), catenate_conds([cond, uncond]))]
        return [(slice(0, len(cond)), cond), (slice(len(cond), rows), uncond)]

    def _denoised(self, latent: Tensor, sigma: float, cond: Tensor, image_conditioning: Tensor) -> Tensor:
        conditions = {"c_crossattn": [cond], "c_concat": [image_conditioning]}
        return self._denoise(latent, latent.new_full((len(latent),), sigma), cond=conditions)
