"""The WebUI's hooks, each handed over to the room that it concerns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import gradio as gr
from modules import script_callbacks, scripts
from modules.processing import Processed, StableDiffusionProcessing

from . import panel
from .network_cards import exchange_page
from .options import add_options
from .rest import add_routes

if TYPE_CHECKING:
    from .generation import Generation
    from .models import Models

ATTRIBUTE = "xadapter_generation"
"""Where a processing object keeps X-Adapter's part in its job."""


class XAdapter(scripts.Script):
    """X-Adapter in the txt2img tab."""

    section = "accordions"
    create_group = False

    def __init__(self) -> None:
        self._models: Models | None = None
        # by then every extension has registered its pages, in whichever order the WebUI asks them
        self.on_before_component(lambda _: exchange_page(), elem_id="txt2img_prompt")

    def title(self) -> str:
        return "X-Adapter"

    def show(self, is_img2img: bool) -> Any:
        return False if is_img2img else scripts.AlwaysVisible

    def ui(self, is_img2img: bool) -> list[gr.components.Component]:
        built = panel.build(self.elem_id)
        self.infotext_fields = built.paste_fields
        self.paste_field_names = []
        return built.controls

    def before_process(self, p: StableDiffusionProcessing, *values: Any) -> None:
        # exceptions are swallowed here, so that arguments are read in the job itself
        first = values[0] if values else None
        enabled = first.get("enabled", True) if isinstance(first, Mapping) else first
        upscaling = getattr(p, "txt2img_upscale", False)
        if enabled is None or enabled is False or upscaling:
            return
        # whoever leaves X-Adapter unticked does not wait for what it is made of
        from .generation import Generation
        from .models import Models

        self._models = self._models or Models()
        generation = Generation(p, self._models, lambda: panel.read_controls(values))
        earlier: Generation | None = getattr(p, ATTRIBUTE, None)
        if earlier is not None and earlier.is_attached:
            earlier.end()
        setattr(p, ATTRIBUTE, generation)
        generation.attach()

    def postprocess(self, p: StableDiffusionProcessing, processed: Processed, *values: Any) -> None:
        generation: Generation | None = getattr(p, ATTRIBUTE, None)
        if generation is None:
            return
        if generation.is_attached:
            # interrupted between two batches
            generation.end()
        shown = generation.base_pictures if generation.settings.return_base_image else []
        for place, picture in enumerate(shown):
            infotext = processed.infotexts[min(processed.index_of_first_image + place, len(processed.infotexts) - 1)]
            picture.info["parameters"] = infotext
            processed.images.append(picture)
            processed.infotexts.append(infotext)
        processed.images += generation.detected_maps


def register() -> None:
    """Tell the WebUI about the settings page and the routes."""
    script_callbacks.on_ui_settings(add_options)
    script_callbacks.on_app_started(add_routes)
