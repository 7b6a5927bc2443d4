"""The samplings of SDXL in one job, told from the request alone: from where each starts, and with how many steps."""

from __future__ import annotations

import copy
import enum
from dataclasses import dataclass

from modules import sd_samplers, sd_samplers_common
from modules.processing import StableDiffusionProcessing, StableDiffusionProcessingImg2Img

from ...errors import WrongArgument
from ...settings import BASE, NOISE, Settings


class Start(enum.Enum):
    """What both models start from."""

    NOISE = "noise"
    """A single stage."""
    BASE = "the base's own picture"
    """Two stages: the base paints first, and SDXL goes on from the switch point."""
    PICTURE = "a given picture"
    """The picture plays the part of stage 1's, the denoising strength that of the switch point."""


@dataclass(frozen=True)
class Sampling:
    """One sampling of SDXL.

    Attributes:
        start: what it starts from.
        sampler_name: the WebUI's name of its sampler.
        denoising_strength: how much is painted anew over a picture; None from noise.
        steps: as the user set them.
        is_hires: the second pass of Hires. fix, which takes all of its steps at any strength.
    """

    start: Start
    sampler_name: str
    denoising_strength: float | None
    steps: int
    is_hires: bool = False

    @property
    def fixed_steps(self) -> int | None:
        """What the WebUI hands to its sampler for steps that the strength does not shorten."""
        return self.steps if self.is_hires else None

    def is_over_picture(self, p: StableDiffusionProcessing) -> bool:
        """Whether the WebUI calls its sampler for a picture to paint over."""
        return self.is_hires or isinstance(p, StableDiffusionProcessingImg2Img)

    def joint_steps(self, p: StableDiffusionProcessing) -> int:
        """How many steps SDXL takes, by the WebUI's rules."""
        if self.start is Start.NOISE:
            return self.steps
        return steps_over_picture(p, self.denoising_strength, self.steps, self.is_hires)

    def evaluations(self, p: StableDiffusionProcessing) -> int:
        """How many evaluations of SDXL the WebUI counts for that."""
        return total_steps(self.sampler_name, self.joint_steps(p))


def total_steps(sampler_name: str, steps: int) -> int:
    """How many model evaluations the WebUI counts for so many steps of a sampler."""
    return sd_samplers.find_sampler_config(sampler_name).total_steps(steps)


def steps_over_picture(p: StableDiffusionProcessing, strength: float, steps: int, is_hires: bool = False) -> int:
    """How many of its steps a sampler takes over a picture, by the WebUI's rule."""
    asked = copy.copy(p)
    asked.denoising_strength, asked.steps = strength, steps
    _, last = sd_samplers_common.setup_img2img_steps(asked, steps if is_hires else None)
    return last + 1


def check_tab(p: StableDiffusionProcessing, settings: Settings) -> None:
    """Whether the arguments go with the tab.

    Raises:
        WrongArgument: one does not.
    """
    if not isinstance(p, StableDiffusionProcessingImg2Img):
        return
    if settings.base_start != NOISE:
        raise WrongArgument(
            f"'base_start' is '{settings.base_start}', but in img2img the base starts from the given picture."
        )
    if settings.single_stage and settings.img2img_start == BASE:
        raise WrongArgument("'img2img_start' is 'base', but a single stage has no picture of the base.")


def stage_one_steps(p: StableDiffusionProcessing, settings: Settings) -> int:
    """How many steps the base takes for its own picture."""
    steps = settings.base_steps or p.steps
    if not isinstance(p, StableDiffusionProcessingImg2Img):
        return steps
    return steps_over_picture(p, p.denoising_strength, steps)


def first_sampling(p: StableDiffusionProcessing, settings: Settings) -> Sampling:
    """The sampling of img2img, or txt2img's first."""
    if isinstance(p, StableDiffusionProcessingImg2Img) and settings.img2img_start != BASE:
        return Sampling(Start.PICTURE, p.sampler_name, p.denoising_strength, p.steps)
    if settings.single_stage:
        return Sampling(Start.NOISE, p.sampler_name, None, p.steps)
    return Sampling(Start.BASE, p.sampler_name, settings.switch_point, p.steps)


def samplings_of(p: StableDiffusionProcessing, settings: Settings) -> tuple[Sampling, ...]:
    """All samplings in which the base takes part, in their order."""
    has_hires = getattr(p, "enable_hr", False)
    first = () if has_hires and p.firstpass_image is not None else (first_sampling(p, settings),)
    return (*first, hires_sampling(p)) if has_hires and settings.hires else first


def hires_sampling(p: StableDiffusionProcessing) -> Sampling:
    """The second pass of Hires. fix."""
    name, steps = p.hr_sampler_name or p.sampler_name, p.hr_second_pass_steps or p.steps
    return Sampling(Start.PICTURE, name, p.denoising_strength, steps, is_hires=True)
