"""Trainings in processes of their own: several together, killed ones, and ones that lose another."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from lib_xadapter.training.checkpoints import Checkpoints, read_checkpoint

from .test_runs import farthest, same, weights_of

STEPS = 200

DIE = """
import os, signal
from lib_xadapter.training.engine import Training
inner = Training._compute
def computed(training, part, rows, sums):
    if part.step == {step} and os.environ.get("RANK", "0") == "{rank}":
        {end}
    inner(training, part, rows, sums)
Training._compute = computed
"""
KILLED = "os.kill(os.getpid(), signal.SIGKILL)"


@pytest.fixture(scope="module")
def alone(tiny, pictures, tmp_path_factory) -> Path:
    """A training of 200 steps by one process."""
    from .conftest import TrainCommand

    train = TrainCommand(tiny, pictures, tmp_path_factory.mktemp("alone") / "out")
    assert train(steps=STEPS, save_every=50) == 0
    return train.out


def test_two_processes_learn_what_one_does(train, alone):
    status, output = train.run(processes=2, steps=STEPS, save_every=100)
    assert status == 0, output
    assert farthest(weights_of(train.out), weights_of(alone)) <= 1e-6
    ours, theirs = (read_checkpoint(Checkpoints(out / "checkpoints", 3).last) for out in (train.out, alone))
    for name, moment in theirs.tensors["optimizer"].items():
        torch.testing.assert_close(ours.tensors["optimizer"][name], moment, rtol=1e-3, atol=1e-6)


def test_what_was_killed_goes_on_to_the_bit(train, alone):
    step = random.Random().randrange(1, STEPS)
    code = DIE.format(step=step, rank=0, end=KILLED)
    status, output = train.run(code=code, steps=STEPS, save_every=7)
    assert status == -9, output
    assert train("--resume", steps=STEPS, save_every=50) == 0
    assert same(weights_of(train.out), weights_of(alone)), f"killed in step {step}"


def test_a_lost_process_is_told_in_one_sentence_and_nothing_is_lost(train):
    code = DIE.format(step=3, rank=1, end=KILLED)
    status, output = train.run(processes=2, code=code)
    assert status != 0
    (said,) = [line for line in output.splitlines() if line.startswith("xadapter train: ")]
    assert "Another process of this training is gone" in said and "go on from step-00000002.safetensors" in said
    assert train("--resume") == 0


def test_where_one_of_two_fails_both_end_and_it_is_said(train):
    code = DIE.format(step=3, rank=1, end="rows.upgraded_mean.fill_(float('nan'))")
    status, output = train.run(processes=2, code=code)
    assert status != 0
    said = [line for line in output.splitlines() if line.startswith("xadapter train: ")]
    assert said and all("The loss of step 4 is nan" in line for line in said)


def test_bad_input_is_told_once_by_several_processes(train, tmp_path):
    status, output = train.run(processes=2, data=tmp_path / "nowhere")
    assert status != 0
    assert len([line for line in output.splitlines() if line.startswith("xadapter train: --data")]) == 1
