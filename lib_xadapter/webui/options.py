"""The extension's page in the WebUI's Settings."""

from __future__ import annotations

from typing import Literal

import gradio as gr
from modules import shared

from ..mapping_choice import MAPPING_CHOICES, MappingChoice

SECTION = ("xadapter", "X-Adapter")
KEEP_ON_GPU = "Keep on the GPU"
KEEP_IN_RAM = "Keep in RAM"
UNLOAD = "Unload after each job"

Keeping = Literal["Keep on the GPU", "Keep in RAM", "Unload after each job"]


def add_options() -> None:
    """Add the page; called by the WebUI when it builds its settings."""
    options = {
        "xadapter_adapter_folder": shared.OptionInfo("", "Folder with further adapter files").info(
            "besides models/X-Adapter and the extension's own models folder"
        ),
        "xadapter_keep_models": shared.OptionInfo(
            KEEP_ON_GPU,
            "SD1.5 model and adapter between jobs",
            gr.Radio,
            {"choices": [KEEP_ON_GPU, KEEP_IN_RAM, UNLOAD]},
        ).info("on the GPU they start at once; the others free video memory for whatever else runs"),
        "xadapter_mapping": shared.OptionInfo(
            MAPPING_CHOICES[0], "Mapping layers run by", gr.Radio, {"choices": list(MAPPING_CHOICES)}
        ).info(
            "eager: torch's kernels; cuda: kernels for NVIDIA cards from the 20 series and V100 on; auto: whichever can"
        ),
        "xadapter_recordings": shared.OptionInfo(
            2.0,
            "Memory for recordings of the SD1.5 model, in GB of RAM",
            gr.Slider,
            {"minimum": 0.0, "maximum": 64.0, "step": 0.5},
        ).info("kept with 'Memory: recorded' for when only SDXL's side changes; 50 steps at 1024 px take about 1.1 GB"),
    }
    for key, option in options.items():
        option.section = SECTION
        shared.opts.add_option(key, option)


def adapter_folder() -> str:
    """The folder with further adapter files that the user named, or ""."""
    return shared.opts.data.get("xadapter_adapter_folder", "").strip()


def keeping() -> Keeping:
    """What happens to the base and the adapter after a job."""
    return shared.opts.data.get("xadapter_keep_models", KEEP_ON_GPU)


def recordings_capacity() -> int:
    """Bytes that recordings of the base may fill between jobs."""
    return int(shared.opts.data.get("xadapter_recordings", 2.0) * 2**30)


def mapping_choice() -> MappingChoice:
    """How the mapping layers run."""
    return shared.opts.data.get("xadapter_mapping", MAPPING_CHOICES[0])
