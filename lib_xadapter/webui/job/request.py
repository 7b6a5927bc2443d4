"""What a job is asked for: everything that depends on the request, decided once before anything is made."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from modules import processing, sd_models, sd_samplers, sd_unet, shared
from modules.processing import StableDiffusionProcessing
from torch import nn

from ...errors import DoesNotFit
from ...evaluations import Evaluation
from ...joint_stage import Coupling
from ...memory import Work, free_ram
from ...recording import expected_size
from ...settings import AUTO, Settings, read_settings
from ...taps import check_fit
from .. import model_files
from ..base.base_model import BaseModel
from ..base.base_processing import base_hires_size, base_size, largest_work
from ..base.base_units import BaseUnits
from ..base.models import Models
from ..base.stage_one import check_start
from ..sampling.sampling_plan import planned_evaluations
from ..sampling.samplings import Sampling, Start, check_tab, hires_sampling, samplings_of, stage_one_steps

logger = logging.getLogger(__name__)

TILED_DIFFUSION = "tilediffusion.py"
"""The script of multidiffusion-upscaler-for-automatic1111, which puts a function of its own in place of the WebUI's."""


@dataclass(frozen=True)
class PlannedSampling:
    """One sampling of SDXL in which the base takes part.

    Attributes:
        sampling: where it starts, its sampler and its steps.
        coupling: how the base's features enter it; None where nothing but the base's picture is carried over.
        evaluations: those that its sampler will make; None where they are not known before.
        recorded: run the base first and SDXL afterwards.
    """

    sampling: Sampling
    coupling: Coupling | None
    evaluations: tuple[Evaluation, ...] | None
    recorded: bool


@dataclass(frozen=True)
class Request:
    """A job of the WebUI.

    Attributes:
        settings: with the full names of checkpoint and adapter.
        base: the base model, loaded.
        coupling: how its features enter SDXL; None where nothing but its picture is carried over.
        sequential: base and SDXL are on the GPU one after the other.
        work: of its largest joint steps.
        samplings: those of SDXL, in their order.
    """

    settings: Settings
    base: BaseModel
    coupling: Coupling | None
    sequential: bool
    work: Work
    samplings: tuple[PlannedSampling, ...]

    def planned(self, is_hires: bool) -> PlannedSampling | None:
        """The first sampling, or the second pass of Hires. fix; None where the base has no part in it."""
        return next((planned for planned in self.samplings if planned.sampling.is_hires is is_hires), None)

    def may_record(self, planned: PlannedSampling) -> bool:
        """Whether a sampling may go on in recorded mode if both models do not fit."""
        return self.settings.memory == AUTO and planned.evaluations is not None

    def base_steps(self, p: StableDiffusionProcessing, planned: PlannedSampling) -> list[int]:
        """Steps of each of the base's jobs in the progress bar: stage 1 and the recording, as far as there are any."""
        stage_one = [stage_one_steps(p, self.settings)] if planned.sampling.start is Start.BASE else []
        if not planned.recorded or planned.coupling is None:
            return stage_one
        return [*stage_one, len(planned.coupling.window.base_evaluations(planned.evaluations or ()))]


def decide(p: StableDiffusionProcessing, models: Models, units: BaseUnits, arguments: Mapping[str, Any]) -> Request:
    """Read the arguments, refuse what cannot work, load what is needed.

    Raises:
        XAdapterError: one sentence on what is wrong.
    """
    settings = read_settings(arguments)
    refuse_what_cannot_work(p, settings)
    info = model_files.find_base_checkpoint(settings.base_checkpoint)
    path = model_files.find_adapter(settings.adapter) if settings.has_adapter else None
    couples = path is not None and any(settings.weights)
    work = largest_work(p, settings, len(units.of_base))
    sequential = models.is_sequential(settings.memory, info, path, work)
    base = models.base(info, sequential)
    units.check(base)
    check_start(settings, units)
    coupling = None
    if path is not None:
        mapping = models.mapping(path)
        check_fit(mapping.adapter, base.unet, shared.sd_model.model.diffusion_model)
        if remark := model_files.adapter_pair(path).remark(base.family):
            notify(p, remark)
        if couples:
            coupling = Coupling.from_settings(mapping, settings)
    adapter = _adapter_name(path) if path is not None else "None"
    named = replace(settings, base_checkpoint=info.short_title, adapter=adapter)
    request = Request(named, base, coupling, sequential, work, ())
    return replace(request, samplings=tuple(plan(p, request, sampling) for sampling in samplings_of(p, settings)))


def plan(p: StableDiffusionProcessing, request: Request, sampling: Sampling) -> PlannedSampling:
    """One sampling, with the WebUI's current model as the upgraded one.

    The base is left where the plan wants it to be.
    """
    if request.coupling is None:
        return PlannedSampling(sampling, None, None, request.sequential)
    # the WebUI does so once the prompts are encoded; until then the model has the last job's schedule
    sd_models.apply_alpha_schedule_override(p.sd_model, p)
    evaluations = planned_evaluations(p, sampling)
    if not request.sequential:
        return PlannedSampling(sampling, request.coupling, evaluations, False)
    obstacle = _obstacle_to_recording(p, request, sampling, evaluations)
    if obstacle:
        notify(p, f"{obstacle}, so memory is 'lockstep'")
        request.base.to_gpu()
    return PlannedSampling(sampling, request.coupling, evaluations, not obstacle)


def _obstacle_to_recording(
    p: StableDiffusionProcessing, request: Request, sampling: Sampling, evaluations: Sequence[Evaluation] | None
) -> str:
    """Why the base cannot be recorded first, "" where it can."""
    if evaluations is None:
        return f"the noise levels of {sampling.sampler_name} are not known before it runs"
    size = base_hires_size if sampling.is_hires and p.hr_upscale_to_x else None
    width, height = size(request.settings, p) if size else base_size(request.settings, p.width, p.height)
    recorded = request.coupling.window.base_evaluations(evaluations)
    latent_size = height // processing.opt_f, width // processing.opt_f
    taps = request.coupling.mapping.adapter.taps
    expected = expected_size(request.base.unet, 2 * p.batch_size, latent_size, len(recorded), taps)
    missing = expected - free_ram()
    return f"the recording would need {missing / 2**30:.1f} GB more RAM than is free" if missing > 0 else ""


def takes_residuals(p: StableDiffusionProcessing, request: Request, upgraded_unet: nn.Module) -> bool:
    """Whether the mapping layers fit the UNet of a model that was chosen for a part of the job; the user is told."""
    try:
        check_fit(request.coupling.mapping.adapter, request.base.unet, upgraded_unet)
    except DoesNotFit:
        name = shared.sd_model.sd_checkpoint_info.name_for_extra
        notify(p, f"the adapter does not fit {name}, which goes on alone")
        return False
    return True


def refuse_what_cannot_work(p: StableDiffusionProcessing, settings: Settings) -> None:
    """The states of the WebUI that X-Adapter cannot work in, and arguments that contradict the tab.

    Raises:
        DoesNotFit, WrongArgument: one sentence on what to change.
    """
    if not shared.sd_model.is_sdxl:
        name = shared.sd_model.sd_checkpoint_info.name_for_extra
        raise DoesNotFit(f"X-Adapter brings SD1.5 plugins to SDXL: select an SDXL checkpoint; {name} is none.")
    if sd_unet.get_unet_option() is not None or sd_unet.current_unet is not None:
        raise DoesNotFit(
            "X-Adapter needs the models' own UNets: set 'SD Unet' to None in Settings (a replacement, such as "
            "TensorRT, is active)."
        )
    if sd_samplers.create_sampler.__module__ == TILED_DIFFUSION:
        raise DoesNotFit(
            "X-Adapter needs SDXL's picture whole, Tiled Diffusion gives it to SDXL in tiles: switch one of them off."
        )
    check_tab(p, settings)


def notify(p: StableDiffusionProcessing, sentence: str) -> None:
    """In the log and under the picture."""
    logger.warning("%s", sentence)
    p.comment(f"X-Adapter: {sentence}.")


@contextmanager
def counted(p: StableDiffusionProcessing, request: Request) -> Iterator[None]:
    """Around the WebUI's own counting of jobs: afterwards each stage is one in the progress bar.

    A script that makes several pictures may have counted before; then nothing is changed.
    """
    state = shared.state
    before, is_counted = state.job_count, state.processing_has_refined_job_count
    yield
    if is_counted:
        return
    jobs = jobs_of(p, request)
    batches = p.n_iter if before == -1 else before
    shared.total_tqdm.updateTotal(sum(jobs) * batches)
    state.job_count = len(jobs) * batches
    state.processing_has_refined_job_count = True


def jobs_of(p: StableDiffusionProcessing, request: Request) -> list[int]:
    """Steps of each job of a batch, the base's and SDXL's."""
    first, second = request.planned(is_hires=False), request.planned(is_hires=True)
    jobs = [] if first is None else [*request.base_steps(p, first), first.sampling.joint_steps(p)]
    if second is not None:
        return [*jobs, *request.base_steps(p, second), second.sampling.joint_steps(p)]
    return [*jobs, hires_sampling(p).joint_steps(p)] if getattr(p, "enable_hr", False) else jobs


def _adapter_name(path: Path) -> str:
    return next(name for name, found in model_files.adapters().items() if found == path)
