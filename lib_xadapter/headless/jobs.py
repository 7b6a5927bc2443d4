"""What the command line asks for, checked before anything is loaded, and the pictures that come of it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import WrongArgument
from ..settings import CONTROL_IMAGE, SAME_SEED, Settings, half
from .composed import SMALLEST_GUIDANCE, XAdapterPipeline
from .infotexts import ControlUnit, PictureText
from .models import Models
from .pictures import to_tensor
from .pipeline import LATENT_PIXEL, WEBUI_RULES, Noise, NoisePerImage, Progress, Request, Rules, no_progress
from .prompts import base_prompts, upgraded_prompts

SMALLEST, LARGEST = 64, 4096
MOST_STEPS = 150
LARGEST_CFG = 30.0
LARGEST_BATCH = 64
LARGEST_SEED = 2**32 - 1


@dataclass(frozen=True)
class Job:
    """Every picture of one command.

    Attributes:
        prompt, negative_prompt: of SDXL, and of the base where `settings` names none.
        settings: as in the WebUI; the sweeps take the place of its switch point and weight.
        width, height: of the finished pictures.
        steps, cfg_scale, sampler, seed: as in the WebUI; image k of the batch has seed + k.
        batch: images at once.
        switch_points, weights: values that are tried, each with each.
        control_images: one for each ControlNet.
        control_scales: values that are tried for each ControlNet.
        model, loras, control_names: for the text under the pictures.
    """

    prompt: str = ""
    negative_prompt: str = ""
    settings: Settings = dataclasses.field(default_factory=Settings)
    width: int = 1024
    height: int = 1024
    steps: int = 20
    cfg_scale: float = 7.0
    sampler: str = "DPM++ 2M"
    seed: int = 0
    batch: int = 1
    switch_points: tuple[float, ...] = (0.8,)
    weights: tuple[float | tuple[float, ...], ...] = (1.0,)
    control_images: tuple[Image.Image, ...] = ()
    control_scales: tuple[tuple[float, ...], ...] = ()
    model: str = ""
    loras: tuple[tuple[str, float], ...] = ()
    control_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._check_whole("steps", self.steps, 1, MOST_STEPS)
        self._check_whole("batch", self.batch, 1, LARGEST_BATCH)
        self._check_whole("seed", self.seed, 0, LARGEST_SEED - self.batch + 1)
        self._check_size("width", self.width)
        self._check_size("height", self.height)
        if not 1 <= self.cfg_scale <= LARGEST_CFG:
            raise WrongArgument(f"'cfg' is {self.cfg_scale:g}, expected a number from 1 to {LARGEST_CFG:g}.")
        if self.settings.base_start == CONTROL_IMAGE and not self.control_images:
            raise WrongArgument(f"'base_start' is '{CONTROL_IMAGE}', but there is no --control-image to start from.")

    @staticmethod
    def _check_whole(name: str, value: int, minimum: int, maximum: int) -> None:
        if not minimum <= value <= maximum:
            raise WrongArgument(f"'{name}' is {value}, expected a whole number from {minimum} to {maximum}.")

    @staticmethod
    def _check_size(name: str, value: int) -> None:
        if value % LATENT_PIXEL or not SMALLEST <= value <= LARGEST:
            raise WrongArgument(
                f"'{name}' is {value}, expected a multiple of {LATENT_PIXEL} from {SMALLEST} to {LARGEST}."
            )

    @property
    def size(self) -> tuple[int, int]:
        return self.width, self.height

    @property
    def base_size(self) -> tuple[int, int]:
        """Width and height of the base's picture."""
        return self.settings.base_width or half(self.width), self.settings.base_height or half(self.height)

    @property
    def base_start(self) -> Image.Image | None:
        """What the base paints over, at its size; None for noise."""
        if self.settings.base_start != CONTROL_IMAGE:
            return None
        return self.control_images[0].convert("RGB").resize(self.base_size, Image.Resampling.LANCZOS)

    @property
    def seeds(self) -> range:
        return range(self.seed, self.seed + self.batch)

    @property
    def base_seeds(self) -> range:
        """The base's own seeds, where `settings` gives it one, else the same."""
        own = self.settings.base_seed
        return self.seeds if own == SAME_SEED else range(own, own + self.batch)

    @property
    def pictures(self) -> int:
        """How many there will be."""
        tried = len(list(itertools.product(*self.control_scales)))
        return tried * len(self.switch_points) * len(self.weights) * self.batch


@dataclass(frozen=True)
class Picture:
    """A finished picture.

    Attributes:
        image: the picture.
        base_image: the base's picture that it was made from, None for a single stage.
        settings, control_scales, seed: what it was made with.
        text: settings in the WebUI's infotext form.
    """

    image: Image.Image
    base_image: Image.Image | None
    settings: Settings
    control_scales: tuple[float, ...]
    seed: int
    text: str


def make_pictures(
    models: Models, job: Job, rules: Rules = WEBUI_RULES, progress: Progress = no_progress
) -> Iterator[Picture]:
    """The pictures of a job, each as soon as it is finished; the base's are made once for all that share them."""
    pipeline = XAdapterPipeline(
        models.base, models.upgraded, models.adapter, rules=rules, placement=models.placement, progress=progress
    )
    for scales in itertools.product(*job.control_scales):
        first = request_of(models, job, job.settings, scales)
        side, base_images = None, [None] * job.batch
        for switch_point, weight in itertools.product(job.switch_points, job.weights):
            settings = dataclasses.replace(job.settings, switch_point=switch_point, weight=weight)
            # noise generators move on, so that every picture gets a request of its own
            request = dataclasses.replace(first, settings=settings, noise=NoisePerImage(_noises(job)))
            made = pipeline.run(request, side, return_base_images=side is None)
            side, base_images = made.base_side, made.base_images or base_images
            for image, base_image, seed in zip(made.images, base_images, job.seeds, strict=True):
                yield Picture(image, base_image, settings, scales, seed, _text(job, settings, scales, seed))


def request_of(models: Models, job: Job, settings: Settings, scales: Sequence[float] = ()) -> Request:
    """What the pipeline is asked for: prompts encoded, maps sized, noise drawn."""
    base_cfg_scale = settings.base_cfg_scale or job.cfg_scale
    guided = job.cfg_scale != 1
    base = base_prompts(
        models,
        settings.base_prompt or job.prompt,
        settings.base_negative_prompt or job.negative_prompt,
        job.batch,
        # SDXL's unconds need unconds of the base to follow
        guided or base_cfg_scale != 1,
    )
    upgraded = upgraded_prompts(models, job.prompt, job.negative_prompt, job.batch, guided, job.size)
    base_guidance = max(base_cfg_scale, SMALLEST_GUIDANCE) if base.uncond is not None else 1.0
    return Request(
        base={
            **base.arguments(),
            **_control_arguments(job, scales),
            "guidance_scale": base_guidance,
            **_sized(job.base_size),
        },
        upgraded={**upgraded.arguments(), "guidance_scale": job.cfg_scale, **_sized(job.size)},
        settings=settings,
        steps=job.steps,
        noise=NoisePerImage(_noises(job)),
        images=job.batch,
        size=job.size,
        base_size=job.base_size,
        sampler=job.sampler,
        start=job.base_start,
    )


def _control_arguments(job: Job, scales: Sequence[float]) -> dict[str, Any]:
    maps = [to_tensor(image.convert("RGB").resize(job.base_size)) for image in job.control_images]
    if not maps:
        return {}
    if len(maps) == 1:
        return {"image": maps[0], "controlnet_conditioning_scale": scales[0]}
    return {"image": maps, "controlnet_conditioning_scale": list(scales)}


def _sized(size: tuple[int, int]) -> dict[str, int]:
    return {"width": size[0], "height": size[1]}


def _noises(job: Job) -> list[Noise]:
    base, upgraded = ((height // LATENT_PIXEL, width // LATENT_PIXEL) for width, height in (job.base_size, job.size))
    return [Noise.seeded(*seeds, base, upgraded) for seeds in zip(job.seeds, job.base_seeds, strict=True)]


def _text(job: Job, settings: Settings, scales: Sequence[float], seed: int) -> str:
    units = tuple(ControlUnit(name, scale) for name, scale in zip(job.control_names, scales, strict=True))
    return PictureText(
        job.prompt,
        job.negative_prompt,
        job.steps,
        job.sampler,
        job.cfg_scale,
        seed,
        job.size,
        job.model,
        settings,
        job.loras,
        units,
    ).written()


def open_picture(path: Path, option: str) -> Image.Image:
    """A picture of the user's.

    Raises:
        WrongArgument: it is missing or no picture.
    """
    if not path.is_file():
        raise WrongArgument(f"{option}: there is no file {path}.")
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise WrongArgument(f"{option}: {path.name} is no picture that can be read ({error}).") from error
