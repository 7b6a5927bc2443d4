"""The models of a run: diffusers pipelines as carriers of their parts, and where those are while they are needed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from diffusers import ControlNetModel, DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import nn

from ..mapping import MappingLayers
from ..mapping_choice import MappingChoice
from ..memory import Work, fits_together, make_room
from ..settings import AUTO, LOCKSTEP
from ..taps import check_fit
from .noise_schedule import NoiseSchedule


@dataclass(frozen=True)
class Placement:
    """Where models run and in which type.

    Attributes:
        device: where they run.
        dtype: of everything but the VAEs, which overflow in float16 and stay in float32.
        low_memory: whether they are on the device only while they are needed.
        mapping: how the mapping layers run, as in `mapping_choice`.
    """

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    low_memory: bool = False
    mapping: MappingChoice = "auto"

    @contextmanager
    def holding(self, *modules: nn.Module | None) -> Iterator[None]:
        """While open, the modules are on the device."""
        held = [module for module in modules if module is not None]
        try:
            for module in held:
                module.to(self.device)
            yield
        finally:
            if self.low_memory:
                for module in held:
                    module.to("cpu")


@dataclass(frozen=True)
class Models:
    """Everything that a picture is made with.

    Attributes:
        base: SD1.5 with its plugins.
        upgraded: SDXL.
        adapter: the mapping layers, None for the SDEdit + SDXL baseline.
        controlnets: of the base, in the order of a request's control images.
        placement: where they run.
    """

    base: StableDiffusionPipeline
    upgraded: StableDiffusionXLPipeline
    adapter: MappingLayers | None = None
    controlnets: Sequence[ControlNetModel] = ()
    placement: Placement = field(default_factory=Placement)

    def share_the_device(self, memory: str, work: Work) -> Models:
        """These models, of which base and upgraded one are never on the device together if memory wants it so.

        Args:
            memory: as in `Settings`; "auto" looks at what is free.
            work: of a joint step.
        """
        if memory == LOCKSTEP or (memory == AUTO and self.fit_together(work.memory(overlapped=False))):
            return self
        return replace(self, placement=replace(self.placement, low_memory=True))

    def fit_together(self, working: int) -> bool:
        """Whether the UNets and the mapping layers can be on the device at once, with so many bytes to work in."""
        together = (self.base.unet, *self.controlnets, self.adapter, self.upgraded.unet)
        return fits_together(together, self.placement.device, working)

    def make_room(self, needed: int) -> None:
        """UNets leave a GPU on which fewer bytes are free; who holds them next brings them back."""
        make_room(needed, self.placement.device, (self.base.unet, *self.controlnets, self.upgraded.unet))

    def check(self) -> None:
        """Raises: DoesNotFit: the adapter was made for other models."""
        if self.adapter is not None:
            check_fit(self.adapter, self.base.unet, self.upgraded.unet)


def noise_schedule_of(pipeline: StableDiffusionPipeline | StableDiffusionXLPipeline) -> NoiseSchedule:
    """The noise schedule that a model was trained with."""
    known = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
    config = {key: value for key, value in pipeline.scheduler.config.items() if key in known}
    zero_snr = pipeline.scheduler.config.get("rescale_betas_zero_snr", False)
    return NoiseSchedule(DDIMScheduler(**config, rescale_betas_zero_snr=zero_snr).alphas_cumprod)
