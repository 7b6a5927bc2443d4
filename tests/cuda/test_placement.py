"""Whole joint steps as they are on a GPU, where there is none: everything is on it, and nothing waits for it.

Fake tensors have a device, a type and a size, and no numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lib_xadapter.cuda_mapping import CudaMapping
from lib_xadapter.evaluations import Evaluation
from lib_xadapter.feature_sources import BaseStep, FeatureSource, Lockstep, OncePerLevel
from lib_xadapter.joint_stage import Coupling, JointStage
from lib_xadapter.mapping_choice import CheckedMapping
from lib_xadapter.mapping_paths import EagerMapping
from lib_xadapter.pinned_transfer import CudaQueue
from lib_xadapter.recording import Playback, Recording, record
from lib_xadapter.rows import Row, batch_rows
from lib_xadapter.taps import read_features
from lib_xadapter.trajectory import Trajectory
from tests.cuda.mappings import finish_by_torch, released
from tests.cuda.unets import base_unet, upgraded_unet
from tests.cuda.waits import Waits

GPU = torch.device("cuda", 0)
ROWS = batch_rows([1, 1])
EVALUATIONS = [Evaluation(sigma, step, step / 4) for step, sigma in enumerate((9.0, 5.0, 5.0))]
HALF = torch.float16

Call = Callable[[Tensor, float], Tensor]
"""(latent, timestep) → the UNet's guided output."""


@pytest.fixture
def gpu(monkeypatch):
    """A context in which tensors are fake; events, which fake work has none of, are left out."""
    monkeypatch.setattr(CudaQueue, "event", lambda queue: None)

    @contextmanager
    def entered() -> Iterator[Waits]:
        with FakeTensorMode(), torch.no_grad(), Waits() as waits:
            yield waits

    return entered


def on_the_gpu(module: nn.Module) -> nn.Module:
    """A module's weights on the GPU, laid out as they are."""

    def there(tensor: Tensor) -> Tensor:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=GPU)

    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(there(parameter), requires_grad=False)
        for name, buffer in part._buffers.items():
            part._buffers[name] = there(buffer)
    return module


def cuda_path(adapter) -> CheckedMapping:
    """As on a GPU, its shapes already checked: fake tensors have nothing to compare."""
    path = CheckedMapping([CudaMapping(adapter, finish_by_torch)], EagerMapping(adapter))
    path._agrees = lambda result, eagerly: True
    return path


PATHS = {"eager": EagerMapping, "cuda": cuda_path}


class ToyHost:
    """Two UNets of nothing but torch, each guided by a mean over its rows."""

    rows: Sequence[Row] = ROWS

    def __init__(self) -> None:
        self.base, self.upgraded = base_unet("cpu", HALF), upgraded_unet("cpu", HALF)

    def call_base(self, latent: Tensor, timestep: float) -> Tensor:
        return self.base(latent.repeat(2, 1, 1, 1).to(HALF), timestep).float().chunk(2)[0]

    def call_upgraded(self, latent: Tensor, timestep: float) -> Tensor:
        return self.upgraded(latent.repeat(2, 1, 1, 1).to(HALF), timestep).float().chunk(2)[0]


class DiffusersHost:
    """The headless host's UNets, at a tenth of their width."""

    rows: Sequence[Row] = ROWS

    def __init__(self) -> None:
        pytest.importorskip("diffusers", reason="needs the extra 'headless'")
        from tests.guided_unets import GuidedUnet, Prompts
        from tests.small_unets import base_unet, upgraded_unet

        self.base, self.upgraded = base_unet().to(HALF), upgraded_unet().to(HALF)
        self._make = lambda unet, *prompts: GuidedUnet(unet, Prompts(*prompts), 7.0)

    def call_base(self, latent: Tensor, timestep: float) -> Tensor:
        tokens = torch.empty(2, 77, 48, device=GPU)
        return self._make(self.base, tokens, tokens).predict(latent, timestep)

    def call_upgraded(self, latent: Tensor, timestep: float) -> Tensor:
        tokens, pooled, ids = (torch.empty(2, *size, device=GPU) for size in ((77, 80), (40,), (6,)))
        return self._make(self.upgraded, tokens, tokens, pooled, pooled, ids).predict(latent, timestep)


@contextmanager
def lockstep(host) -> Iterator[FeatureSource]:
    with read_features(host.base) as reader:

        def evaluate(latent: Tensor, evaluation: Evaluation) -> BaseStep:
            return BaseStep(
                denoised=latent - evaluation.sigma * host.call_base(latent, 40.0 * evaluation.sigma),
                features=reader.take(),
                rows=host.rows,
            )

        yield OncePerLevel(Lockstep(evaluate, Trajectory(torch.empty(2, 4, 8, 8, device=GPU))))


def sampled(host, mapping, source: FeatureSource) -> Tensor:
    stage = JointStage(source, Coupling(mapping, (1.0, 0.5, 1.0)))
    latent = torch.empty(2, 4, 16, 16, device=GPU)
    for evaluation in EVALUATIONS:
        with stage.evaluate(evaluation, host.rows).fused_into(host.upgraded, slice(0, 4)):
            latent = latent - 0.1 * host.call_upgraded(latent, 40.0 * evaluation.sigma)
    return latent


@pytest.fixture(params=[(ToyHost, "eager"), (ToyHost, "cuda"), (DiffusersHost, "cuda")], ids=str)
def step(request):
    make_host, path = request.param
    return make_host(), PATHS[path](released(HALF))


def test_in_lockstep_all_is_on_the_gpu_and_nothing_waits_for_it(step, gpu):
    host, mapping = step
    with gpu() as waits:
        for module in (host.base, host.upgraded, mapping.adapter):
            on_the_gpu(module)
        with lockstep(host) as source:
            waits.seen.clear()
            latent = sampled(host, mapping, source)
    assert latent.device == GPU
    assert waits.seen == []


def test_recorded_features_lie_in_ordinary_memory_and_only_pinned_copies_pass(step, gpu):
    host, mapping = step
    with gpu() as waits:
        for module in (host.base, host.upgraded, mapping.adapter):
            on_the_gpu(module)
        with lockstep(host) as source:
            waits.seen.clear()
            recording = record(source, EVALUATIONS, time_embedding=False)
        latent = sampled(host, mapping, OncePerLevel(Playback(recording, GPU)))
    assert latent.device == GPU
    assert {feature.device.type for feature in features_of(recording)} == {"cpu"}
    assert not any(feature.is_pinned() for feature in features_of(recording))
    assert waits.seen == []


def features_of(recording: Recording) -> list[Tensor]:
    return [feature for step in recording.steps for feature in step.row_features.features.levels]


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.sum() > 0),
        lambda x: x.nonzero(),
        lambda x: x[[0, 1]],
        lambda x: x.cpu(),
        lambda x: torch.tensor([1.0], device=x.device),
        lambda x: x.copy_(torch.ones(4)),
        lambda x: x[torch.tensor([1, 2])],
    ],
)
def test_what_waits_is_noticed(wait, gpu):
    with gpu() as waits:
        try:
            wait(torch.empty(4, device=GPU))
        # fake tensors have no number to give
        except Exception as error:
            assert "DataDependent" in type(error).__name__ or "Dynamic" in type(error).__name__
    assert waits.seen


def test_a_timestep_that_is_a_number_would_wait_inside_diffusers(gpu):
    host = DiffusersHost()
    with gpu() as waits:
        on_the_gpu(host.base)
        waits.seen.clear()
        tokens = torch.empty(1, 77, 48, dtype=HALF, device=GPU)
        host.base(torch.empty(1, 4, 8, 8, dtype=HALF, device=GPU), 3.5, encoder_hidden_states=tokens)
    assert waits.seen == ["_to_copy between cpu and cuda"]
