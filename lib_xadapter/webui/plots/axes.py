"""Axes of the WebUI's X/Y/Z plot, one for each argument of the table.

Source: `scripts/xyz_grid.py` of the WebUI. It reads ranges such as `0-1 (+0.2)` for axes whose type is int or float,
and offers a list for those with choices.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from modules import scripts
from modules.processing import StableDiffusionProcessing

from ...errors import WrongArgument, XAdapterError
from ...settings import Argument, arguments, checked, defaults
from .. import model_files
from ..job.refusal import Refusal
from .cells import set_arguments

PLOT = "xyz_grid.py"
PREFIX = "[X-Adapter] "
LEVELS_AXIS = PREFIX + "Weight of each level"
NO_ADAPTER = "None"
DECIMALS = 8
"""To which the plot rounds its labels: a range's numbers are sums."""

COSTS = {"base_checkpoint": 1.0, "adapter": 0.5}
"""How slow an argument is to change: the plot's outer loop takes the slowest. The WebUI's own checkpoint axis has 1."""
BASE_COST = 0.3
"""Of the base's other arguments: everything that follows in the inner loop finds what the base made."""


def add_axes() -> None:
    """Add the axes to the plot; called before the page is built, and again when it is reloaded."""
    plot = xyz_plot()
    if plot is not None and not any(option.label.startswith(PREFIX) for option in plot.axis_options):
        plot.axis_options += axes(plot)


def xyz_plot() -> ModuleType | None:
    """The plot's module, None where there is none."""
    return next((data.module for data in scripts.scripts_data if Path(data.path).name == PLOT), None)


def axes(plot: ModuleType) -> list[Any]:
    """An `AxisOption` for each argument, in the order of the table."""
    made = [_axis(plot, name, row) for name, row in arguments().items()]
    levels = plot.AxisOption(
        LEVELS_AXIS, _refusing(read_weights), _setter("weight"), format_value=_levels_label, confirm=_check("weight")
    )
    return [*made, levels]


def read_weights(text: str) -> float | tuple[float, ...]:
    """One weight, or one for each level, from coarse to fine: `1,0.5,0` or `1 0.5 0`.

    Raises:
        WrongArgument: it is neither.
    """
    try:
        numbers = tuple(float(part) for part in re.split(r"[\s,]+", text.strip()))
    except ValueError as error:
        raise WrongArgument(f"'weight' is '{text}', expected a number, or one for each level as in 1,0.5,0.") from error
    return checked("weight", numbers if len(numbers) > 1 else numbers[0])


def _axis(plot: ModuleType, name: str, row: Argument) -> Any:
    default, label = defaults()[name], PREFIX + ("Enabled" if name == "enabled" else row.label)
    more: dict[str, Any] = {"confirm": _check(name), "cost": COSTS.get(name, BASE_COST * name.startswith("base_"))}
    if name == "base_checkpoint":
        more.update(
            confirm=_check_each(model_files.find_base_checkpoint),
            choices=lambda: list(model_files.base_checkpoints()),
            format_value=plot.format_remove_path,
        )
    elif name == "adapter":
        more.update(confirm=_check_each(_check_adapter), choices=lambda: [*model_files.adapters(), NO_ADAPTER])
    elif isinstance(default, bool):
        return plot.AxisOption(label, _refusing(_true_or_false), _setter(name), choices=plot.boolean_choice(), **more)
    elif row.choices:
        more["choices"] = lambda: list(row.choices)
    return plot.AxisOption(label, type(default), _setter(name), **more)


def _setter(name: str) -> Callable[[StableDiffusionProcessing, Any, Sequence[Any]], None]:
    def apply(p: StableDiffusionProcessing, value: Any, _: Sequence[Any]) -> None:
        set_arguments(p, **{name: round(value, DECIMALS) if isinstance(value, float) else value})

    return apply


def _check(name: str) -> Callable[[StableDiffusionProcessing, Sequence[Any]], None]:
    return _check_each(lambda value: checked(name, round(value, DECIMALS) if isinstance(value, float) else value))


def _check_each(check: Callable[[Any], Any]) -> Callable[[StableDiffusionProcessing, Sequence[Any]], None]:
    """Before the first cell is made, as the plot would leave a cell that fails blank."""

    def confirm(_: StableDiffusionProcessing, values: Sequence[Any]) -> None:
        for value in values:
            _refusing(check)(value)

    return confirm


def _refusing(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def call(value: Any) -> Any:
        try:
            return read(value)
        except XAdapterError as problem:
            raise Refusal(problem) from problem

    return call


def _check_adapter(name: str) -> None:
    if name.lower() != NO_ADAPTER.lower():
        model_files.find_adapter(name)


def _true_or_false(text: str) -> bool:
    if text.strip().lower() not in ("true", "false"):
        raise WrongArgument(f"'{text}' is neither true nor false.")
    return text.strip().lower() == "true"


def _levels_label(_: StableDiffusionProcessing, option: Any, value: float | tuple[float, ...]) -> str:
    weights = value if isinstance(value, tuple) else (value,)
    return f"{option.label}: {', '.join(f'{weight:g}' for weight in weights)}"
