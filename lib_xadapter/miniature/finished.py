"""The finished models, as they come with the package. Nothing heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent / "weights"


@dataclass(frozen=True)
class MiniatureModels:
    """Where each of them lies; laid out as a WebUI's `models/` folder, with what measures them beside.

    Attributes:
        folder: of all.
    """

    folder: Path = FOLDER

    @property
    def base(self) -> Path:
        return self.folder / "Stable-diffusion" / "miniature-base"

    @property
    def upgraded(self) -> Path:
        return self.folder / "Stable-diffusion" / "miniature-upgraded"

    @property
    def adapter(self) -> Path:
        return self.folder / "X-Adapter" / "miniature.safetensors"

    @property
    def tokenizer(self) -> Path:
        return self.folder / "tokenizer"

    @property
    def clip(self) -> Path:
        return self.folder / "measures" / "clip"

    @property
    def depth_estimator(self) -> Path:
        return self.folder / "measures" / "depth"

    @property
    def judge(self) -> Path:
        return self.folder / "measures" / "judge.safetensors"

    def controlnet(self, name: str) -> Path:
        """ "edges" or "depth" of the base, "upgraded-edges" of the upgraded model."""
        return self.folder / "ControlNet" / f"miniature-{name}"

    def lora(self, name: str) -> Path:
        """ "palette", "lines" or "pattern" of the base, "upgraded-palette" of the upgraded model."""
        return self.folder / "Lora" / f"miniature-{name}.safetensors"
