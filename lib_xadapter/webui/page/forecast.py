"""What a job will do, told before it runs: its samplings, with sizes and steps, by the rules that the job follows.

Nothing is loaded or changed for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from modules.processing import StableDiffusionProcessingTxt2Img, opt_f

from ...families import FAMILY_NAMES
from ...settings import AUTO, CONTROL_IMAGE, LOCKSTEP, PICTURE, RECORDED, START_STRENGTH, Settings, half
from .. import model_files
from ..sampling.steps import Steps, steps_over_picture

if TYPE_CHECKING:
    from ..base.models import Models

TXT2IMG, IMG2IMG = "txt2img", "img2img"
NOT_TICKED = "X-Adapter is not ticked: the picture is the WebUI's own."

BASE_PICTURE = "that picture"
GIVEN_PICTURE = "the given picture"
UPSCALED_PICTURE = "the upscaled picture"
THE_CONTROL_IMAGE = "the control image"


@dataclass(frozen=True)
class Asked:
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
    scale_by: float | None = None
    source_width: int = 0
    source_height: int = 0


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
class Sampling:
    """One sampling of one model, or of both together.

    Attributes:
        base, upgraded: the size that each model samples; None for a model that takes no part.
        steps: how many are taken.
        start: the picture that is sampled over, in words; "" for noise.
        strength: what decides from which step on, in words.
        hires: whether it is the second pass of Hires. fix.
    """

    base: Size | None
    upgraded: Size | None
    steps: Steps
    start: str = ""
    strength: str = ""
    hires: bool = False

    def told(self, base_name: str) -> str:
        """In words, with the name of the base's family."""
        sizes = {base_name: self.base, FAMILY_NAMES["sdxl"]: self.upgraded}
        models = [f"{name} ({size})" for name, size in sizes.items() if size is not None]
        together = " together" if len(models) == 2 else ""
        verb = "sample" if together else "samples"
        start = f"over {self.start}" if self.start else "from noise"
        decided = f" ({self.strength})" if self.strength else ""
        text = f"{' and '.join(models)} {verb} {self.steps}{together} {start}{decided}."
        return f"Hires. fix: {text}" if self.hires else text


@dataclass(frozen=True)
class Forecast:
    """Everything that is known of a job before it runs.

    Attributes:
        samplings: in their order.
        settings: X-Adapter's.
    """

    samplings: tuple[Sampling, ...]
    settings: Settings

    @classmethod
    def of(cls, asked: Asked, settings: Settings) -> Forecast:
        """Of what a tab asks for."""
        samplings = _in_img2img(asked, settings) if asked.tab == IMG2IMG else _in_txt2img(asked, settings)
        return cls(tuple(samplings), settings)

    def told(self, base_name: str, memory: str) -> str:
        """In one line.

        Args:
            base_name: of the base's family.
            memory: lockstep or recorded.
        """
        passes = " Then ".join(sampling.told(base_name) for sampling in self.samplings if not sampling.hires)
        hires = [sampling.told(base_name) for sampling in self.samplings if sampling.hires]
        chosen = f"{memory} ({AUTO})" if self.settings.memory == AUTO else memory
        return " ".join([passes, *hires, *self._acting(base_name), f"Memory: {chosen}."])

    def _acting(self, base_name: str) -> Iterator[str]:
        """When the adapter acts, where that is not always."""
        settings = self.settings
        if not any(sampling.base and sampling.upgraded for sampling in self.samplings):
            return
        if (settings.guidance_start, settings.guidance_end) != (0, 1):
            yield f"The adapter acts from {settings.guidance_start:.0%} to {settings.guidance_end:.0%} of these steps."
        if settings.refresh_every > 1:
            yield f"{base_name} runs at one in {settings.refresh_every} of them."


def memory_mode(models: Models, settings: Settings) -> str:
    """Lockstep or recorded, by what is free now.

    Raises:
        WrongArgument: there is no such checkpoint or adapter.
    """
    info = model_files.find_base_checkpoint(settings.base_checkpoint)
    path = model_files.find_adapter(settings.adapter) if settings.has_adapter else None
    return RECORDED if models.is_sequential(settings.memory, info, path) else LOCKSTEP


def _in_txt2img(asked: Asked, settings: Settings) -> Iterator[Sampling]:
    first, hires = _sizes(asked)
    base = _base_size(settings, first)
    beside = base if _couples(settings) else None
    if settings.single_stage:
        yield Sampling(beside, first, Steps(asked.steps, asked.steps))
    else:
        yield _stage_one(asked, settings, base)
        yield _from_the_switch_on(asked, settings, beside, first)
    if hires is not None:
        steps = steps_over_picture(asked.hr_second_pass_steps or asked.steps, asked.denoising_strength, all_taken=True)
        beside = _base_size(Settings(), hires) if settings.hires and _couples(settings) else None
        yield Sampling(beside, hires, steps, UPSCALED_PICTURE, _denoising(asked), hires=True)


def _in_img2img(asked: Asked, settings: Settings) -> Iterator[Sampling]:
    target = Size(asked.width, asked.height)
    if asked.scale_by is not None:
        target = Size(int(asked.source_width * asked.scale_by), int(asked.source_height * asked.scale_by))
    base = _base_size(settings, target)
    beside = base if _couples(settings) else None
    if settings.img2img_start == PICTURE:
        steps = steps_over_picture(asked.steps, asked.denoising_strength)
        yield Sampling(beside, target, steps, GIVEN_PICTURE, _denoising(asked))
        return
    steps = steps_over_picture(settings.base_steps or asked.steps, asked.denoising_strength)
    yield Sampling(base, None, steps, GIVEN_PICTURE, _denoising(asked))
    yield _from_the_switch_on(asked, settings, beside, target)


def _stage_one(asked: Asked, settings: Settings, size: Size) -> Sampling:
    steps = settings.base_steps or asked.steps
    if settings.base_start == CONTROL_IMAGE:
        return Sampling(size, None, steps_over_picture(steps, START_STRENGTH), THE_CONTROL_IMAGE)
    return Sampling(size, None, Steps(steps, steps))


def _from_the_switch_on(asked: Asked, settings: Settings, beside: Size | None, size: Size) -> Sampling:
    steps = steps_over_picture(asked.steps, settings.switch_point)
    return Sampling(beside, size, steps, BASE_PICTURE, f"switch point {settings.switch_point:g}")


def _denoising(asked: Asked) -> str:
    return f"denoising strength {asked.denoising_strength:g}"


def _couples(settings: Settings) -> bool:
    """Whether the base runs beside SDXL at all."""
    return settings.has_adapter and any(settings.weights)


def _base_size(settings: Settings, target: Size) -> Size:
    if not target.width or not target.height:
        return target
    return Size(settings.base_width or half(target.width), settings.base_height or half(target.height))


def _sizes(asked: Asked) -> tuple[Size, Size | None]:
    """Of the first pass, and of Hires. fix's second, by the WebUI's own rule."""
    if not asked.enable_hr or not asked.width or not asked.height:
        return Size(asked.width, asked.height), None
    # as the WebUI's page itself asks for it
    p = StableDiffusionProcessingTxt2Img(
        width=asked.width,
        height=asked.height,
        enable_hr=True,
        hr_scale=asked.hr_scale,
        hr_resize_x=asked.hr_resize_x,
        hr_resize_y=asked.hr_resize_y,
    )
    p.calculate_target_resolution()
    latent_width, latent_height = p.hr_upscale_to_x // opt_f, p.hr_upscale_to_y // opt_f
    cut = Size((latent_width - p.truncate_x) * opt_f, (latent_height - p.truncate_y) * opt_f)
    return Size(p.width, p.height), cut
