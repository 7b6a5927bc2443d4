"""Lets the ControlNet extension read ControlNets of the miniature world, whose widths it would not guess.

An extension for tests only: the ControlNet extension takes the widths of SD1.5 for granted.
"""

import sys
from typing import Any

from modules import script_callbacks

WIDTHS = {"model_channels": 96, "channel_mult": [1, 1, 1, 1], "num_heads": 4}


def take_those_of_the_miniature_world(*_: Any) -> None:
    sys.modules["scripts.controlnet_model_guess"].controlnet_default_config.update(WIDTHS)


script_callbacks.on_app_started(take_those_of_the_miniature_world)
