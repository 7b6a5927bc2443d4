"""What the command line asks for, as data, checked before anything heavy is imported."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ..errors import WrongArgument
from ..settings import CONTROL_IMAGE, NOISE, PICTURE, Settings, half
from .annotator_names import Annotator

LATENT_PIXEL = 8
SMALLEST, LARGEST = 64, 4096
MOST_STEPS = 150
LARGEST_CFG = 30.0
LARGEST_BATCH = 64
MOST_CLIP_SKIP = 12
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
        annotators: what makes the map of each; None where it is one.
        control_maps: the maps that were made; () where the images are them.
        control_scales: values that are tried for each ControlNet.
        upgraded_maps, upgraded_map_scales: for each ControlNet of the upgraded model itself.
        init_image: a picture to paint over; None where the base paints one.
        mask: white where the picture is painted anew; None for everywhere.
        strength: of painting over it.
        clip_skip: of SD1.5's text encoder, as in the WebUI; 1 for none.
        model, loras, control_names: for the text under the pictures; a LoRA's name and what is said behind it.
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
    annotators: tuple[Annotator | None, ...] = ()
    control_maps: tuple[Image.Image, ...] = ()
    control_scales: tuple[tuple[float, ...], ...] = ()
    upgraded_maps: tuple[Image.Image, ...] = ()
    upgraded_map_scales: tuple[float, ...] = ()
    init_image: Image.Image | None = None
    mask: Image.Image | None = None
    strength: float = 0.75
    clip_skip: int = 1
    model: str = ""
    loras: tuple[tuple[str, float | str], ...] = ()
    control_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._check_whole("steps", self.steps, 1, MOST_STEPS)
        self._check_whole("clip_skip", self.clip_skip, 1, MOST_CLIP_SKIP)
        self._check_whole("batch", self.batch, 1, LARGEST_BATCH)
        self._check_whole("seed", self.seed, 0, LARGEST_SEED - self.batch + 1)
        self._check_size("width", self.width)
        self._check_size("height", self.height)
        if not 1 <= self.cfg_scale <= LARGEST_CFG:
            raise WrongArgument(f"'cfg' is {self.cfg_scale:g}, expected a number from 1 to {LARGEST_CFG:g}.")
        if not 0 < self.strength <= 1:
            raise WrongArgument(f"'strength' is {self.strength:g}, expected a number above 0, up to 1.")
        if self.mask is not None and self.init_image is None:
            raise WrongArgument("'mask' is given, but there is no --init-image that it belongs to.")
        if self.init_image is None and self.settings.img2img_start != PICTURE:
            raise WrongArgument(f"'img2img_start' is '{self.settings.img2img_start}', but there is no --init-image.")
        if self.init_image is not None and self.settings.base_start != NOISE:
            raise WrongArgument(
                f"'base_start' is '{self.settings.base_start}', but over an --init-image the base starts from that."
            )
        if self.settings.base_start == CONTROL_IMAGE and not self.control_images:
            raise WrongArgument(f"'base_start' is '{CONTROL_IMAGE}', but there is no --control-image to start from.")
        if self.init_image is not None and self.settings.single_stage:
            raise WrongArgument("--init-image is given, but a single stage starts from noise.")

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
    def base_seeds(self) -> Sequence[int]:
        """The base's own seeds, where `settings` gives it one, else the same."""
        return self.settings.base_seeds(self.seeds, self.seed)

    @property
    def pictures(self) -> int:
        """How many there will be."""
        tried = len(list(itertools.product(*self.control_scales)))
        return tried * len(self.switch_points) * len(self.weights) * self.batch


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
