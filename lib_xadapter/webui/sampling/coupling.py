"""Ties the joint stage to the WebUI's samplers: noise levels and rows.

Order inside the WebUI (`sd_samplers_cfg_denoiser.py`, `CFGDenoiser.forward`): one call of the CFG denoiser is one model
evaluation; it builds a batch of conds and unconds and passes it to the inner model whole or in slices.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from modules import shared
from modules.sd_samplers_common import Sampler, apply_refiner
from torch import Tensor, nn

from ...errors import UnplannedLevel, XAdapterError
from ...evaluations import Evaluation
from ...joint_stage import JointStage
from ...rows import batch_rows
from ...two_stage import check_plan
from ...wrapping import wrapped
from .sampling_plan import evaluation_at, noise_levels


@contextmanager
def coupled(
    joint: JointStage,
    sampler: Sampler,
    planned: Sequence[Evaluation] | None,
    takes_residuals: Callable[[nn.Module], bool],
) -> Iterator[None]:
    """While open, every model evaluation of the sampler is one of the joint stage.

    Args:
        joint: the joint stage.
        sampler: of SDXL, about to run.
        planned: its evaluations, where they are known; their noise levels are not read back from the GPU.
        takes_residuals: whether the mapping layers fit the UNet of a refiner that takes over.

    Raises:
        UnplannedLevel: the sampler takes other noise levels than planned; looked at in the first evaluation, and of
            the others at the end.
    """
    upgraded, denoiser = shared.sd_model, sampler.model_wrap_cfg
    goes_on = functools.cache(takes_residuals)
    asked: list[Tensor] = []

    def evaluation(level: Tensor) -> Evaluation:
        if planned is None:
            return evaluation_at(denoiser, noise_levels(denoiser, [level[:1]])[0])
        if denoiser.step >= len(planned):
            raise UnplannedLevel(f"the sampler makes more than the {len(planned)} model evaluations that were planned")
        if not asked:
            check_plan(planned[denoiser.step :], noise_levels(denoiser, [level[:1]]))
        asked.append(level[:1])
        return planned[denoiser.step]

    def denoise(host: Callable[..., Tensor], x: Tensor, level: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if shared.state.interrupted or shared.state.skipped:
            return host(x, level, *args, **kwargs)
        # the WebUI does so at the beginning of this call, which is too late to know the model and its prompts
        if apply_refiner(denoiser, level):
            kwargs |= {name: sampler.sampler_extra_args[name] for name in ("cond", "uncond")}
        unet = shared.sd_model.model.diffusion_model
        if shared.sd_model is not upgraded and not goes_on(unet):
            return host(x, level, *args, **kwargs)
        rows = batch_rows([len(conds) for conds in kwargs["cond"].batch])
        at_this_level = joint.evaluate(evaluation(level), rows)

        def call(model: Callable[..., Tensor], part: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            with at_this_level.fused_into(unet, rows_in_batch(part, len(rows))):
                return model(part, *args, **kwargs)

        with wrapped(denoiser.inner_model, "forward", call):
            return host(x, level, *args, **kwargs)

    with wrapped(denoiser, "forward", denoise):
        yield
    if asked:
        check_plan(planned, noise_levels(denoiser, asked))


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
