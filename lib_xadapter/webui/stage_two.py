"""Stage 2: SDXL over the base's picture, led by the base's features."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from modules import lowvram, sd_samplers, shared
from modules.processing import StableDiffusionProcessingTxt2Img
from torch import Tensor

from ..feature_sources import FeatureSource, Lockstep
from ..joint_stage import Course, JointStage, Moment
from ..mapping_paths import MappingPath
from ..overlap import SideStream
from ..settings import Settings
from . import switch
from .coupling import coupled
from .stage_one import StageOne


@dataclass(frozen=True)
class StageTwo:
    """SDXL's part of a batch.

    Attributes:
        p: its processing object.
        settings: of X-Adapter.
        mapping: the mapping layers, None without an adapter.
        planned: the model evaluations that p's sampler will ask for, where they are known.
        side_stream: where the base can run beside SDXL, on a GPU.
    """

    p: StableDiffusionProcessingTxt2Img
    settings: Settings
    mapping: MappingPath | None
    planned: tuple[Moment, ...] | None
    side_stream: SideStream | None = None

    def sample(self, made: StageOne, source: FeatureSource | None, cond: Any, uncond: Any) -> Tensor:
        """Latents of SDXL, (images, 4, height / 8, width / 8).

        Args:
            made: stage 1.
            source: gives the base's features; None where nothing but its picture leads.
            cond, uncond: SDXL's encoded prompts.
        """
        self.p.sampler = sd_samplers.create_sampler(self.p.sampler_name, self.p.sd_model)
        if self.settings.single_stage:
            return self._from_noise(source, cond, uncond)
        return self._from_picture(made, source, cond, uncond)

    def _from_picture(self, made: StageOne, source: FeatureSource | None, cond: Any, uncond: Any) -> Tensor:
        """From the base's picture, noised to the switch point, as the img2img tab does it."""
        p = self.p
        carried = switch.carry_over(made.pictures, p.seeds, p.width, p.height)
        conditioning = p.img2img_image_conditioning(carried.pixels * 2 - 1, carried.latents)
        noise = p.rng.next() * shared.opts.initial_noise_multiplier
        self._announce(carried.latents, noise, cond, uncond)
        with self._led_by(source), switch.denoising_strength(p, self.settings.switch_point):
            return p.sampler.sample_img2img(p, carried.latents, noise, cond, uncond, image_conditioning=conditioning)

    def _from_noise(self, source: FeatureSource | None, cond: Any, uncond: Any) -> Tensor:
        """Both from noise, as the txt2img tab does it."""
        p = self.p
        noise = p.rng.next()
        self._announce(noise, noise, cond, uncond)
        with self._led_by(source):
            return p.sampler.sample(p, noise, cond, uncond, image_conditioning=p.txt2img_image_conditioning(noise))

    def _announce(self, x: Tensor, noise: Tensor, cond: Any, uncond: Any) -> None:
        """What the WebUI tells scripts before every sampling."""
        if self.p.scripts is not None:
            self.p.scripts.process_before_every_sampling(p=self.p, x=x, noise=noise, c=cond, uc=uncond)

    @contextmanager
    def _led_by(self, source: FeatureSource | None) -> Iterator[None]:
        """While open, the processing object's sampler takes SDXL through the joint stage."""
        if source is None:
            yield
            return
        settings = self.settings
        stage = JointStage(
            source,
            self.mapping,
            settings.weights,
            Course.asked_for(settings),
            settings.cond_only,
            self.side_stream if self._may_run_beside(source) else None,
        )
        with coupled(stage, self.p.sampler, self.planned):
            yield

    @staticmethod
    def _may_run_beside(source: FeatureSource) -> bool:
        # the WebUI moves a model's parts when they are called, which must not happen in the middle of a call of SDXL
        return isinstance(source, Lockstep) and not lowvram.is_enabled(shared.sd_model)
