"""The settings of the official scripts for each kind of plugin.

Source: released code, `bash_scripts/` and README; 50 steps, CFG 7.5, DPM++ 2M, 1024 px over 512 px.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """Switch point and weight for one kind of plugin, and a word on what else it wants."""

    name: str
    switch_point: float
    weight: float
    advice: str


PRESETS = (
    Preset("LoRA", 0.95, 1.5, "Trigger words belong into the SD1.5 prompt."),
    Preset("Depth", 0.8, 1.0, "ControlNet weight 1.0."),
    Preset("Canny", 1.0, 1.2, "ControlNet weight 1.5 to 2.0."),
    Preset("Tile", 0.7, 1.2, "ControlNet weight 1.0; SD1.5 starts from the control image."),
)
