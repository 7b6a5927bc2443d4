"""The WebUI's hooks, each handed over to the room that it concerns."""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import gradio as gr
from modules import script_callbacks, scripts
from modules.processing import Processed, StableDiffusionProcessing, StableDiffusionProcessingImg2Img

from .ending import end_at_once
from .finished_picture import arguments_of_finished_picture
from .options import add_options
from .page import panel
from .page.network_cards import exchange_page
from .page.rest import add_routes
from .plots.axes import add_axes
from .plots.cells import is_one_of_several, own_infotext, with_cell
from .versions import warn_of_others

if TYPE_CHECKING:
    from .job.job import Job

ATTRIBUTE = "xadapter_job"
"""Where a processing object keeps X-Adapter's part in its job."""
MAKES_PICTURES = "process_images_inner"
"""The WebUI's function that makes a processing object's pictures."""


class XAdapter(scripts.Script):
    """X-Adapter in the txt2img or the img2img tab."""

    section = "accordions"
    create_group = False

    def __init__(self) -> None:
        self._jobs: list[Job] = []
        # by then every extension has registered its pages, in whichever order the WebUI asks them
        self.on_before_component(lambda _: exchange_page(), elem_id="txt2img_prompt")

    def title(self) -> str:
        return "X-Adapter"

    def show(self, is_img2img: bool) -> Any:
        return scripts.AlwaysVisible

    def ui(self, is_img2img: bool) -> list[gr.components.Component]:
        built = panel.build(self.elem_id, is_img2img)
        self.infotext_fields = built.paste_fields
        self.paste_field_names = built.sent_fields
        return built.controls

    def before_process(self, p: StableDiffusionProcessing, *values: Any) -> None:
        try:
            given, from_picture = with_cell(p, values), arguments_of_finished_picture(p)
            if is_enabled(given, from_picture):
                self._begin_job(p, given, from_picture)
        except Exception as error:
            # the WebUI would swallow it and make a picture without X-Adapter
            end_at_once(p, error)
            raise

    def _begin_job(self, p: StableDiffusionProcessing, given: Sequence[Any], from_picture: Mapping[str, Any]) -> None:
        # whoever leaves X-Adapter unticked does not wait for what it is made of
        from .base.models import loaded_models
        from .job.job import Job

        outer = jobs_under_way()
        self._end_others(outer)
        p.extra_generation_params = own_infotext(p)
        job = Job(p, loaded_models(), lambda: {**panel.read_controls(given), **from_picture}, is_inner=bool(outer))
        self._jobs.append(job)
        setattr(p, ATTRIBUTE, job)

    def _end_others(self, outer: Sequence[Job]) -> None:
        """End the jobs of scripts that never closed their processing objects."""
        for job in self._jobs:
            if job not in outer:
                job.end()
        self._jobs = [job for job in self._jobs if job in outer]

    def process_before_every_sampling(self, p: StableDiffusionProcessing, *values: Any, **tensors: Any) -> None:
        if job := _job_of(p):
            job.before_sampling()

    def postprocess(self, p: StableDiffusionProcessing, processed: Processed, *values: Any) -> None:
        job = _job_of(p)
        if job is None:
            return
        job.end()
        # it holds the processing object and its pictures, and nobody knows when the tab's next one comes
        self._jobs = [other for other in self._jobs if other is not job]
        if isinstance(p, StableDiffusionProcessingImg2Img) and is_one_of_several(p):
            # the tab's scripts put all that they are given together as one picture
            return
        _fill_texts(processed)
        for picture in job.base_pictures if job.settings.return_base_image else []:
            processed.images.append(picture.shown())
            processed.infotexts.append(picture.infotext)
        processed.images += job.detected_maps
        _fill_texts(processed)


def is_enabled(given: Sequence[Any], from_picture: Mapping[str, Any]) -> bool:
    """Whether a picture is to be made with X-Adapter.

    Whatever else is wrong with the arguments ends the job when that reads them.

    Args:
        given: what the page, the request or a plot's cell gives the script.
        from_picture: what a finished picture says, which goes before.
    """
    first = given[0] if given else False
    enabled = from_picture.get("enabled", first.get("enabled", True) if isinstance(first, Mapping) else first)
    return enabled is not None and enabled is not False


def _fill_texts(processed: Processed) -> None:
    """Give the first picture's text to what stands behind the last text, such as maps and masks.

    The WebUI finds a picture's text by the picture's place.
    """
    missing = len(processed.images) - len(processed.infotexts)
    processed.infotexts += [processed.infotexts[processed.index_of_first_image]] * missing


def _job_of(p: StableDiffusionProcessing) -> Job | None:
    job = getattr(p, ATTRIBUTE, None)
    # a copy of a processing object has the attribute, too
    return job if job is not None and job.p is p else None


def jobs_under_way() -> list[Job]:
    """Those whose pictures the WebUI is making further up the call stack, where somebody makes one in their midst."""
    frames = [frame for frame, _ in traceback.walk_stack(None) if frame.f_code.co_name == MAKES_PICTURES]
    found = [_job_of(frame.f_locals["p"]) for frame in frames if "p" in frame.f_locals]
    return [job for job in found if job is not None]


def register() -> None:
    """Tell the WebUI about the settings page, the routes and the axes of the X/Y/Z plot."""
    script_callbacks.on_before_ui(add_axes)
    script_callbacks.on_ui_settings(add_options)
    script_callbacks.on_app_started(add_routes)
    script_callbacks.on_app_started(lambda *_: warn_of_others())
