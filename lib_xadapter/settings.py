"""Every argument once: type, range, default, label, tooltip and infotext key.

The panel, the REST object, its schema, the infotext and the command line are all made from the fields of `Settings`.
"""

from __future__ import annotations

import dataclasses
import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .errors import WrongArgument

LEVELS = 3
"""Weights of residuals: coarse, middle and fine."""

BASE_NOISE_SEED = 0x2312_2238
"""Added to an image's seed for the base's noise in the joint stage, which must not be the upgraded model's."""


@dataclass(frozen=True)
class Argument:
    """What there is to know about one field of `Settings`, apart from its name and default.

    Attributes:
        label: the control's label.
        tooltip: what it does, in plain words.
        infotext: its key under a picture, after "X-Adapter "; "" for what changes nothing in a picture.
        minimum, maximum: the range of a number, both included; None where there is no limit.
        multiple_of: for sizes in pixels.
        or_zero: 0 is allowed beside the range and means "as the upgraded model".
        step: the control's step.
        reach: the slider's ends, where they are not the limits.
        choices: what a text can be, where it is one of a few.
        main: whether the control stands at the top of the panel and not folded away.
    """

    label: str
    tooltip: str
    infotext: str
    minimum: float | None = None
    maximum: float | None = None
    multiple_of: int | None = None
    or_zero: bool = False
    step: float | None = None
    reach: tuple[float, float] | None = None
    choices: tuple[str, ...] = ()
    main: bool = False


def argument(default: Any, label: str, infotext: str, tooltip: str, **more: Any) -> Any:
    """A field of `Settings` with its row of the table."""
    return field(default=default, metadata={"argument": Argument(label, tooltip, infotext, **more)})


FRACTION: dict[str, Any] = {"minimum": 0.0, "maximum": 1.0, "step": 0.01}
SIZE: dict[str, Any] = {"minimum": 64, "maximum": 2048, "multiple_of": 8, "or_zero": True, "step": 8}

NOISE, CONTROL_IMAGE = "noise", "control image"
"""What stage 1 starts from."""
PICTURE, BASE = "picture", "base"
"""What SDXL paints over in img2img."""
START_STRENGTH = 1.0
"""Denoising strength of the base over a control image. The released tile pipeline takes every step, from the first
timestep's noise, which leaves a little of the image (`pipeline_sd_xl_adapter_controlnet_img2img.py`,
`prepare_latents_sd1_5`)."""
AUTO, LOCKSTEP, RECORDED = "auto", "lockstep", "recorded"
"""How the base runs in the joint stage."""
SAME_SEED = -1
"""A base seed that means SDXL's own."""
SEEDS = 2**32
"""How many there are; after the last one comes 0."""


@dataclass(frozen=True)
class Settings:
    """What one picture is asked for."""

    enabled: bool = argument(
        True,
        "X-Adapter",
        "version",
        "Run an SD1.5 model with its plugins beside SDXL and let SDXL follow it.",
        main=True,
    )
    base_checkpoint: str = argument(
        "",
        "SD1.5 checkpoint",
        "base checkpoint",
        "The model that your SD1.5 LoRAs and embeddings were made for. It paints first and then guides SDXL.",
        main=True,
    )
    adapter: str = argument(
        "",
        "Adapter",
        "adapter",
        "The trained mapping layers from SD1.5 to SDXL. None: SDXL only repaints the SD1.5 picture.",
        main=True,
    )
    switch_point: float = argument(
        0.8,
        "Switch point",
        "switch point",
        "How much of the picture SDXL paints anew over the SD1.5 picture, as denoising strength does in img2img. "
        "Lower keeps more of the SD1.5 picture, 1 keeps little but what the adapter carries over.",
        main=True,
        **FRACTION,
    )
    weight: float | tuple[float, ...] = argument(
        1.0,
        "Weight",
        "weight",
        "How strongly SDXL follows the SD1.5 model while both run. 0: not at all.",
        minimum=-10.0,
        maximum=10.0,
        step=0.05,
        reach=(0.0, 2.0),
        main=True,
    )
    base_prompt: str = argument(
        "",
        "SD1.5 prompt",
        "base prompt",
        "Prompt of the SD1.5 model in the place of the one above: trigger words belong here. Empty: the same prompt.",
    )
    base_negative_prompt: str = argument(
        "",
        "SD1.5 negative prompt",
        "base negative prompt",
        "Negative prompt of the SD1.5 model. Empty: the same negative prompt.",
    )
    base_width: int = argument(
        0, "SD1.5 width", "base width", "Width of the SD1.5 picture in pixels. 0: half the width above.", **SIZE
    )
    base_height: int = argument(
        0, "SD1.5 height", "base height", "Height of the SD1.5 picture in pixels. 0: half the height above.", **SIZE
    )
    base_cfg_scale: float = argument(
        0.0,
        "SD1.5 CFG scale",
        "base CFG scale",
        "How closely the SD1.5 model follows its prompt. 0: the CFG scale above.",
        minimum=0.0,
        maximum=30.0,
        step=0.5,
    )
    base_steps: int = argument(
        0,
        "SD1.5 steps",
        "base steps",
        "Sampling steps of the SD1.5 picture. 0: the steps above.",
        minimum=0,
        maximum=150,
        step=1,
    )
    base_seed: int = argument(
        SAME_SEED,
        "SD1.5 seed",
        "base seed",
        "Seed of the SD1.5 model. -1: the seed above. With a seed of its own, SDXL can vary over one SD1.5 picture.",
        minimum=SAME_SEED,
        maximum=SEEDS - 1,
        step=1,
    )
    base_start: str = argument(
        NOISE,
        "SD1.5 starts from",
        "base start",
        "What the SD1.5 picture is painted over: noise, or the image of its first ControlNet unit, as the paper's "
        "tile pipeline does it.",
        choices=(NOISE, CONTROL_IMAGE),
    )
    img2img_start: str = argument(
        PICTURE,
        "In img2img SDXL paints over",
        "img2img start",
        "picture: the given picture, both models from the denoising strength on. base: what the SD1.5 model alone "
        "makes of it with that strength; SDXL goes on from there at the switch point.",
        choices=(PICTURE, BASE),
    )
    hires: bool = argument(
        True,
        "Also in Hires. fix",
        "hires",
        "Run the SD1.5 model beside SDXL in the second pass of Hires. fix, too.",
    )
    guidance_start: float = argument(
        0.0,
        "Adapter starts at",
        "guidance start",
        "Fraction of SDXL's steps after which it begins to follow the SD1.5 model.",
        **FRACTION,
    )
    guidance_end: float = argument(
        1.0,
        "Adapter ends at",
        "guidance end",
        "Fraction of SDXL's steps after which it no longer follows the SD1.5 model.",
        **FRACTION,
    )
    refresh_every: int = argument(
        1,
        "Refresh every … steps",
        "refresh every",
        "Run the SD1.5 model at every n-th step that both take, and use what it gave in between: faster, and coarser.",
        minimum=1,
        maximum=150,
        step=1,
        reach=(1, 10),
    )
    cond_only: bool = argument(
        False,
        "Map the prompt's half only",
        "cond only",
        "Map the SD1.5 features of the prompt alone and use them for the negative prompt, too: faster, less exact.",
    )
    uncond_weight: float = argument(
        1.0,
        "Share of the weight for the negative prompt",
        "uncond weight",
        "How much of the weight the negative prompt's half gets. Below 1, CFG amplifies what SDXL takes over from the "
        "SD1.5 model, as it amplifies what a prompt says.",
        **FRACTION,
    )
    memory: str = argument(
        AUTO,
        "Memory",
        "",
        "lockstep: both models stay on the GPU. recorded: the SD1.5 model runs first and leaves the GPU to SDXL; "
        "for the same picture with less video memory. auto: whichever fits.",
        choices=(AUTO, LOCKSTEP, RECORDED),
    )
    single_stage: bool = argument(
        False,
        "Single stage",
        "single stage",
        "No SD1.5 picture first: both models start from noise together. The switch point has no effect then.",
    )
    return_base_image: bool = argument(
        False, "Show the SD1.5 picture", "return base image", "Add the finished SD1.5 picture to the results."
    )

    @property
    def weights(self) -> tuple[float, ...]:
        """The weight of each level's residual."""
        return self.weight if isinstance(self.weight, tuple) else (self.weight,) * LEVELS

    @property
    def has_adapter(self) -> bool:
        """Whether an adapter acts at all: "None" asks for the SDEdit + SDXL baseline."""
        return self.adapter.lower() != "none"

    def of_image(self, seed: int, first: int) -> Settings:
        """Those that make an image of a job by itself: the base's own seed counts on as SDXL's do.

        Args:
            seed: SDXL's of the image.
            first: SDXL's of the job's first image.
        """
        if self.base_seed == SAME_SEED:
            return self
        return dataclasses.replace(self, base_seed=(self.base_seed + seed - first) % SEEDS)

    def base_seeds(self, seeds: Sequence[int], first: int) -> list[int]:
        """The base's seed for each image, from SDXL's seeds and that of the job's first image."""
        own = (self.of_image(seed, first).base_seed for seed in seeds)
        return [seed if base == SAME_SEED else base for seed, base in zip(seeds, own, strict=True)]


def half(size: int) -> int:
    """Half of a size in pixels, as a multiple of 8, at least 64: what a base size of 0 means."""
    return max(size // 16 * 8, 64)


def arguments() -> dict[str, Argument]:
    """The table: field name → row."""
    return {item.name: item.metadata["argument"] for item in dataclasses.fields(Settings)}


def defaults() -> dict[str, Any]:
    """The table: field name → default."""
    return {item.name: item.default for item in dataclasses.fields(Settings)}


def read_settings(given: Mapping[str, Any]) -> Settings:
    """Settings from an object of arguments, all of them optional.

    Raises:
        WrongArgument: one sentence naming the argument that is unknown, of the wrong type or out of range.
    """
    known = defaults()
    for name in given:
        if name not in known:
            raise WrongArgument(f"{shown(name)} is no argument of X-Adapter; there are {', '.join(known)}.")
    settings = Settings(**{name: checked(name, value) for name, value in given.items()})
    if settings.guidance_start > settings.guidance_end:
        raise WrongArgument(
            f"'guidance_start' is {settings.guidance_start:g}, after 'guidance_end' at {settings.guidance_end:g}."
        )
    if settings.single_stage and settings.base_start != NOISE:
        raise WrongArgument(f"'base_start' is '{settings.base_start}', but a single stage starts from noise.")
    return settings


def checked(name: str, value: Any) -> Any:
    """The value of an argument in its own type.

    Raises:
        WrongArgument: it is of another type or out of range.
    """
    default, row = defaults()[name], arguments()[name]
    if name == "weight" and isinstance(value, (list, tuple)):
        return _checked_weights(value)
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise WrongArgument(f"'{name}' is {shown(value)}, expected true or false.")
        return value
    if isinstance(default, str):
        if not isinstance(value, str):
            raise WrongArgument(f"'{name}' is {shown(value)}, expected text.")
        if row.choices and value not in row.choices:
            raise WrongArgument(f"'{name}' is {shown(value)}, expected one of {', '.join(row.choices)}.")
        if not _can_be_written(value):
            raise WrongArgument(f"'{name}' holds a character that no text can have: NUL, or half of a pair.")
        return value
    return _checked_number(name, value, row, whole=isinstance(default, int))


def _checked_weights(value: list | tuple) -> tuple[float, ...]:
    if len(value) != LEVELS or not all(_is_number(item) for item in value):
        raise WrongArgument(f"'weight' is {shown(list(value))}, expected a number or a list of {LEVELS} numbers.")
    return tuple(float(_checked_number("weight", item, arguments()["weight"], whole=False)) for item in value)


def _checked_number(name: str, value: Any, row: Argument, whole: bool) -> float | int:
    fits = _is_number(value) and (not whole or float(value).is_integer())
    if fits and not (row.or_zero and value == 0):
        fits = (
            (row.minimum is None or value >= row.minimum)
            and (row.maximum is None or value <= row.maximum)
            and (row.multiple_of is None or value % row.multiple_of == 0)
        )
    if not fits:
        raise WrongArgument(f"'{name}' is {shown(value)}, expected {expectation(row, whole)}.")
    return int(value) if whole else float(value)


def _is_number(value: Any) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _can_be_written(text: str) -> bool:
    """Whether a picture's text can hold it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in text


SHORT = reprlib.Repr()
SHORT.maxlevel, SHORT.maxstring, SHORT.maxother = 2, 100, 100


def shown(value: Any) -> str:
    """What was given, for a message: not all of it, where it is long or deep."""
    try:
        return SHORT.repr(value)
    except ValueError:
        return "a number of very many digits"


def expectation(row: Argument, whole: bool) -> str:
    """What a number can be, in words."""
    kind = "a whole number" if whole else "a number"
    if row.multiple_of:
        kind = f"a multiple of {row.multiple_of}"
    shown = str if whole else "{:g}".format
    lowest = "" if row.minimum is None else f" from {shown(row.minimum)}"
    highest = "" if row.maximum is None else f" to {shown(row.maximum)}"
    return f"{'0 or ' if row.or_zero else ''}{kind}{lowest}{highest}"


def json_schema() -> dict[str, Any]:
    """JSON schema of the REST object."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "X-Adapter",
        "type": "object",
        "additionalProperties": False,
        "properties": {name: _property(name, row) for name, row in arguments().items()},
    }


def _property(name: str, row: Argument) -> dict[str, Any]:
    default = defaults()[name]
    described = {"title": row.label, "description": row.tooltip, "default": default}
    if name == "weight":
        number = {"type": "number", "minimum": row.minimum, "maximum": row.maximum}
        three = {"type": "array", "items": number, "minItems": LEVELS, "maxItems": LEVELS}
        return {**described, "anyOf": [number, three]}
    kinds = {bool: "boolean", int: "integer", float: "number", str: "string"}
    if row.choices:
        return {**described, "enum": list(row.choices)}
    text = r"^[^\u0000]*$" if isinstance(default, str) else None
    limits = {"minimum": row.minimum, "maximum": row.maximum, "multipleOf": row.multiple_of, "pattern": text}
    span = {key: value for key, value in limits.items() if value is not None}
    if row.or_zero:
        span = {"anyOf": [{"const": 0}, span]}
    return {**described, "type": kinds[type(default)], **span}
