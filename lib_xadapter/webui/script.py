"""The WebUI's hooks, each handed over to the room that it concerns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import gradio as gr
from modules import script_callbacks, scripts
from modules.processing import Processed, StableDiffusionProcessing

from .finished_picture import told_by_finished_picture
from .options import add_options
from .page import panel
from .page.network_cards import exchange_page
from .page.rest import add_routes
from .versions import warn_of_others

if TYPE_CHECKING:
    from .job.job import Job

ATTRIBUTE = "xadapter_job"
"""Where a processing object keeps X-Adapter's part in its job."""


class XAdapter(scripts.Script):
    """X-Adapter in the txt2img or the img2img tab."""

    section = "accordions"
    create_group = False

    def __init__(self) -> None:
        self._job: Job | None = None
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
        # exceptions are swallowed here, so that arguments are read in the job itself
        first, told = values[0] if values else None, told_by_finished_picture(p)
        enabled = told.get("enabled", first.get("enabled", True) if isinstance(first, Mapping) else first)
        if enabled is None or enabled is False:
            return
        # whoever leaves X-Adapter unticked does not wait for what it is made of
        from .base.models import loaded_models
        from .job.job import Job

        # a job of a script that never closed its processing object
        self._end_earlier_job()
        self._job = Job(p, loaded_models(), lambda: {**panel.read_controls(values), **told})
        setattr(p, ATTRIBUTE, self._job)

    def _end_earlier_job(self) -> None:
        if self._job is not None:
            self._job.end()

    def process_before_every_sampling(self, p: StableDiffusionProcessing, *values: Any, **tensors: Any) -> None:
        if job := _job_of(p):
            job.before_sampling()

    def postprocess(self, p: StableDiffusionProcessing, processed: Processed, *values: Any) -> None:
        job = _job_of(p)
        if job is None:
            return
        job.end()
        shown = job.base_pictures if job.settings.return_base_image else []
        for picture in shown:
            processed.images.append(picture)
            processed.infotexts.append(picture.info["parameters"])
        processed.images += job.detected_maps


def _job_of(p: StableDiffusionProcessing) -> Job | None:
    return getattr(p, ATTRIBUTE, None)


def register() -> None:
    """Tell the WebUI about the settings page and the routes."""
    script_callbacks.on_ui_settings(add_options)
    script_callbacks.on_app_started(add_routes)
    script_callbacks.on_app_started(lambda *_: warn_of_others())
