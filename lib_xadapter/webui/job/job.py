"""X-Adapter's part in one job of the WebUI, between the WebUI's own methods.

The WebUI calls `init` of its processing object before anything is made, `parse_extra_network_prompts` for each batch,
and its sampler from `sample`. Each of them is called through ours while a job is under way, and none is replaced: what
goes wrong in there ends the job with its message, whereas the WebUI swallows what a script's hook raises.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from modules import devices, extra_networks, sd_models
from modules.processing import StableDiffusionProcessingTxt2Img
from modules.sd_samplers_common import Sampler
from PIL import Image
from torch import Tensor

from ... import __version__
from ...errors import XAdapterError
from ...infotext import write_infotext
from ...settings import Settings
from ...tried_versions import difference
from ...two_stage import Pass, run
from ...wrapping import wrapped
from ..base import plugins
from ..base.base_units import read_units
from ..base.models import Models
from ..versions import running
from .batch import Batch, share_out
from .recording_key import key_of
from .refusal import Refusal
from .request import Request, count_jobs, decide
from .webui_host import SamplerCall, WebUIHost

MISSING_NAME = (AttributeError, ImportError, KeyError, TypeError)
"""What a name that is no longer there, or is called otherwise, ends in."""


class Job:
    """From `before_process` until everything is as it was.

    Args:
        p: the WebUI's processing object.
        models: what is loaded.
        arguments: the arguments as the page or the REST object gave them; read when the job starts.
    """

    def __init__(
        self, p: StableDiffusionProcessingTxt2Img, models: Models, arguments: Callable[[], Mapping[str, Any]]
    ) -> None:
        self.base_pictures: list[Image.Image] = []
        self.detected_maps: list[Image.Image] = []
        """What the base's ControlNet units show beside the pictures."""
        self.settings = Settings()
        self._p = p
        self._models = models
        self._units = read_units(p)
        self._scope = ExitStack()
        self._wrap_sampler: Callable[[Sampler], None] = _leave
        self._is_open = True
        self._forbidden = False
        self._caches: tuple[list, list] = ([None, None], [None, None])
        self._scope.enter_context(self._units.taken_out())
        self._wrap(p, "init", partial(self._begin, arguments))
        # the WebUI closes its processing object whatever happens
        self._wrap(p, "close", self._close)

    def end(self, keep_base: bool = True) -> None:
        """Put everything back and let the models rest; nothing where that is done.

        Args:
            keep_base: False after what went wrong while the base had LoRAs, or for no known reason. A layer in which
                the Lora extension was interrupted never gets its own weights back; the next job loads them anew.
        """
        if not self._is_open:
            return
        self._is_open = False
        # it holds the base
        self._wrap_sampler = _leave
        if not keep_base:
            self._models.forget_base()
        try:
            self._scope.close()
        finally:
            self._models.rest()

    def before_sampling(self) -> None:
        """The WebUI has made its sampler and is about to call it. Raises nothing."""
        if self._is_open:
            self._wrap_sampler(self._p.sampler)

    def after_activation(self) -> None:
        """The WebUI has activated SDXL's extra networks, or passed over it. Raises nothing."""
        self._allow_activation()

    # ---- between the WebUI's own methods

    def _begin(self, arguments: Callable[[], Mapping[str, Any]], host: Callable[..., None], *args: Any) -> None:
        """Before anything is made."""
        with self._ends_the_job():
            request = decide(self._p, self._models, self._units, arguments())
            self.settings = request.settings
            self._p.extra_generation_params.update(write_infotext(request.settings, __version__))
            if request.sequential:
                self._scope.callback(self._models.upgraded_to_device)
            host(*args)
            count_jobs(self._p, request)
            self._wrap(self._p, "parse_extra_network_prompts", partial(self._share_out, request))

    def _share_out(self, request: Request, host: Callable[[], None]) -> None:
        """At the beginning of a batch."""
        p = self._p
        with self._ends_the_job():
            host()
            batch = share_out(p, request)
            batch.base_p.cached_c, batch.base_p.cached_uc = self._caches
            self._wrap_sampler = partial(self._wrap_sample, request, batch)
            if not p.disable_extra_networks and plugins.network_of_the_settings() is not None:
                self._activate_what_is_written()

    def _activate_what_is_written(self) -> None:
        """Activate SDXL's LoRAs without the one that the WebUI's settings add, which may be the base's.

        The WebUI would activate them right after this, with the addition; whether this job has any is the processing
        object's own flag, which says that it has none until `after_activation`.
        """
        p = self._p
        with plugins.no_added_network(), devices.autocast():
            extra_networks.activate(p, p.extra_network_data)
        p.disable_extra_networks = True
        self._scope.callback(self._allow_activation)
        self._forbidden = True

    def _allow_activation(self) -> None:
        if self._forbidden:
            self._forbidden = self._p.disable_extra_networks = False

    def _wrap_sample(self, request: Request, batch: Batch, sampler: Sampler) -> None:
        scope = self._scope.enter_context(ExitStack())
        scope.enter_context(wrapped(sampler, "sample", partial(self._sample, request, batch, sampler, scope)))

    def _sample(
        self,
        request: Request,
        batch: Batch,
        sampler: Sampler,
        scope: ExitStack,
        host: Callable[..., Tensor],
        p: StableDiffusionProcessingTxt2Img,
        x: Tensor,
        conditioning: Any,
        unconditional_conditioning: Any,
        steps: int | None = None,
        image_conditioning: Tensor | None = None,
    ) -> Any:
        """Latents of one batch: (images, 4, height / 8, width / 8), or pictures where stage 1 was interrupted."""
        # from here on, sampling from noise is the WebUI's own again
        scope.close()
        with self._ends_the_job(request, batch), self._token_merging(request):
            self._units.check_those_of_sdxl()
            call = SamplerCall(sampler, x, conditioning, unconditional_conditioning, image_conditioning)
            host_of_batch = WebUIHost(p, self._models, request, batch, self._units, call, self.detected_maps)
            samples = run(host_of_batch, self._plan(request, batch), self._models.recordings)
            self.base_pictures += host_of_batch.base_pictures
            return samples

    def _plan(self, request: Request, batch: Batch) -> Pass:
        may_be_found = request.coupling is not None and request.evaluations is not None
        plan = Pass(request.coupling, request.evaluations, request.sequential, request.may_record)
        if not may_be_found or not (request.sequential or request.may_record):
            return plan
        levels = [evaluation.sigma for evaluation in plan.base_evaluations]
        key = key_of(request.base, batch.base_p, request.settings, batch.networks, self._units, levels, self._p)
        return Pass(request.coupling, request.evaluations, request.sequential, request.may_record, key)

    # ---- manners

    def _wrap(self, owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
        self._scope.enter_context(wrapped(owner, name, wrapper))

    def _close(self, host: Callable[[], None]) -> None:
        self.end()
        host()

    @contextmanager
    def _ends_the_job(self, request: Request | None = None, batch: Batch | None = None) -> Iterator[None]:
        """What goes wrong inside leaves the WebUI as it was and ends the job with its message."""
        try:
            yield
        except XAdapterError as problem:
            self.end(keep_base=batch is None or not batch.networks)
            raise Refusal(problem) from problem
        except BaseException as error:
            # what its frames hold would fill the GPU while the models find their way back
            traceback.clear_frames(error.__traceback__)
            self.end(keep_base=False)
            if isinstance(error, MISSING_NAME) and (others := difference(running())):
                problem = XAdapterError(f"{error!r}; X-Adapter was not tried with {others}.")
                raise Refusal(problem) from error
            raise

    @contextmanager
    def _token_merging(self, request: Request) -> Iterator[None]:
        model: torch.nn.Module = request.base.model
        sd_models.apply_token_merging(model, self._p.get_token_merging_ratio())
        try:
            yield
        finally:
            sd_models.apply_token_merging(model, 0)


def _leave(sampler: Sampler) -> None:
    """Outside a batch the sampler is the WebUI's alone."""
