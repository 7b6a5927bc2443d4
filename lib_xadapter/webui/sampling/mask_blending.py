"""The unmasked part of a picture blended back in, as the WebUI does it after each step of inpainting.

Source: `sd_samplers_cfg_denoiser.py`, `apply_blend`; `processing.py`, `StableDiffusionProcessingImg2Img.sample`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from modules import scripts
from modules.processing import StableDiffusionProcessing, StableDiffusionProcessingImg2Img
from modules.sd_samplers_cfg_denoiser import CFGDenoiser
from torch import Tensor


@dataclass(frozen=True)
class MaskBlending:
    """Blends for the base what the scripts of SDXL's processing object (Soft inpainting) make of a blend.

    Attributes:
        p: SDXL's processing object.
    """

    p: StableDiffusionProcessing

    def on_mask_blend(self, job: Any, blend: scripts.MaskBlendArgs) -> None:
        """The WebUI's hook, called for SDXL's processing object instead of the base's."""
        if self.p.scripts is not None:
            self.p.scripts.on_mask_blend(self.p, blend)

    @contextmanager
    def of(self, job: StableDiffusionProcessing) -> Iterator[None]:
        """While open, a sampler of the base blends through the scripts."""
        job.scripts_value = self
        try:
            yield
        finally:
            job.scripts_value = None

    def at_step(
        self, job: StableDiffusionProcessingImg2Img, denoiser: CFGDenoiser, denoised: Tensor, sigma: Tensor
    ) -> Tensor:
        """A prediction of the clean latent, (images, 4, h, w), outside the mask the given picture's."""
        return self._blended(job, denoised, denoiser=denoiser, sigma=sigma)

    def finally_blended(self, job: StableDiffusionProcessingImg2Img, latents: Tensor) -> Tensor:
        """Finished latents, (images, 4, h, w), outside the mask the given picture's."""
        return self._blended(job, latents)

    def _blended(self, job: StableDiffusionProcessingImg2Img, latents: Tensor, **step: Any) -> Tensor:
        blended = latents * job.nmask + job.init_latent * job.mask
        blend = scripts.MaskBlendArgs(latents, job.nmask, job.init_latent, job.mask, blended, **step)
        self.on_mask_blend(job, blend)
        return blend.blended_latent
