"""The ControlNet units whose model is for the base, at work on it.

The extension's own code does the work: a copy of its script object is run on the base's processing object, with the
base as the WebUI's current model. In its modules, `scripts.hook` replaces a UNet's forward, and `scripts/controlnet.py`
holds the script object.
"""

from __future__ import annotations

import copy
import itertools
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from modules import script_callbacks
from modules.processing import StableDiffusionProcessingTxt2Img
from modules.sd_samplers_cfg_denoiser import CFGDenoiser
from PIL import Image
from torch import Tensor

from ...errors import DoesNotFit, WrongArgument, XAdapterError
from ...evaluations import Evaluation
from ...families import FAMILY_NAMES
from ...feature_sources import BaseDenoiser, BaseStep
from ...taps import FeatureReader
from ..sampling.sampling_plan import nearest_level, noise_levels
from ..sampling.seeded import seeded
from .base_model import BaseModel
from .controlnet_units import Unit, extension, one_line, read_unit
from .host_state import Attribute, HostState


class BaseUnits:
    """The units of one job that go to the base. Empty until they are taken over.

    Order: `take_over` before any script's `process`; `check` when the job starts; for each batch `hooked`, and inside
    it `stage_one`, then `beside_sdxl`; `give_back` when the job ends.

    Attributes:
        enabled: all units of the panel, SDXL's too.
        detected_maps: what the extension shows beside the pictures, there after the first batch.
    """

    def __init__(self) -> None:
        self.enabled: list[Unit] = []
        self.detected_maps: list[Image.Image] = []
        self._units: list[Unit] = []
        self._taken: dict[int, tuple[Any, Any]] = {}
        self._problem: XAdapterError | None = None
        self._infotext: dict[str, str] = {}
        self._p: StableDiffusionProcessingTxt2Img | None = None
        self._original: Any = None
        self._script: Any = None
        self._own = HostState(())
        self._schedule: list[tuple[float, float]] = []
        self._asked: list[tuple[CFGDenoiser, Tensor, float]] = []
        self._reader: FeatureReader | None = None
        self._seed = 0

    # ---- before the job

    def take_over(self, p: StableDiffusionProcessingTxt2Img) -> None:
        """Take the base's units out of SDXL's arguments. Raises nothing: `check` tells what is wrong."""
        external = extension()
        self._p, self._original = p, external.find_cn_script(p.scripts) if external else None
        if self._original is None:
            return
        try:
            self._take_over(external)
        except XAdapterError as problem:
            self._problem = problem
        except Exception as error:
            self._problem = WrongArgument(f"The ControlNet units cannot be read: {one_line(error)}")

    def _take_over(self, external: ModuleType) -> None:
        p, script = self._p, self._original
        before = dict(p.extra_generation_params)
        # writes the infotext of all units, numbered as if SDXL had them
        type(script).get_enabled_units(p)
        self._infotext = {key: p.extra_generation_params[key] for key in p.extra_generation_params.keys() - before}
        for place in range(script.args_from, script.args_to):
            given, number = p.script_args[place], place - script.args_from
            if given is None:
                continue
            # the X/Y/Z plot's axes are attributes of the processing object
            unit = Unit(number, type(script).parse_remote_call(p, read_unit(number, given).settings, number))
            if not unit.settings.enabled:
                continue
            unit.check_input()
            self.enabled.append(unit)
            if unit.family != "sdxl":
                self._units.append(unit)
                self._taken[place] = given, external.ControlNetUnit(enabled=False)
        self._exchange({place: without for place, (_, without) in self._taken.items()})

    def _exchange(self, arguments: dict[int, Any]) -> None:
        """Put arguments into their places among the processing object's."""
        p = self._p
        if arguments:
            p.script_args = type(p.script_args)(arguments.get(place, own) for place, own in enumerate(p.script_args))

    def give_back(self) -> None:
        """Put the base's units back among the arguments, for the next job of the same processing object."""
        taken, self._taken = self._taken, {}
        # another script may have put in something else
        self._exchange(
            {place: given for place, (given, without) in taken.items() if self._p.script_args[place] is without}
        )

    def check(self, base: BaseModel) -> None:
        """Whether the units can be used on the base; writes all units into the infotext.

        Raises:
            XAdapterError: what was wrong when they were taken over, or a unit for another model than the base.
        """
        if self._problem is not None:
            raise self._problem
        for unit in self._units:
            if unit.family not in (base.family, None):
                raise DoesNotFit(
                    f"{unit} is for {FAMILY_NAMES[unit.family]}, the checkpoint {base.info.name} is "
                    f"{FAMILY_NAMES[base.family]}."
                )
        # the extension has written SDXL's own units alone in the meantime
        self._p.extra_generation_params.update(self._infotext)

    def state(self) -> list[Any]:
        """All that the units depend on: what is set in them, and when their models' files were written."""
        return [
            [unit.number, vars(unit.settings), None if unit.lacks_model else unit.model_file().stat().st_mtime]
            for unit in self._units
        ]

    def first_with_picture(self) -> Unit | None:
        """The first unit of the base with an image of its own."""
        return next((unit for unit in self._units if unit.picture() is not None), None)

    # ---- during a batch

    @contextmanager
    def hooked(self, job: StableDiffusionProcessingTxt2Img, base: BaseModel) -> Iterator[None]:
        """While open, the base's UNet is under the control of the units.

        Args:
            job: the base's processing object, prompts encoded.
            base: the base model.

        Raises:
            WrongArgument: the extension cannot set a unit up.
        """
        if not self._units:
            yield
            return
        self._script = script = self._copied_script(base)
        self._own = own_state(type(script), base)
        self._schedule, self._asked, self._seed = [], [], job.seeds[0]
        try:
            with base.current(), self._state():
                self._set_up(job)
            yield
        finally:
            self._reader = None
            with base.current(), self._state():
                script.postprocess(job, shown := SimpleNamespace(images=[]))
            self.detected_maps = self.detected_maps or shown.images
            self._script = None

    def check_those_of_sdxl(self) -> None:
        """Whether SDXL's own units are at work; what the extension raises for them ends in the WebUI's log.

        Raises:
            WrongArgument: it could not set them up.
        """
        units = [str(unit) for unit in self.enabled if unit.family == "sdxl"]
        if units and not getattr(self._original.latest_network, "control_params", None):
            raise WrongArgument(f"{', '.join(units)} cannot be used for SDXL; the WebUI's log tells why.")

    @contextmanager
    def stage_one(self) -> Iterator[None]:
        """While open, the base samples alone, and how far each unit has come is written down by noise level."""
        if self._script is None:
            yield
            return
        script_callbacks.on_cfg_denoiser(self._follow_sampler)
        try:
            with self._state():
                yield
        finally:
            script_callbacks.remove_callbacks_for_function(self._follow_sampler)
        self._write_down_schedule()

    def _write_down_schedule(self) -> None:
        """Which noise level each evaluation of stage 1 had: read from the GPU once, when it is through."""
        if not self._asked:
            return
        denoisers, asked, progress = zip(*self._asked, strict=True)
        self._schedule = list(zip(noise_levels(denoisers[0], asked), progress, strict=True))

    def change_noise(self, job: StableDiffusionProcessingTxt2Img) -> None:
        """Some inpainting preprocessors start stage 1 from their picture."""
        if self._script is not None:
            self._script.before_process_batch(job)

    def finish(self, pixels: Tensor) -> Tensor:
        """Some preprocessors change the finished pictures: (images, 3, height, width) in 0..1."""
        if self._script is not None:
            self._script.postprocess_batch(self._p, images=pixels)
        return pixels

    def beside_sdxl(self, evaluate: BaseDenoiser, reader: FeatureReader) -> BaseDenoiser:
        """The evaluation of the base with the units as they were at the same noise level in stage 1.

        Args:
            evaluate: evaluates the base.
            reader: collects its features.
        """
        if self._script is None:
            return evaluate
        self._reader = reader
        # reference units draw noise at every evaluation, whatever else draws in between
        seeds = itertools.count(self._seed)

        def controlled(latent: Tensor, evaluation: Evaluation) -> BaseStep:
            with self._state(), seeded(next(seeds)):
                self._go_to(self._progress_at(evaluation))
                return evaluate(latent, evaluation)

        return controlled

    # ---- inside the extension

    def _copied_script(self, base: BaseModel) -> Any:
        """The extension's script object, with nothing of SDXL's units in it."""
        script = copy.copy(self._original)
        script.latest_network = script.noise_modifier = script.input_image = None
        script.enabled_units, script.detected_map, script.post_processors = [], [], []
        # or else it would empty the cache, which is the base's own
        script.latest_model_hash = base.model.sd_model_hash
        script.args_from, script.args_to = 0, len(self._units)
        return script

    def _set_up(self, job: StableDiffusionProcessingTxt2Img) -> None:
        p, script, hook = self._p, self._script, sys.modules["scripts.hook"]
        job.subseed, job.outpath_samples = p.subseed, p.outpath_samples
        job.scripts_value = SimpleNamespace(alwayson_scripts=[script])
        job.script_args_value = [unit.settings.copy() for unit in self._units]
        try:
            script.process(job)
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:
            raise WrongArgument(f"{self._at_fault(error)} cannot be used: {one_line(error)}") from error
        finally:
            job.scripts_value, job.script_args_value = None, {}
        if self.detected_maps:
            script.detected_map = []
        network = script.latest_network
        # it would follow SDXL's sampler
        script_callbacks.remove_callbacks_for_function(network.guidance_schedule_handler)
        network.original_forward = self._without_reading(network.original_forward)
        hook.mark_prompt_context(job.c, positive=True)
        hook.mark_prompt_context(job.uc, positive=False)

    def _at_fault(self, error: Exception) -> str:
        """The unit that the extension was busy with, or all."""
        for frame, _ in traceback.walk_tb(error.__traceback__):
            if frame.f_code.co_name == "controlnet_main_entry":
                place = frame.f_locals.get("idx", -1)
                if len(frame.f_locals["self"].enabled_units) == len(self._units) and place >= 0:
                    return str(self._units[place])
        return ", ".join(map(str, self._units))

    def _without_reading(self, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """A pass of the UNet over the reference picture, from which no features are read."""

        def without_reading(*args: Any, **kwargs: Any) -> Tensor:
            if self._reader is None:
                return forward(*args, **kwargs)
            with self._reader.paused():
                return forward(*args, **kwargs)

        return without_reading

    @contextmanager
    def _state(self) -> Iterator[None]:
        """While open, what the extension keeps in its modules is the base's and not SDXL's."""
        outside = self._own.again()
        self._own.restore()
        try:
            yield
        finally:
            self._own = outside.again()
            outside.restore()

    # ---- start and end of a unit

    def _follow_sampler(self, params: script_callbacks.CFGDenoiserParams) -> None:
        """One evaluation of stage 1, as the extension itself counts them."""
        progress = params.sampling_step / params.total_sampling_steps
        self._asked.append((params.denoiser, params.sigma[:1], progress))
        self._go_to(progress)

    def _progress_at(self, evaluation: Evaluation) -> float:
        """How much of stage 1 had gone at a noise level; without a stage 1, how much of SDXL's sampling."""
        if not self._schedule:
            return evaluation.progress
        return self._schedule[nearest_level([sigma for sigma, _ in self._schedule], evaluation.sigma)][1]

    def _go_to(self, progress: float) -> None:
        handler = self._script.latest_network.guidance_schedule_handler
        handler(SimpleNamespace(sampling_step=progress, total_sampling_steps=1))


def own_state(script_class: type, base: BaseModel) -> HostState:
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
