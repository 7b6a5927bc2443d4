"""The families of models: how people call them, and the widths of their text encoders' outputs."""

from __future__ import annotations

from collections.abc import Mapping

FAMILY_NAMES: Mapping[str, str] = {
    "sd1": "SD1.5",
    "sd2": "SD2",
    "sd2-unclip": "SD2.1-unCLIP",
    "sdxl": "SDXL",
    "sdxl-refiner": "SDXL refiner",
}

BASE_FAMILIES = ("sd1", "sd2")
"""Those that can be the base."""

FAMILY_OF_CONTEXT_WIDTH: Mapping[int, str] = {768: "sd1", 1024: "sd2", 2048: "sdxl"}
"""Of cross-attention's keys and values; SDXL's are those of both its text encoders, side by side."""

FAMILY_OF_EMBEDDING_WIDTH: Mapping[int, str] = {768: "sd1", 1024: "sd2"}
"""Of a textual inversion's vectors; SDXL's have vectors for each of its two text encoders."""
