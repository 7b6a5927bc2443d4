"""Every option of training once: type, range, default and what it does; the defaults are the paper's.

The command line, a file's metadata and what `--resume` compares are made from the fields of `Recipe`, which decides
what is learned, and of `Course`, which decides what goes on beside it. Source: paper, "Training" and its ablations.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import WrongArgument
from ..headless.annotator_names import CONTROLS
from ..settings import Argument, expectation

DECODER, ENCODER, BOTH = "decoder", "encoder", "both"
ADDITION, GUIDANCE, SPADE = "addition", "guidance", "spade"
FLOAT32, BFLOAT16, FLOAT16 = "float32", "bfloat16", "float16"
ADAMW, ADAMW_8BIT, MUON = "adamw", "adamw-8bit", "muon"
CONSTANT = "constant"
SCHEDULES = (CONSTANT, "linear", "cosine", "cosine_with_restarts", "polynomial")
"""Of diffusers.optimization; each with `warmup` steps before it."""
AUTOMATIC, NO_TRACKER, TENSORBOARD = "auto", "none", "tensorboard"


def option(default: Any, tooltip: str, **more: Any) -> Any:
    """A field with its row of the table.

    Args:
        tooltip: what it does, in plain words.
        more: as in `settings.Argument`: range and choices.
    """
    return field(default=default, metadata={"argument": Argument("", tooltip, "", **more)})


WHOLE: dict[str, Any] = {"minimum": 0}
COUNT: dict[str, Any] = {"minimum": 1}
FRACTION: dict[str, Any] = {"minimum": 0.0, "maximum": 1.0}
POSITIVE: dict[str, Any] = {"minimum": 0.0}


@dataclass(frozen=True)
class Recipe:
    """What is learned, and from what: the same recipe, models and pictures give the same weights."""

    size: int = option(1024, "Pixels of the upgraded model's pictures; the base's are half as large.", multiple_of=16)
    buckets: bool = option(False, "Crops in each picture's own aspect ratio, of as many pixels, instead of squares.")
    batch: int = option(8, "Pictures a step, of all processes together.", **COUNT)
    epochs: int = option(2, "How often each picture is seen.", **COUNT)
    steps: int = option(0, "Steps in all; 0: as many as the epochs have.", **WHOLE)
    learning_rate: float = option(1e-5, "Of the optimizer.", **POSITIVE)
    schedule: str = option(CONSTANT, "How the learning rate goes on after the warm-up.", choices=SCHEDULES)
    warmup: int = option(0, "Steps in which the learning rate rises from 0.", **WHOLE)
    optimizer: str = option(
        ADAMW,
        "adamw-8bit needs bitsandbytes. muon makes the changes of matrices orthogonal and leaves the rest to AdamW.",
        choices=(ADAMW, ADAMW_8BIT, MUON),
    )
    weight_decay: float = option(0.01, "Of the optimizer.", **POSITIVE)
    clip: float = option(0.0, "Largest norm of the gradients; 0: they are left as they are.", **POSITIVE)
    positions: str = option(DECODER, "Where features are read and residuals enter.", choices=(DECODER, ENCODER, BOTH))
    fusion: str = option(ADDITION, "How residuals enter.", choices=(ADDITION, GUIDANCE, SPADE))
    timestep: bool = option(False, "The mapping layers are told the timestep.")
    norm: bool = option(False, "GroupNorm in the mapping layers.")
    empty_prompts: float = option(1.0, "Share of pictures whose prompt is empty for the upgraded model.", **FRACTION)
    shared_noise: bool = option(False, "The base's noise is the upgraded model's, made smaller, instead of its own.")
    min_snr: float = option(0.0, "Gamma of Min-SNR weighting, usually 5; 0: every timestep counts alike.", **POSITIVE)
    controlled: float = option(
        0.0, "Share of pictures at which the base runs with --controlnet and the picture's own map.", **FRACTION
    )
    control: str = option("canny", "The map that --controlnet takes.", choices=CONTROLS)
    ema: float = option(0.0, "Decay of the moving average of the weights, usually 0.9999; 0: none.", **FRACTION)
    precision: str = option(
        BFLOAT16, "Type that is computed in; the trained weights stay float32.", choices=(FLOAT32, BFLOAT16, FLOAT16)
    )
    seed: int = option(0, "Of batches, noise, timesteps and first weights.", minimum=0, maximum=2**32 - 1)


@dataclass(frozen=True)
class Course:
    """What goes on beside learning; it may be another after `--resume`."""

    accumulation: int = option(1, "Parts in which a process computes its pictures of a step: less memory.", **COUNT)
    checkpointing: bool = option(False, "Gradient checkpointing: less memory, more time.")
    compile: bool = option(False, "torch.compile for the transformer blocks and the mapping layers.")
    save_every: int = option(500, "Steps from checkpoint to checkpoint.", **COUNT)
    keep: int = option(3, "Checkpoints that are kept, the last ones.", **COUNT)
    validate_every: int = option(500, "Steps from validation grid to validation grid.", **COUNT)
    validation_steps: int = option(20, "Sampling steps of their pictures.", minimum=1, maximum=150)
    tracker: str = option(
        AUTOMATIC,
        "Where figures go, by accelerate's names (tensorboard, wandb, …); auto: TensorBoard if installed; none.",
    )


def rows(table: type) -> dict[str, Argument]:
    """A table: field name → row."""
    return {item.name: item.metadata["argument"] for item in dataclasses.fields(table)}


def defaults(table: type) -> dict[str, Any]:
    """A table: field name → default."""
    return {item.name: item.default for item in dataclasses.fields(table)}


def flag(name: str) -> str:
    """The option of the command line that sets a field."""
    return f"--{name.replace('_', '-')}"


def read(table: type, given: Mapping[str, Any]) -> Any:
    """A `Recipe` or `Course` of some of its fields.

    Raises:
        WrongArgument: one sentence naming the option that is of the wrong type or out of range.
    """
    return table(**{name: checked(table, name, given[name]) for name in rows(table) if name in given})


def checked(table: type, name: str, value: Any) -> Any:
    """The value of a field in its own type.

    Raises:
        WrongArgument: it is of another type or out of range.
    """
    row, default = rows(table)[name], defaults(table)[name]
    if isinstance(default, (bool, str)):
        if type(value) is not type(default) or (row.choices and value not in row.choices):
            raise WrongArgument(f"{flag(name)} is {value!r}, expected {', '.join(row.choices) or 'true or false'}.")
        return value
    whole = isinstance(default, int)
    fits = isinstance(value, (int, float)) and math.isfinite(value) and (not whole or float(value).is_integer())
    fits = fits and (row.minimum is None or value >= row.minimum) and (row.maximum is None or value <= row.maximum)
    fits = fits and (row.multiple_of is None or (value > 0 and value % row.multiple_of == 0))
    if not fits:
        raise WrongArgument(f"{flag(name)} is {value!r}, expected {expectation(row, whole)}.")
    return int(value) if whole else float(value)


def written(recipe: Recipe) -> str:
    """As it stands in a file."""
    return json.dumps(dataclasses.asdict(recipe), sort_keys=True)


def check_same(earlier: Mapping[str, Any], recipe: Recipe, checkpoint: str) -> None:
    """Whether a training can go on by this recipe.

    Args:
        earlier: the fields of the recipe that it began by.
        checkpoint: the file that it goes on from.

    Raises:
        WrongArgument: naming the first option that is another.
    """
    # what an older version had no option for was as it is by default
    before = defaults(Recipe) | dict(earlier)
    for name, value in dataclasses.asdict(recipe).items():
        if before[name] != value:
            raise WrongArgument(
                f"{flag(name)} is {value!r}, but {checkpoint} was trained with {before[name]!r}: --resume goes on by "
                "the same recipe."
            )
