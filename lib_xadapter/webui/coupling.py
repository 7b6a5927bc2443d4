"""Ties the joint stage to the WebUI's samplers: noise levels and rows.

Order inside the WebUI (`sd_samplers_cfg_denoiser.py`, `CFGDenoiser.forward`): one call of the CFG denoiser is one model
evaluation; it builds a batch of conds and unconds and passes it to the inner model whole or in slices.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from modules import shared
from modules.sd_samplers_cfg_denoiser import CFGDenoiser
from modules.sd_samplers_common import Sampler
from torch import Tensor

from ..errors import XAdapterError
from ..joint_stage import JointStage, Moment
from ..rows import batch_rows
from .moments import first_that_differs, moment, noise_levels


@contextmanager
def coupled(stage: JointStage, sampler: Sampler, planned: Sequence[Moment] | None) -> Iterator[None]:
    """While open, every model evaluation of the sampler is one of the joint stage.

    Args:
        stage: the joint stage.
        sampler: of SDXL, about to run.
        planned: its evaluations, where they are known; their noise levels are not read back from the GPU.

    Raises:
        XAdapterError: at the end, where the sampler took other noise levels than planned.
    """
    upgraded, denoiser = shared.sd_model, sampler.model_wrap_cfg
    asked: list[Tensor] = []
    rows = 0

    def now(level: Tensor) -> Moment:
        if planned is None:
            return moment(denoiser, noise_levels(denoiser, [level[:1]])[0])
        if denoiser.step >= len(planned):
            raise XAdapterError(
                f"The sampler takes more than the {len(planned)} model evaluations that it was to take."
            )
        asked.append(level[:1])
        return planned[denoiser.step]

    def before_evaluation(module: CFGDenoiser, args: tuple, kwargs: dict[str, Any]) -> None:
        nonlocal rows
        # the refiner may have become the current model; it is no upgraded model of ours
        if shared.state.interrupted or shared.state.skipped or shared.sd_model is not upgraded:
            return
        layout = batch_rows([len(conds) for conds in kwargs["cond"].batch])
        rows = len(layout)
        stage.advance(now(args[1]), layout)

    def before_call(module: torch.nn.Module, args: tuple) -> None:
        stage.select(rows_in_batch(args[0], rows))

    with ExitStack() as hooks:
        hooks.enter_context(stage.coupled_to(upgraded.model.diffusion_model))
        hooks.callback(denoiser.register_forward_pre_hook(before_evaluation, with_kwargs=True).remove)
        hooks.callback(denoiser.inner_model.register_forward_pre_hook(before_call).remove)
        hooks.callback(denoiser.inner_model.register_forward_hook(lambda *_: stage.select(None)).remove)
        yield
    if asked:
        _check_plan(planned, noise_levels(denoiser, asked))


def _check_plan(planned: Sequence[Moment], asked: Sequence[float]) -> None:
    place = first_that_differs(planned, asked)
    if place is not None:
        raise XAdapterError(
            f"Another extension has changed the sampler's noise levels: evaluation {place} was to be at "
            f"{planned[place].sigma:g} and was at {asked[place]:g}."
        )


def rows_in_batch(part: Tensor, rows: int) -> slice:
    """Where a slice that the CFG denoiser passes on lies in its batch, told by its place in the batch's memory.

    Raises:
        XAdapterError: it is no slice of a batch of so many rows.
    """
    if len(part) == rows:
        return slice(0, rows)
    row = part[0].numel()
    if part.untyped_storage().nbytes() != rows * row * part.element_size() or not part.is_contiguous():
        raise XAdapterError(
            f"Another extension passed {len(part)} rows to the model that are no part of the {rows} of this step; "
            "X-Adapter cannot tell which prompt they belong to."
        )
    first = part.storage_offset() // row
    return slice(first, first + len(part))
