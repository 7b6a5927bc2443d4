"""X-Adapter's part in one job of the WebUI, between the WebUI's own methods.

The WebUI calls `init` of its processing object before anything is made, `parse_extra_network_prompts` for each batch,
and its sampler once for each batch, twice with Hires. fix. Each of them is called through ours while a job is under
way, and none is replaced: what goes wrong in there ends the job with its message, whereas the WebUI swallows what a
script's hook raises.
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from modules import sd_models, shared
from modules.processing import StableDiffusionProcessing
from modules.sd_samplers_common import Sampler
from PIL import Image
from torch import Tensor

from ... import __version__
from ...errors import XAdapterError
from ...infotext import BASE_SEED_KEY, write_infotext
from ...settings import Settings
from ...tried_versions import difference
from ...two_stage import Pass, run
from ...wrapping import copies_unwrapped, wrapped
from ..base import plugins
from ..base.base_infotext import BasePicture
from ..base.base_processing import GivenPicture, PromptCaches, given_picture, use_caches
from ..base.base_units import read_units
from ..base.models import Models, make_room_to_decode, upgraded_to_device
from ..plots.cells import is_one_of_several
from ..sampling import switch
from ..sampling.samplings import Sampling, Start
from ..sampling.seeded import nothing_drawn
from ..versions import running
from .batch import Batch, share_out
from .recording_key import key_of
from .refusal import Refusal
from .request import PlannedSampling, Request, counted, decide, plan, takes_residuals
from .webui_host import SamplerCall, WebUIHost

MISSING_NAME = (AttributeError, ImportError, KeyError, TypeError)
"""What a name that is no longer there, or is called otherwise, ends in."""


class Job:
    """From `before_process` until everything is as it was.

    Args:
        p: the WebUI's processing object.
        models: what is loaded.
        arguments: the arguments as the page or the REST object gave them; read when the job starts.
        is_inner: whether it is made in the midst of another one, which goes on with the models afterwards.
    """

    def __init__(
        self,
        p: StableDiffusionProcessing,
        models: Models,
        arguments: Callable[[], Mapping[str, Any]],
        is_inner: bool = False,
    ) -> None:
        self.base_pictures: list[BasePicture] = []
        self.detected_maps: list[Image.Image] = []
        """What the base's ControlNet units show beside the pictures."""
        self.settings = Settings()
        self._p = p
        self._models = models
        self._is_inner = is_inner
        self._units = read_units(p)
        self._scope = ExitStack()
        self._wrap_sampler: Callable[[Sampler], None] = _leave
        self._is_open = True
        self._caches: dict[Sampling, PromptCaches] = {}
        with ExitStack() as begun:
            begun.callback(self._scope.close)
            self._scope.enter_context(self._units.taken_out())
            # other extensions make pictures of their own with a copy, in the middle of the job
            self._scope.enter_context(copies_unwrapped(p))
            self._wrap(p, "init", partial(self._begin, arguments))
            # the WebUI closes its processing object whatever happens
            self._wrap(p, "close", self._close)
            # what went wrong before here has put everything back
            begun.pop_all()

    @property
    def p(self) -> StableDiffusionProcessing:
        """The WebUI's processing object."""
        return self._p

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
            if not self._is_inner:
                self._models.rest()

    def before_sampling(self) -> None:
        """The WebUI has a sampler and is about to call it. Raises nothing."""
        if self._is_open:
            self._wrap_sampler(self._p.sampler)

    # ---- between the WebUI's own methods

    def _begin(self, arguments: Callable[[], Mapping[str, Any]], host: Callable[..., None], *args: Any) -> None:
        """Before anything is made."""
        p = self._p
        with self._ends_the_job():
            with nothing_drawn():
                request = decide(p, self._models, self._units, arguments())
            self.settings = request.settings
            p.extra_generation_params.update(_infotext_of(request.settings))
            if request.sequential:
                self._scope.callback(upgraded_to_device, request.base)
            with counted(p, request), given_picture(p) as given:
                host(*args)
            self._wrap(p, "parse_extra_network_prompts", partial(self._share_out, request, given))
            # it is among the LoRAs of each batch, where it may be the base's
            self._scope.enter_context(plugins.no_added_network())

    def _share_out(self, request: Request, given: Sequence[GivenPicture], host: Callable[[], None]) -> None:
        """At the beginning of a batch."""
        p = self._p
        with self._ends_the_job():
            host()
            batches = share_out(p, request, given[0] if given else None)
            for sampling, batch in batches.items():
                use_caches(batch.base_p, self._caches.setdefault(sampling, PromptCaches()))
            self._wrap_sampler = partial(self._wrap_call, request, batches, given[0] if given else None)

    def _wrap_call(
        self, request: Request, batches: Mapping[Sampling, Batch], given: GivenPicture | None, sampler: Sampler
    ) -> None:
        """Let the sampler's next call go through ours, where the base has a part in it."""
        planned = request.planned(is_hires=getattr(self._p, "is_hr_pass", False))
        if planned is None:
            return
        scope = self._scope.enter_context(ExitStack())
        method = "sample_img2img" if planned.sampling.is_over_picture(self._p) else "sample"
        call = partial(self._sample, request, planned, batches[planned.sampling], given, sampler, scope)
        scope.enter_context(wrapped(sampler, method, call))

    def _sample(
        self,
        request: Request,
        planned: PlannedSampling,
        batch: Batch,
        given: GivenPicture | None,
        sampler: Sampler,
        scope: ExitStack,
        host: Callable[..., Tensor],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Latents of one batch: (images, 4, height / 8, width / 8), or pictures where stage 1 was interrupted."""
        # from here on, the sampler is the WebUI's own again
        scope.close()
        p = self._p
        call = SamplerCall(
            sampler, inspect.signature(host).bind(*args, **kwargs).arguments, partial(host, *args, **kwargs)
        )
        with self._ends_the_job(request, batch), self._token_merging(request, planned.sampling):
            self._units.check_those_of_sdxl()
            if planned.sampling.is_hires:
                planned = self._at_hires(request, planned)
                if planned.coupling is not None:
                    given = GivenPicture(tuple(switch.decode(shared.sd_model, call.arguments["x"])), None)
            if planned.sampling.start is Start.PICTURE and planned.coupling is None:
                return call.as_called()
            host_of_batch = WebUIHost(
                p, self._models, request, planned, batch, self._units, given, call, self.detected_maps
            )
            samples = run(host_of_batch, self._plan(request, planned, batch), self._models.recordings)
            self.base_pictures += host_of_batch.base_pictures
            make_room_to_decode(request.base, request.work.pixels)
            return samples

    def _at_hires(self, request: Request, planned: PlannedSampling) -> PlannedSampling:
        """The second pass of Hires. fix, which the WebUI may have loaded another checkpoint for."""
        unet = shared.sd_model.model.diffusion_model
        if planned.coupling is not None and not takes_residuals(self._p, request, unet):
            return replace(planned, coupling=None)
        return plan(self._p, request, planned.sampling)

    def _plan(self, request: Request, planned: PlannedSampling, batch: Batch) -> Pass:
        made = Pass(
            planned.coupling,
            planned.evaluations,
            planned.recorded,
            may_record=request.may_record(planned),
            use_cache=is_one_of_several(self._p),
            can_resume=not self._units.of_base,
        )
        # what SDXL made in a first pass is never made again in another job
        if planned.sampling.is_hires or not (made.recorded or made.may_record or made.use_cache):
            return made
        key = key_of(request.base, batch.base_p, request.settings, batch.networks, self._units, self._p)
        return replace(made, key=key)

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
    def _token_merging(self, request: Request, sampling: Sampling) -> Iterator[None]:
        model: torch.nn.Module = request.base.model
        sd_models.apply_token_merging(model, self._p.get_token_merging_ratio(for_hr=sampling.is_hires))
        try:
            yield
        finally:
            sd_models.apply_token_merging(model, 0)


def _infotext_of(settings: Settings) -> dict[str, str | Callable[..., str]]:
    """What is written under every image, in the forms in which the WebUI takes it."""
    written: dict[str, str | Callable[..., str]] = dict(write_infotext(settings, __version__))
    if BASE_SEED_KEY in written:
        written[BASE_SEED_KEY] = partial(_base_seed_text, settings)
    return written


def _base_seed_text(
    settings: Settings,
    /,
    p: StableDiffusionProcessing,
    all_seeds: Sequence[int],
    index: int,
    use_main_prompt: bool,
    **_: Any,
) -> str:
    """The base's own seed under an image; arguments are the variables of the WebUI's `create_infotext`."""
    first = p.all_seeds[0]
    # under a grid stands what is under the first image
    seed = first if use_main_prompt else all_seeds[index]
    return str(settings.of_image(seed, first).base_seed)


def _leave(sampler: Sampler) -> None:
    """Outside a batch the sampler is the WebUI's alone."""
