"""What a job is asked for: everything that depends on the request, decided once before anything is made."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from modules import processing, sd_models, sd_samplers_common, sd_unet, shared
from modules.processing import StableDiffusionProcessingTxt2Img

from ...errors import DoesNotFit, WrongArgument
from ...evaluations import Evaluation, GuidanceWindow
from ...memory import free_ram
from ...recording import expected_size
from ...settings import AUTO, Settings, half, read_settings
from ...taps import check_fit
from ...two_stage import Coupling
from .. import model_files
from ..base.base_model import BaseModel
from ..base.base_units import BaseUnits
from ..base.models import Models
from ..base.stage_one import check_start
from ..sampling.sampling_plan import planned_evaluations
from ..sampling.switch import denoising_strength

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """A job of the WebUI.

    Attributes:
        settings: with the full names of checkpoint and adapter.
        base: the base model, loaded.
        coupling: how its features enter SDXL; None where nothing but its picture is carried over.
        evaluations: those that SDXL's sampler will make; None where they are not known before.
        sequential: run the base first and SDXL afterwards.
    """

    settings: Settings
    base: BaseModel
    coupling: Coupling | None
    evaluations: tuple[Evaluation, ...] | None
    sequential: bool

    @property
    def may_record(self) -> bool:
        """Whether the job may go on in recorded mode if both models do not fit."""
        return self.settings.memory == AUTO and self.evaluations is not None

    def base_steps(self, p: StableDiffusionProcessingTxt2Img) -> list[int]:
        """Steps of each of the base's jobs in the progress bar: stage 1 and the recording, as far as there are any."""
        stage_one = [] if self.settings.single_stage else [self.settings.base_steps or p.steps]
        if not self.sequential or self.coupling is None:
            return stage_one
        return [*stage_one, len(self.coupling.window.base_evaluations(self.evaluations or ()))]


def decide(
    p: StableDiffusionProcessingTxt2Img, models: Models, units: BaseUnits, arguments: Mapping[str, Any]
) -> Request:
    """Read the arguments, refuse what cannot work, load what is needed.

    Raises:
        XAdapterError: one sentence on what is wrong.
    """
    settings = read_settings(arguments)
    refuse_what_cannot_work(p)
    info = model_files.find_base_checkpoint(settings.base_checkpoint)
    path = model_files.find_adapter(settings.adapter) if settings.has_adapter else None
    couples = path is not None and any(settings.weights)
    evaluations = _planned(p, settings) if couples else None
    sequential = models.is_sequential(settings.memory, info, path)
    if couples and sequential and evaluations is None:
        sequential = False
        notify(p, f"the noise levels of {p.sampler_name} are not known before it runs, so memory is 'lockstep'")
    base = models.base(info, sequential)
    if couples and sequential and (missing := _missing_for_recording(p, settings, base, evaluations)) > 0:
        sequential = False
        notify(p, f"the recording would need {missing / 2**30:.1f} GB more RAM than is free, so memory is 'lockstep'")
        base.to_gpu()
    units.check(base)
    check_start(settings, units)
    coupling = None
    if path is not None:
        mapping = models.mapping(path)
        check_fit(mapping.adapter, base.unet, shared.sd_model.model.diffusion_model)
        if couples:
            window = GuidanceWindow.from_settings(settings)
            coupling = Coupling(mapping, settings.weights, window, settings.cond_only)
    adapter = _adapter_name(path) if path is not None else "None"
    named = replace(settings, base_checkpoint=info.short_title, adapter=adapter)
    return Request(named, base, coupling, evaluations, sequential)


def _planned(p: StableDiffusionProcessingTxt2Img, settings: Settings) -> tuple[Evaluation, ...] | None:
    # the WebUI does so once the prompts are encoded; until then the model has the last job's schedule
    sd_models.apply_alpha_schedule_override(p.sd_model, p)
    return planned_evaluations(p, None if settings.single_stage else settings.switch_point)


def _missing_for_recording(
    p: StableDiffusionProcessingTxt2Img,
    settings: Settings,
    base: BaseModel,
    evaluations: Sequence[Evaluation],
) -> int:
    """Bytes of RAM that recording a batch takes beyond what is free."""
    height, width = settings.base_height or half(p.height), settings.base_width or half(p.width)
    recorded = GuidanceWindow.from_settings(settings).base_evaluations(evaluations)
    latent_size = height // processing.opt_f, width // processing.opt_f
    return expected_size(base.unet, 2 * p.batch_size, latent_size, len(recorded)) - free_ram()


def refuse_what_cannot_work(p: StableDiffusionProcessingTxt2Img) -> None:
    """The states of the WebUI that X-Adapter cannot work in.

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
    if p.enable_hr:
        raise WrongArgument("X-Adapter and Hires. fix do not work together yet: switch one of them off.")


def notify(p: StableDiffusionProcessingTxt2Img, sentence: str) -> None:
    """In the log and under the picture."""
    logger.warning("%s", sentence)
    p.comment(f"X-Adapter: {sentence}.")


def count_jobs(p: StableDiffusionProcessingTxt2Img, request: Request) -> None:
    """Each stage is a job in the progress bar, as hires fix does it."""
    state, settings = shared.state, request.settings
    steps = request.base_steps(p)
    if not steps or state.processing_has_refined_job_count:
        return
    steps.append(p.steps if settings.single_stage else joint_steps(p, settings.switch_point))
    if state.job_count == -1:
        state.job_count = p.n_iter
    shared.total_tqdm.updateTotal(sum(steps) * state.job_count)
    state.job_count *= len(steps)
    state.processing_has_refined_job_count = True


def joint_steps(p: StableDiffusionProcessingTxt2Img, switch_point: float) -> int:
    """How many steps SDXL takes from the switch point on, by the img2img tab's rule."""
    with denoising_strength(p, switch_point):
        _, last = sd_samplers_common.setup_img2img_steps(p)
    return last + 1


def _adapter_name(path: Path) -> str:
    return next(name for name, found in model_files.adapters().items() if found == path)
