"""A script that makes a picture of its own in the middle of a job, from a copy of the job, as other people's do."""

import copy
from typing import Any

import gradio as gr
from modules import processing, scripts
from PIL import Image

SEED = 123
WITHOUT_SCRIPTS, UNTICKED, TICKED = "without scripts", "unticked", "ticked"


class Inner(scripts.Script):
    """The pictures so made are shown after the job's own."""

    def __init__(self) -> None:
        self.made: list[Image.Image] = []

    def title(self) -> str:
        return "Inner"

    def show(self, is_img2img: bool) -> object:
        return scripts.AlwaysVisible

    def ui(self, is_img2img: bool) -> list[gr.components.Component]:
        return [gr.Textbox("", visible=False)]

    def postprocess_image(
        self, p: processing.StableDiffusionProcessing, shown: scripts.PostprocessImageArgs, kind: str | dict[str, Any]
    ) -> None:
        """`kind` is one of those above, or X-Adapter's arguments for the inner picture."""
        if not kind or getattr(p, "is_inner", False):
            return
        inner = copy.copy(p)
        inner.is_inner, inner.seed, inner.n_iter, inner.batch_size = True, SEED, 1, 1
        inner.extra_generation_params = {}
        if kind == WITHOUT_SCRIPTS:
            inner.scripts = None
        elif kind != TICKED:
            xadapter = next(script for script in p.scripts.alwayson_scripts if script.title() == "X-Adapter")
            arguments = list(p.script_args)
            arguments[xadapter.args_from] = False if kind == UNTICKED else kind
            inner.script_args = arguments
        self.made += processing.process_images(inner).images

    def postprocess(self, p: processing.StableDiffusionProcessing, processed: processing.Processed, kind: Any) -> None:
        if not getattr(p, "is_inner", False):
            processed.images += self.made
            self.made = []
