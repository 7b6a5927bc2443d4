"""How many steps a sampler of the WebUI takes over a picture."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

from modules import sd_samplers_common


@dataclass(frozen=True)
class Steps:
    """Of a sampling.

    Attributes:
        taken: how many are taken, the last ones.
        schedule: of how many.
    """

    taken: int
    schedule: int

    def __str__(self) -> str:
        counted = "1 step" if self.schedule == 1 else f"{self.schedule} steps"
        return counted if self.taken == self.schedule else f"the last {self.taken} of {counted}"


def steps_over_picture(steps: int, strength: float, all_taken: bool = False) -> Steps:
    """By the img2img tab's rule, its option "do exactly the amount of steps" included.

    Args:
        steps: as asked for.
        strength: denoising strength, or switch point.
        all_taken: as in the second pass of Hires. fix, which takes them all.
    """
    asked = SimpleNamespace(steps=steps, denoising_strength=strength)
    schedule, last = sd_samplers_common.setup_img2img_steps(asked, steps if all_taken else None)
    return Steps(last + 1, max(schedule, last + 1))
