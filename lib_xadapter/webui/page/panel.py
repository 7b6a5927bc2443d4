"""The accordion in txt2img and img2img: one control for each argument of the table, in its order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr
from modules import sd_models
from modules.infotext_utils import PasteField
from modules.ui_common import create_refresh_button
from modules.ui_components import InputAccordion

from ...errors import XAdapterError
from ...families import BASE_FAMILIES, FAMILY_NAMES
from ...infotext import read_infotext, written_names
from ...presets import PRESETS
from ...settings import LEVELS, Argument, arguments, defaults
from .. import model_files

ElemId = Callable[[str], str]
NO_ADAPTER = "None"
ONLY_IN_IMG2IMG, ONLY_IN_TXT2IMG = ("img2img_start",), ("base_start", "single_stage", "hires")
"""Arguments that mean something in one tab alone; in the other their control is hidden, and nothing sets it."""


@dataclass(frozen=True)
class Panel:
    """What the WebUI wants of a script's controls.

    Attributes:
        controls: in the order of the positional arguments.
        paste_fields: how pasting an infotext sets each of them.
        sent_fields: those that "Send to img2img" copies from tab to tab, by what pasting makes of them.
    """

    controls: list[gr.components.Component]
    paste_fields: list[PasteField]
    sent_fields: list[Pasted]


@dataclass(frozen=True)
class Pasted:
    """The value of a control as a parsed infotext has it, None where it says nothing.

    Equal ones in two tabs are copied from one to the other.

    Attributes:
        name: of the argument.
        level: of the weight, where the control is that of one level.
    """

    name: str
    level: int | None = None

    def __call__(self, parameters: Mapping[str, Any]) -> Any:
        read = read_infotext(parameters)
        if self.name == "enabled":
            return read is not None
        if read is None:
            return None
        value = read[self.name]
        if self.name == "base_checkpoint":
            return _title(value)
        if self.level is not None:
            return value[self.level] if isinstance(value, tuple) else 1.0
        return 1.0 if isinstance(value, tuple) else value


def build(elem_id: ElemId, is_img2img: bool) -> Panel:
    """Make the accordion. The API calls this again for the defaults, so it changes nothing outside."""
    table = arguments()
    made: dict[str, gr.components.Component] = {}
    hidden = ONLY_IN_TXT2IMG if is_img2img else ONLY_IN_IMG2IMG

    def add(*names: str) -> None:
        made.update({name: _control(name, table[name], elem_id(name), name not in hidden) for name in names})

    with InputAccordion(False, label=table["enabled"].label, elem_id=elem_id("enabled")) as enabled:
        made["enabled"] = enabled
        with gr.Row():
            made["base_checkpoint"] = _base_checkpoint(table["base_checkpoint"], elem_id)
            made["adapter"] = _adapter(table["adapter"], elem_id)
        with gr.Row(visible=is_img2img):
            add("img2img_start")
        with gr.Row():
            add("switch_point", "weight")
        gr.HTML(_lines(elem_id, [*table, *(f"weight_{level}" for level in range(LEVELS))]))
        _presets(made["switch_point"], made["weight"], elem_id)
        with gr.Accordion("More settings", open=False, elem_id=elem_id("more")):
            add("base_prompt", "base_negative_prompt")
            with gr.Row():
                add("base_width", "base_height")
            with gr.Row():
                add("base_steps", "base_cfg_scale")
            with gr.Row():
                add("base_seed", "base_start")
            with gr.Row():
                add("guidance_start", "guidance_end")
            with gr.Row():
                levels = [_level_weight(level, elem_id) for level in range(LEVELS)]
            with gr.Row():
                add("refresh_every", "memory")
            with gr.Row():
                add("uncond_weight")
            with gr.Row():
                add("cond_only", "return_base_image")
            with gr.Row():
                add("single_stage", "hires")
    pasted = {Pasted(name): made[name] for name in ("enabled", *written_names()) if name not in hidden}
    pasted |= {Pasted("weight", level): control for level, control in enumerate(levels)}
    sent = [field for field in pasted if field.name not in (*ONLY_IN_IMG2IMG, *ONLY_IN_TXT2IMG)]
    pasting = [PasteField(control, field) for field, control in pasted.items()]
    return Panel([*(made[name] for name in table), *levels], pasting, sent)


def _lines(elem_id: ElemId, names: Sequence[str]) -> str:
    """Where xadapter.js writes what the server tells before a run.

    With the ids of the controls that it reads for that, and the names of families that labels can have.
    """
    controls = " ".join(elem_id(name) for name in names)
    families = "|".join(FAMILY_NAMES[family] for family in BASE_FAMILIES)
    return (
        f"<p id='{elem_id('forecast')}' class='xadapter-line' aria-live='polite' data-controls='{controls}' "
        f"data-families='{families}'></p><p id='{elem_id('plugins')}' class='xadapter-line' aria-live='polite'></p>"
    )


def read_controls(values: Sequence[Any]) -> dict[str, Any]:
    """Arguments from what the WebUI hands to a script: the controls' values, or a REST object in front of them.

    The fields of a REST object win over what an infotext set; a shorter list leaves the rest at its defaults.
    """
    names = list(defaults())
    given = dict(zip(names, values[: len(names)], strict=False))
    levels = [value for value in values[len(names) : len(names) + LEVELS] if value is not None]
    if isinstance(given.get("weight"), (int, float)) and len(levels) == LEVELS and any(level != 1 for level in levels):
        given["weight"] = [given["weight"] * level for level in levels]
    given = {name: value for name, value in given.items() if value is not None}
    first = given.pop("enabled", None)
    return {**given, **first} if isinstance(first, Mapping) else {**given, "enabled": first}


def _control(name: str, row: Argument, elem_id: str, visible: bool) -> gr.components.Component:
    default = defaults()[name]
    common = {"label": row.label, "elem_id": elem_id, "tooltip": row.tooltip, "visible": visible}
    if isinstance(default, bool):
        return gr.Checkbox(value=default, **common)
    if row.choices:
        return gr.Radio(value=default, choices=list(row.choices), **common)
    if isinstance(default, str):
        return gr.Textbox(value=default, lines=2, placeholder=row.tooltip, **common)
    if name == "base_seed":
        return gr.Number(value=default, precision=0, **common)
    low, high = row.reach or (0 if row.or_zero else row.minimum, row.maximum)
    return gr.Slider(value=default, minimum=low, maximum=high, step=row.step, **common)


def _level_weight(level: int, elem_id: ElemId) -> gr.Slider:
    place = ("coarse", "middle", "fine")[level]
    return gr.Slider(
        value=1.0,
        minimum=0.0,
        maximum=2.0,
        step=0.05,
        label=f"Weight of the {place} level",
        elem_id=elem_id(f"weight_{level}"),
        tooltip=f"Multiplies the weight for the {place} features: layout is coarse, texture is fine.",
    )


def _base_checkpoint(row: Argument, elem_id: ElemId) -> gr.Dropdown:
    def choices() -> list[str]:
        return list(model_files.base_checkpoints())

    return _dropdown(row, choices, sd_models.list_models, elem_id, "base_checkpoint")


def _adapter(row: Argument, elem_id: ElemId) -> gr.Dropdown:
    def choices() -> list[str]:
        return [*model_files.adapters(), NO_ADAPTER]

    return _dropdown(row, choices, lambda: None, elem_id, "adapter")


def _dropdown(
    row: Argument, choices: Callable[[], list[str]], refresh: Callable[[], None], elem_id: ElemId, name: str
) -> gr.Dropdown:
    found = choices()
    dropdown = gr.Dropdown(
        label=row.label,
        choices=found,
        value=found[0] if found and found[0] != NO_ADAPTER else "",
        elem_id=elem_id(name),
        tooltip=row.tooltip,
    )
    # what lies in the folders changes; a name kept in ui-config.json would outlive its file
    dropdown.do_not_save_to_config = True
    create_refresh_button(dropdown, refresh, lambda: {"choices": choices()}, elem_id(f"{name}_refresh"))
    return dropdown


def _title(name: str) -> str:
    """As the list of checkpoints has it; the name itself where there is none of that name."""
    try:
        return model_files.find_base_checkpoint(name).title
    except XAdapterError:
        return name


def _presets(switch_point: gr.Slider, weight: gr.Slider, elem_id: ElemId) -> None:
    """The paper's settings for each kind of plugin; choosing one moves the two sliders."""
    presets = {preset.name: preset for preset in PRESETS}
    with gr.Row():
        choice = gr.Dropdown(
            label="Settings of the paper for",
            choices=list(presets),
            value=None,
            elem_id=elem_id("preset"),
            tooltip="Sets the switch point and the weight to what the paper's authors used for this kind of plugin.",
        )
        choice.do_not_save_to_config = True
        advice = gr.HTML("", elem_id=elem_id("preset_advice"))

    def chosen(name: str) -> tuple[float, float, str]:
        preset = presets[name]
        return preset.switch_point, preset.weight, preset.advice

    choice.input(chosen, inputs=[choice], outputs=[switch_point, weight, advice], show_progress=False)
