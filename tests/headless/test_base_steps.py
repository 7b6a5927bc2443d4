"""Where the base stands in its own steps in the joint stage, and the windows of its ControlNets."""

from __future__ import annotations

import pytest

from lib_xadapter.evaluations import Evaluation
from lib_xadapter.headless.base_steps import BaseSteps

LEVELS = (14.0, 7.0, 3.0, 1.0, 0.3)
JOINT = [Evaluation(sigma, step, step / 3) for step, sigma in enumerate((3.0, 1.0, 0.3))]
STAGE_ONE = BaseSteps(len(LEVELS), LEVELS)
NO_STAGE_ONE = BaseSteps(3)


def acting(window: tuple[float, float], calls: int) -> list[bool]:
    """In which of so many steps a ControlNet acts, by the rule of diffusers' own loop."""
    start, end = window
    return [not (place / calls < start or (place + 1) / calls > end) for place in range(calls)]


def windows(steps: BaseSteps, **given) -> tuple:
    found = steps.windowed(given, JOINT)
    return found["control_guidance_start"], found["control_guidance_end"]


def test_a_place_is_that_of_the_nearest_level_of_stage_1():
    assert [STAGE_ONE.place(evaluation) for evaluation in JOINT] == [2, 3, 4]
    assert STAGE_ONE.place(Evaluation(2.9, 0, 0.0)) == 2
    assert STAGE_ONE.place(Evaluation(20.0, 0, 0.0)) == 0


def test_without_a_stage_1_it_is_as_far_as_the_joint_stage_has_come():
    assert [NO_STAGE_ONE.place(evaluation) for evaluation in JOINT] == [0, 1, 2]
    assert [BaseSteps(6).place(evaluation) for evaluation in JOINT] == [0, 2, 4]


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (0.0, 1.0, [True, True, True]),
        (0.0, 0.8, [True, True, False]),
        (0.5, 1.0, [False, True, True]),
        (0.6, 0.8, [False, True, False]),
        (0.0, 0.4, [False, False, False]),
    ],
)
def test_a_window_is_the_same_noise_levels_as_in_stage_1(start, end, expected):
    window = windows(STAGE_ONE, control_guidance_start=start, control_guidance_end=end)
    assert acting(window, len(JOINT)) == expected
    assert 0 <= window[0] < window[1] <= 1
    in_stage_1 = acting((start, end), len(LEVELS))
    assert expected == in_stage_1[2:]


def test_a_window_without_a_stage_1_counts_the_joint_stage():
    window = windows(NO_STAGE_ONE, control_guidance_end=0.5)
    assert acting(window, len(JOINT)) == acting((0.0, 0.5), 3) == [True, False, False]


def test_each_of_several_controlnets_has_its_own():
    starts, ends = windows(STAGE_ONE, control_guidance_start=[0.0, 0.5], control_guidance_end=1.0)
    assert [acting(window, 3) for window in zip(starts, ends, strict=True)] == [[True] * 3, [False, True, True]]


def test_other_arguments_stay_and_none_is_added():
    assert STAGE_ONE.windowed({"prompt": "a cat"}, JOINT) == {"prompt": "a cat"}
    assert STAGE_ONE.windowed({"prompt": "a cat", "control_guidance_end": 0.8}, JOINT)["prompt"] == "a cat"
