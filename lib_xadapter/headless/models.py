"""The models of a run: diffusers pipelines as carriers of their parts, and where those are while they are needed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLControlNetPipeline,
    T2IAdapter,
)
from torch import nn

from ..errors import WrongArgument
from ..mapping import MappingLayers
from ..mapping_choice import MappingChoice
from ..memory import Work, fits_together, make_room
from ..settings import AUTO, LOCKSTEP
from ..taps import check_fit
from .inversions import Inversions
from .noise_schedule import NoiseSchedule, trained_alphas


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
        held = [module for module in modules if module is not None and not moves_by_itself(module)]
        try:
            for module in held:
                # also without effect, a quantised model refuses to be moved
                if device_of(module) != torch.device(self.device):
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
        base: a pipeline of SD1.5 with its plugins.
        upgraded: one of SDXL.
        adapter: the mapping layers, None for the SDEdit + SDXL baseline.
        placement: where they run.
        inversions: that prompts may name.
    """

    base: Any
    upgraded: Any
    adapter: MappingLayers | None = None
    placement: Placement = field(default_factory=Placement)
    inversions: Inversions = field(default_factory=Inversions)

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
        together = (*parts_at_work(self.base), self.adapter, *parts_at_work(self.upgraded))
        return fits_together(together, self.placement.device, working)

    def make_room(self, needed: int) -> None:
        """UNets leave a GPU on which fewer bytes are free; who holds them next brings them back."""
        parts = (*parts_at_work(self.base), *parts_at_work(self.upgraded))
        make_room(needed, self.placement.device, [part for part in parts if not moves_by_itself(part)])

    def check(self) -> None:
        """Raises: DoesNotFit: the adapter was made for other models."""
        if self.adapter is not None:
            check_fit(self.adapter, self.base.unet, self.upgraded.unet)


def parts_at_work(pipeline: Any) -> list[nn.Module]:
    """What a pipeline's loop runs: its UNet, and its ControlNets or T2I-Adapters."""
    beside = (getattr(pipeline, name, None) for name in ("controlnet", "adapter"))
    return [pipeline.unet, *(module for module in beside if isinstance(module, nn.Module))]


def with_controls(pipeline: Any, nets: Sequence[ControlNetModel | T2IAdapter]) -> Any:
    """A pipeline of SD1.5, SD2 or SDXL, one with ControlNets where there are any, or of SD1.5 with T2I-Adapters.

    Raises:
        WrongArgument: there are both.
    """
    if not nets:
        return pipeline
    given: Any = nets[0] if len(nets) == 1 else list(nets)
    if any(isinstance(net, T2IAdapter) for net in nets):
        if not all(isinstance(net, T2IAdapter) for net in nets):
            raise WrongArgument(
                "ControlNets and T2I-Adapters cannot act in one picture: diffusers has no such pipeline."
            )
        parts = {name: part for name, part in pipeline.components.items() if name != "image_encoder"}
        return StableDiffusionAdapterPipeline(**parts, adapter=given, requires_safety_checker=False)
    parts = {**pipeline.components, "controlnet": given}
    if hasattr(pipeline, "text_encoder_2"):
        return StableDiffusionXLControlNetPipeline(**parts, add_watermarker=False)
    return StableDiffusionControlNetPipeline(**parts, requires_safety_checker=False)


def moves_by_itself(module: nn.Module) -> bool:
    """Whether hooks of accelerate or diffusers bring a module to the device and away: offloading of some kind."""
    near = [module, *module.children(), *(part for child in module.children() for part in child.children())]
    return any(hasattr(part, "_hf_hook") or hasattr(part, "_diffusers_hook") for part in near)


def device_of(module: nn.Module) -> torch.device:
    return next(itertools.chain(module.parameters(), module.buffers())).device


def noise_schedule_of(pipeline: Any) -> NoiseSchedule:
    """The noise schedule that a model was trained with."""
    return NoiseSchedule(trained_alphas(pipeline.scheduler.config))
