"""On a GPU: the base beside SDXL's encoder gives, to the bit, what one after the other gives, and nothing waits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from lib_xadapter.evaluations import Evaluation
from lib_xadapter.feature_sources import BaseStep, FeatureSource, Lockstep, OncePerLevel
from lib_xadapter.joint_stage import Coupling, JointStage
from lib_xadapter.mapping_paths import EagerMapping, MappingPath
from lib_xadapter.overlap import SideStream
from lib_xadapter.recording import Playback, record
from lib_xadapter.rows import batch_rows
from lib_xadapter.taps import read_features
from lib_xadapter.trajectory import Trajectory
from tests.cuda.mappings import released
from tests.cuda.unets import base_unet, upgraded_unet

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no NVIDIA GPU here"),
]

ROWS = batch_rows([1])
EVALUATIONS = [Evaluation(sigma, step, step / 4) for step, sigma in enumerate((9.0, 5.0, 2.0, 1.0))]
LATE = 20_000_000
"""Cycles of the GPU, some 10 ms."""


class LateSideStream(SideStream):
    """A side stream whose work comes late, so that a wait for it that is missing shows."""

    @contextmanager
    def on_side_stream(self) -> Iterator[None]:
        with super().on_side_stream():
            torch.cuda._sleep(LATE)
            yield


class NobodyWaits(LateSideStream):
    """What the late one must differ from."""

    def wait_for(self, event: torch.cuda.Event, tensor: Tensor) -> None:
        tensor.record_stream(torch.cuda.current_stream())


class SmallModels:
    """A base and an upgraded UNet on the GPU, with mapping layers between them."""

    def __init__(self) -> None:
        device = torch.device("cuda", torch.cuda.current_device())
        self.device = device
        self.base, self.upgraded = base_unet(device, torch.float32), upgraded_unet(device, torch.float32)
        self.mapping: MappingPath = EagerMapping(released(torch.float32).to(device))
        generator = torch.Generator().manual_seed(1)
        self.noise = torch.randn(1, 4, 16, 16, generator=generator).to(device)
        self.start = torch.randn(1, 4, 32, 32, generator=generator).to(device)

    @contextmanager
    def lockstep(self, scale: float = 1.0) -> Iterator[FeatureSource]:
        with read_features(self.base) as reader:

            def evaluate(latent: Tensor, evaluation: Evaluation) -> BaseStep:
                noise = self.base(latent.expand(2, -1, -1, -1), 100 * evaluation.sigma).mean(0, keepdim=True)
                return BaseStep(reader.take(), ROWS, latent - evaluation.sigma * noise)

            yield OncePerLevel(Lockstep(evaluate, Trajectory(scale * self.noise)))

    def sampled(self, source: FeatureSource, overlap: SideStream | None = None) -> list[Tensor]:
        stage = JointStage(source, Coupling(self.mapping, (1.0, 1.0, 1.0)), overlap)
        outputs, latent = [], self.start
        for evaluation in EVALUATIONS:
            with stage.evaluate(evaluation, ROWS).fused_into(self.upgraded, slice(0, 2)):
                rows = self.upgraded(latent.expand(2, -1, -1, -1), 100 * evaluation.sigma)
                latent = latent - 0.1 * rows.mean(0, keepdim=True)
            outputs.append(latent)
        if overlap is not None:
            overlap.end()
        return outputs

    def in_lockstep(self, overlap: SideStream | None = None, scale: float = 1.0) -> list[Tensor]:
        with self.lockstep(scale) as source:
            outputs = self.sampled(source, overlap)
        torch.cuda.synchronize()
        return outputs


@pytest.fixture(scope="module")
def models():
    with torch.no_grad():
        models = SmallModels()
        # what cuDNN and cuBLAS prepare at their first call
        models.in_lockstep()
        yield models


def same(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


@pytest.mark.parametrize("kind", [SideStream, LateSideStream])
def test_overlapped_and_serial_order_agree_to_the_bit(kind, models):
    serial = models.in_lockstep()
    assert same(serial, models.in_lockstep(kind(models.device)))


def test_a_wait_that_is_missing_shows(models):
    overlap = NobodyWaits(models.device)
    # leaves other numbers in the side stream's memory
    models.in_lockstep(overlap, scale=2.0)
    assert not same(models.in_lockstep(), models.in_lockstep(overlap))


def test_nothing_waits_in_an_overlapped_step(models):
    overlap = SideStream(models.device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with models.lockstep() as source:
            models.sampled(source, overlap)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_recording_plays_back_what_lockstep_gives(models):
    serial = models.in_lockstep()
    with models.lockstep() as source:
        recording = record(source, EVALUATIONS)
    assert not any(feature.is_pinned() for step in recording.steps for feature in step.row_features.features.levels)
    assert same(serial, models.sampled(OncePerLevel(Playback(recording, models.device))))
