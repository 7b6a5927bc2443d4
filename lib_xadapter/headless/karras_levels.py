"""The noise levels of Karras et al. (arXiv 2206.00364), as the WebUI's DPM2 takes them."""

from __future__ import annotations

from typing import Any

import numpy
from numpy.typing import NDArray


def without_lowest(kind: type) -> type:
    """A scheduler class of diffusers whose last step goes from the lowest level but one to none.

    Source: `modules/sd_samplers_kdiffusion.py`, `discard_next_to_last_sigma`.
    """

    class WithoutLowest(kind):
        def _convert_to_karras(self, in_sigmas: Any, num_inference_steps: int) -> NDArray[numpy.float64]:
            return super()._convert_to_karras(in_sigmas, num_inference_steps + 1)[:-1]

    return WithoutLowest
