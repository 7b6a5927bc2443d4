"""On a GPU: the base beside SDXL's encoder gives, to the bit, what one after the other gives, and nothing waits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from lib_xadapter.evaluations import Evaluation
from lib_xadapter.feature_sources import BaseStep, Lockstep
from lib_xadapter.joint_stage import JointStage
from lib_xadapter.mapping_paths import EagerMapping
from lib_xadapter.overlap import Overlap, SideStream
from lib_xadapter.recording import Playback, record
from lib_xadapter.rows import batch_rows
from lib_xadapter.taps import read_features
from lib_xadapter.trajectory import Trajectory
from tests.cuda.mappings import released
from tests.small_unets import JointInputs, base_unet, call_base, call_upgraded, upgraded_unet

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no NVIDIA GPU here"),
]

ROWS = batch_rows([1])
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EVALUATIONS = [Evaluation(sigma, step, step / 4) for step, sigma in enumerate((9.0, 5.0, 2.0, 1.0))]
INPUTS = JointInputs("square")


class SmallModels:
    """A base and an upgraded UNet on the GPU, with mapping layers between them."""

    def __init__(self) -> None:
        self.base, self.upgraded = base_unet().to(DEVICE), upgraded_unet().to(DEVICE)
        self.mapping = EagerMapping(released(torch.float32).to(DEVICE))
        self.start = INPUTS.upgraded.to(DEVICE)

    @contextmanager
    def lockstep(self) -> Iterator[Lockstep]:
        with read_features(self.base) as reader:

            def evaluate(latent: Tensor, evaluation: Evaluation) -> BaseStep:
                noise = call_base(self.base, latent.expand(2, -1, -1, -1)).mean(0, keepdim=True)
                return BaseStep(reader.take(), ROWS, latent - evaluation.sigma * noise)

            yield Lockstep(evaluate, Trajectory(INPUTS.base[:1].to(DEVICE)))

    def sampled(self, source: object, overlap: Overlap | None = None) -> list[Tensor]:
        stage = JointStage(source, self.mapping, (1.0, 1.0, 1.0), overlap=overlap)
        outputs, latent = [], self.start
        for evaluation in EVALUATIONS:
            with stage.evaluate(evaluation, ROWS).fused_into(self.upgraded, slice(0, 2)):
                latent = latent - 0.1 * call_upgraded(self.upgraded, latent)
            outputs.append(latent)
        if overlap is not None:
            overlap.end()
        return outputs


@pytest.fixture(scope="module")
def models():
    with torch.no_grad():
        yield SmallModels()


def test_overlapped_and_serial_order_agree_to_the_bit(models):
    with models.lockstep() as source:
        serial = models.sampled(source)
    with models.lockstep() as source:
        overlapped = models.sampled(source, SideStream(torch.device("cuda", torch.cuda.current_device())))
    torch.cuda.synchronize()
    assert all(torch.equal(one, other) for one, other in zip(serial, overlapped, strict=True))


def test_a_recording_is_pinned_and_plays_back(models):
    with models.lockstep() as source:
        serial = models.sampled(source)
    with models.lockstep() as source:
        recording = record(source, EVALUATIONS)
    assert all(feature.is_pinned() for step in recording.steps for feature in step.found.features.levels)
    played = models.sampled(Playback(recording, "cuda"))
    assert max(float((one - other).norm() / other.norm()) for one, other in zip(played, serial, strict=True)) < 1e-3
