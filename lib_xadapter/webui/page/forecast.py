"""What a job will do, told before it runs: its samplings, with sizes and steps, by the rules that the job follows.

Nothing is loaded or changed for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from modules import shared
from modules.processing import (
    StableDiffusionProcessing,
    StableDiffusionProcessingImg2Img,
    StableDiffusionProcessingTxt2Img,
)

from ...families import FAMILY_NAMES
from ...settings import AUTO, CONTROL_IMAGE, LOCKSTEP, RECORDED, Settings
from .. import model_files
from ..base.base_processing import base_hires_size, base_size, hires_size, largest_work
from ..sampling.samplings import Sampling, Start, check_tab, hires_sampling, samplings_of, stage_one_steps

if TYPE_CHECKING:
    from ..base.models import Models

TXT2IMG, IMG2IMG = "txt2img", "img2img"
NOT_TICKED = "X-Adapter is not ticked: the picture is the WebUI's own."


@dataclass(frozen=True)
class TabRequest:
    """What a tab is about to ask for. Names are those of the WebUI's own requests where it has the same thing.

    Attributes:
        tab: "txt2img" or "img2img".
        args: X-Adapter's, as the WebUI hands them to its script: the controls' values, or an object in front of them.
        units: the ControlNet panel's, as that extension takes them.
        scale_by: the img2img tab's "Resize by"; None where width and height are given.
        source_width, source_height: of the given picture; 0 where there is none yet.
    """

    tab: str = TXT2IMG
    args: list[Any] = field(default_factory=lambda: [{}])
    prompt: str = ""
    negative_prompt: str = ""
    styles: list[str] = field(default_factory=list)
    units: list[dict[str, Any]] = field(default_factory=list)
    width: int = 512
    height: int = 512
    steps: int = 20
    denoising_strength: float = 0.75
    enable_hr: bool = False
    hr_scale: float = 2.0
    hr_resize_x: int = 0
    hr_resize_y: int = 0
    hr_second_pass_steps: int = 0
    hr_prompt: str = ""
    hr_negative_prompt: str = ""
    scale_by: float | None = None
    source_width: int = 0
    source_height: int = 0

    def prompts(self, hires: bool) -> Iterator[tuple[str, str]]:
        """Prompt and negative prompt, with the styles put in, of each pass that the base has a part in.

        Args:
            hires: whether it has one in the second pass of Hires. fix.
        """
        yield self._styled(self.prompt, self.negative_prompt)
        if hires and self.enable_hr:
            yield self._styled(self.hr_prompt or self.prompt, self.hr_negative_prompt or self.negative_prompt)

    def _styled(self, prompt: str, negative_prompt: str) -> tuple[str, str]:
        known = shared.prompt_styles
        return (
            known.apply_styles_to_prompt(prompt, self.styles),
            known.apply_negative_styles_to_prompt(negative_prompt, self.styles),
        )


@dataclass(frozen=True)
class Size:
    """In pixels; 0 by 0 where it is not known yet."""

    width: int
    height: int

    def __str__(self) -> str:
        return (
            f"{self.width}×{self.height}" if self.width and self.height else "size of a picture that is not there yet"
        )


@dataclass(frozen=True)
class Pass:
    """One sampling of one model, or of both together.

    Attributes:
        base, upgraded: the size that each model samples; None for a model that takes no part.
        steps: how many are taken, the last ones.
        of_steps: how many were asked for.
        start: what is sampled over, in words; "" for noise.
        strength: what decides from which step on, in words.
        hires: whether it is the second pass of Hires. fix.
    """

    base: Size | None
    upgraded: Size | None
    steps: int
    of_steps: int
    start: str = ""
    strength: str = ""
    hires: bool = False

    def describe(self, base_name: str) -> str:
        """In words, with the name of the base's family."""
        sizes = {base_name: self.base, FAMILY_NAMES["sdxl"]: self.upgraded}
        models = [f"{name} ({size})" for name, size in sizes.items() if size is not None]
        sample, together = ("sample", " together") if len(models) == 2 else ("samples", "")
        counted = "1 step" if self.of_steps == 1 else f"{self.of_steps} steps"
        steps = counted if self.steps == self.of_steps else f"the last {self.steps} of {counted}"
        start = f"over {self.start}" if self.start else "from noise"
        decided = f" ({self.strength})" if self.strength else ""
        sentence = f"{' and '.join(models)} {sample} {steps}{together} {start}{decided}."
        return f"Hires. fix: {sentence}" if self.hires else sentence


@dataclass(frozen=True)
class Forecast:
    """Everything that is known of a job before it runs.

    Attributes:
        passes: in their order.
        settings: X-Adapter's.
    """

    passes: tuple[Pass, ...]
    settings: Settings

    @classmethod
    def of(cls, asked: TabRequest, settings: Settings) -> Forecast:
        """Of what a tab asks for.

        Raises:
            WrongArgument: an argument does not go with the tab.
        """
        p = _processing(asked)
        check_tab(p, settings)
        return cls(tuple(_passes(p, settings)), settings)

    def describe(self, base_name: str, memory: str) -> str:
        """In one line.

        Args:
            base_name: of the base's family.
            memory: lockstep or recorded.
        """
        passes = " Then ".join(step.describe(base_name) for step in self.passes if not step.hires)
        hires = [step.describe(base_name) for step in self.passes if step.hires]
        chosen = f"{memory} ({AUTO})" if self.settings.memory == AUTO else memory
        return " ".join([passes, *hires, *self._acting(base_name), f"Memory: {chosen}."])

    def _acting(self, base_name: str) -> Iterator[str]:
        """When the adapter acts, where that is not always."""
        settings = self.settings
        if not any(step.base and step.upgraded for step in self.passes):
            return
        if (settings.guidance_start, settings.guidance_end) != (0, 1):
            yield f"The adapter acts from {settings.guidance_start:.0%} to {settings.guidance_end:.0%} of these steps."
        if settings.refresh_every > 1:
            yield f"{base_name} runs at one in {settings.refresh_every} of them."


def memory_mode(models: Models, asked: TabRequest, settings: Settings) -> str:
    """Lockstep or recorded, by what is free now.

    Raises:
        WrongArgument: there is no such checkpoint or adapter.
    """
    info = model_files.find_base_checkpoint(settings.base_checkpoint)
    path = model_files.find_adapter(settings.adapter) if settings.has_adapter else None
    work = largest_work(_processing(asked), settings, sum(bool(unit.get("enabled")) for unit in asked.units))
    return RECORDED if models.is_sequential(settings.memory, info, path, work) else LOCKSTEP


def _processing(asked: TabRequest) -> StableDiffusionProcessing:
    """What the WebUI would process, as far as sizes and steps depend on it; it is thrown away."""
    common = {"steps": asked.steps, "denoising_strength": asked.denoising_strength}
    if asked.tab == IMG2IMG:
        width, height = asked.width, asked.height
        if asked.scale_by is not None:
            width, height = int(asked.source_width * asked.scale_by), int(asked.source_height * asked.scale_by)
        return StableDiffusionProcessingImg2Img(width=width, height=height, **common)
    hires = {"hr_scale": asked.hr_scale, "hr_resize_x": asked.hr_resize_x, "hr_resize_y": asked.hr_resize_y}
    p = StableDiffusionProcessingTxt2Img(
        width=asked.width,
        height=asked.height,
        enable_hr=asked.enable_hr,
        hr_second_pass_steps=asked.hr_second_pass_steps,
        **hires,
        **common,
    )
    if p.enable_hr and p.width and p.height:
        p.calculate_target_resolution()
    return p


def _passes(p: StableDiffusionProcessing, settings: Settings) -> Iterator[Pass]:
    for sampling in samplings_of(p, settings):
        if sampling.start is Start.BASE:
            yield _stage_one(p, settings)
        yield _pass_of_sdxl(p, settings, sampling)
    if getattr(p, "enable_hr", False) and not settings.hires:
        yield _pass_of_sdxl(p, settings, hires_sampling(p))


def _stage_one(p: StableDiffusionProcessing, settings: Settings) -> Pass:
    base, steps, of_steps = _base_size(p, settings), stage_one_steps(p, settings), settings.base_steps or p.steps
    if isinstance(p, StableDiffusionProcessingImg2Img):
        return Pass(base, None, steps, of_steps, "the given picture", _denoising(p))
    return Pass(base, None, steps, of_steps, "the control image" if settings.base_start == CONTROL_IMAGE else "")


def _pass_of_sdxl(p: StableDiffusionProcessing, settings: Settings, sampling: Sampling) -> Pass:
    acts = settings.has_adapter and any(settings.weights) and (settings.hires or not sampling.is_hires)
    start, strength = _start(p, settings, sampling)
    return Pass(
        _base_size(p, settings, sampling.is_hires) if acts else None,
        Size(*hires_size(p)) if sampling.is_hires else Size(p.width, p.height),
        sampling.joint_steps(p),
        sampling.steps,
        start,
        strength,
        sampling.is_hires,
    )


def _start(p: StableDiffusionProcessing, settings: Settings, sampling: Sampling) -> tuple[str, str]:
    """What a sampling of SDXL starts from and what decides its steps, in words."""
    if sampling.is_hires:
        return "the upscaled picture", _denoising(p)
    return {
        Start.NOISE: ("", ""),
        Start.BASE: ("that picture", f"switch point {settings.switch_point:g}"),
        Start.PICTURE: ("the given picture", _denoising(p)),
    }[sampling.start]


def _denoising(p: StableDiffusionProcessing) -> str:
    return f"denoising strength {p.denoising_strength:g}"


def _base_size(p: StableDiffusionProcessing, settings: Settings, is_hires: bool = False) -> Size:
    if not p.width or not p.height:
        return Size(0, 0)
    return Size(*(base_hires_size(settings, p) if is_hires else base_size(settings, p.width, p.height)))
