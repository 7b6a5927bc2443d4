"""The base's UNet under the control of ControlNet units.

The extension's own code does the work: a copy of its script object is run on the base's processing object, with the
base as the WebUI's current model. In its modules, `scripts.hook` replaces a UNet's forward, and `scripts/controlnet.py`
holds the script object.
"""

from __future__ import annotations

import copy
import itertools
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from modules import script_callbacks, shared
from modules.processing import StableDiffusionProcessing
from modules.sd_samplers_cfg_denoiser import CFGDenoiser
from PIL import Image
from torch import Tensor

from ...errors import WrongArgument
from ...evaluations import Evaluation, nearest_level
from ...feature_sources import BaseDenoiser, BaseStep
from ...taps import FeatureReader
from ..sampling.sampling_plan import noise_levels
from ..sampling.seeded import seeded
from .base_model import BaseModel
from .controlnet_units import Unit, one_line
from .host_state import Attribute, Exchange, HostState

BeforeEvaluation = Callable[[CFGDenoiser, Tensor], None]
"""Told the WebUI's denoiser and the noise level, (1,), as its sampler counts it."""


class HookedUnits:
    """What the base's units do while its UNet is under their control. This one is for a base without any."""

    @contextmanager
    def stage_one(self) -> Iterator[BeforeEvaluation]:
        """While open, the base samples alone; what it gives is called before each of its evaluations."""
        yield lambda denoiser, sigma: None

    def change_noise(self, job: StableDiffusionProcessing) -> None:
        """Some inpainting preprocessors start stage 1 from their picture: they change the generators of its noise."""

    def finish(self, pixels: Tensor) -> Tensor:
        """Some preprocessors change the finished pictures: (images, 3, height, width) in 0..1."""
        return pixels

    def beside_sdxl(self, evaluate: BaseDenoiser, reader: FeatureReader) -> BaseDenoiser:
        """The evaluation of the base with the units as they were at the same noise level in stage 1.

        Args:
            evaluate: evaluates the base.
            reader: collects its features.
        """
        return evaluate


class _UnitsAtWork(HookedUnits):
    """The extension's, which has been set up.

    Args:
        script: its script object for the base.
        modules: what it keeps in its modules for the base.
        p: SDXL's processing object.
        job: the base's.
    """

    def __init__(
        self,
        script: Any,
        modules: Exchange,
        p: StableDiffusionProcessing,
        job: StableDiffusionProcessing,
    ) -> None:
        self._script, self._modules, self._p, self._job = script, modules, p, job
        self._progress: list[tuple[float, float]] = []
        """(noise level, how much of stage 1 had gone); empty without a stage 1."""

    @contextmanager
    def stage_one(self) -> Iterator[BeforeEvaluation]:
        asked: list[tuple[CFGDenoiser, Tensor, float]] = []

        def follow(denoiser: CFGDenoiser, sigma: Tensor) -> None:
            """As the extension itself counts evaluations."""
            progress = shared.state.sampling_step / shared.state.sampling_steps
            asked.append((denoiser, sigma, progress))
            self._go_to(progress)

        with self._modules.in_force():
            yield follow
        if asked:
            # the noise levels are read from the GPU once, when the base is through
            denoisers, levels, progress = zip(*asked, strict=True)
            self._progress = list(zip(noise_levels(denoisers[0], levels), progress, strict=True))

    def change_noise(self, job: StableDiffusionProcessing) -> None:
        self._script.before_process_batch(job)

    def finish(self, pixels: Tensor) -> Tensor:
        self._script.postprocess_batch(self._p, images=pixels)
        return pixels

    def beside_sdxl(self, evaluate: BaseDenoiser, reader: FeatureReader) -> BaseDenoiser:
        # reference units draw noise at every evaluation, whatever else draws in between
        seeds = itertools.count(self._job.seeds[0])

        def controlled(latent: Tensor, evaluation: Evaluation) -> BaseStep:
            with self._modules.in_force(), seeded(next(seeds)), self._unread(reader):
                self._go_to(self._progress_at(evaluation))
                return evaluate(latent, evaluation)

        return controlled

    @contextmanager
    def _unread(self, reader: FeatureReader) -> Iterator[None]:
        """While open, no features are read from the UNet's passes over reference pictures."""
        network = self._script.latest_network
        forward = network.original_forward

        def unread(*args: Any, **kwargs: Any) -> Tensor:
            with reader.paused():
                return forward(*args, **kwargs)

        with patch.object(network, "original_forward", unread):
            yield

    def _progress_at(self, evaluation: Evaluation) -> float:
        """How much of stage 1 had gone at a noise level; without a stage 1, how much of SDXL's sampling."""
        if not self._progress:
            return evaluation.progress
        return self._progress[nearest_level([sigma for sigma, _ in self._progress], evaluation.sigma)][1]

    def _go_to(self, progress: float) -> None:
        """Let each unit begin or end where its start and end say."""
        handler = self._script.latest_network.guidance_schedule_handler
        handler(SimpleNamespace(sampling_step=progress, total_sampling_steps=1))


@contextmanager
def hooked(
    units: Sequence[Unit],
    script: Any,
    p: StableDiffusionProcessing,
    job: StableDiffusionProcessing,
    base: BaseModel,
    detected_maps: list[Image.Image],
) -> Iterator[HookedUnits]:
    """See `BaseUnits.hooked`; `script` is the extension's script object, which has SDXL's units."""
    own = _copied_script(script, base, len(units))
    modules = Exchange(_modules_state(type(own), base))
    try:
        with base.current(), modules.in_force():
            _set_up(own, units, p, job)
            if detected_maps:
                own.detected_map = []
        yield _UnitsAtWork(own, modules, p, job)
    finally:
        with base.current(), modules.in_force():
            own.postprocess(job, shown := SimpleNamespace(images=[]))
        detected_maps += shown.images


def _copied_script(original: Any, base: BaseModel, units: int) -> Any:
    """The extension's script object, with nothing of SDXL's units in it."""
    script = copy.copy(original)
    script.latest_network = script.noise_modifier = script.input_image = None
    script.enabled_units, script.detected_map, script.post_processors = [], [], []
    # or else it would empty the cache, which is the base's own
    script.latest_model_hash = base.model.sd_model_hash
    script.args_from, script.args_to = 0, units
    return script


def _set_up(script: Any, units: Sequence[Unit], p: StableDiffusionProcessing, job: StableDiffusionProcessing) -> None:
    hook = sys.modules["scripts.hook"]
    job.subseed, job.outpath_samples = p.subseed, p.outpath_samples
    job.scripts_value = SimpleNamespace(alwayson_scripts=[script])
    job.script_args_value = [unit.settings.copy() for unit in units]
    try:
        script.process(job)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:
        raise WrongArgument(f"{_at_fault(error, units)} cannot be used: {one_line(error)}") from error
    finally:
        job.scripts_value, job.script_args_value = None, {}
    # it would follow SDXL's sampler
    script_callbacks.remove_callbacks_for_function(script.latest_network.guidance_schedule_handler)
    hook.mark_prompt_context(job.c, positive=True)
    hook.mark_prompt_context(job.uc, positive=False)


def _at_fault(error: Exception, units: Sequence[Unit]) -> str:
    """The unit that the extension was busy with, or all."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_name == "controlnet_main_entry":
            place = frame.f_locals.get("idx", -1)
            if len(frame.f_locals["self"].enabled_units) == len(units) and place >= 0:
                return str(units[place])
    return ", ".join(map(str, units))


def _modules_state(script_class: type, base: BaseModel) -> HostState:
    """What belongs to the current model in the extension's modules, as the base has it at first."""
    ip_adapter, lllite = sys.modules["scripts.ipadapter.plugable_ipadapter"], sys.modules["scripts.controlnet_lllite"]
    return HostState(
        (
            (Attribute(ip_adapter, "all_hacks"), {}),
            (Attribute(ip_adapter, "current_model"), None),
            (Attribute(lllite, "all_hack"), {}),
            (Attribute(script_class, "model_cache"), base.control_models),
            # it judges by a file's name; the file itself has been asked already
            (Attribute(script_class, "check_sd_version_compatible"), staticmethod(lambda unit: None)),
        )
    )
