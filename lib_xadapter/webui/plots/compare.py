"""The script "X-Adapter: compare": the same seed by each model alone, with the adapter and without it, in one grid."""

from __future__ import annotations

import copy
import csv
import re
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import gradio as gr
from modules import extra_networks, images, processing, scripts, shared
from modules.processing import Processed, StableDiffusionProcessing
from PIL import Image

from ...errors import XAdapterError
from ...families import FAMILY_NAMES
from .. import model_files
from ..base import plugins
from ..job.refusal import Refusal
from ..script import ATTRIBUTE
from .axes import NO_ADAPTER, read_weights
from .cells import set_arguments

TITLE = "X-Adapter: compare"
MOST_SEEDS = 16
FILE_NAME = "xadapter_compare"

Weight = float | tuple[float, ...]


@dataclass(frozen=True)
class Made:
    """A picture of the grid, and what stands under it."""

    picture: Image.Image
    infotext: str


@dataclass
class Row:
    """The pictures of one seed; those that the user did not wait for are missing.

    Attributes:
        processed: what the WebUI gave for each of them.
    """

    base: Made | None = None
    carried_over: Made | None = None
    adapted: list[Made] = field(default_factory=list)
    alone: Made | None = None
    processed: list[Processed] = field(default_factory=list)


class XAdapterCompare(scripts.Script):
    """SD1.5 alone · SD1.5 → SDXL without the adapter · X-Adapter · SDXL alone."""

    def title(self) -> str:
        return TITLE

    def show(self, is_img2img: bool) -> bool:
        return not is_img2img

    def ui(self, is_img2img: bool) -> list[gr.components.Component]:
        with gr.Row():
            seeds = gr.Slider(
                label="Seeds, a row each", minimum=1, maximum=MOST_SEEDS, step=1, value=1, elem_id=self.elem_id("seeds")
            )
            weights = gr.Textbox(
                label="Weights, a column each",
                placeholder='empty: as set in X-Adapter. Several: 0.5, 1, "1,0.5,0"',
                elem_id=self.elem_id("weights"),
            )
        self.infotext_fields = [(seeds, "Compared seeds"), (weights, "Compared weights")]
        return [seeds, weights]

    def run(self, p: StableDiffusionProcessing, seeds: int, weights: str) -> Processed:
        comparison = Comparison(p, read_list(weights))
        rows = comparison.rows(int(seeds))
        made = [row for row in rows if row.processed]
        if not made:
            return Processed(p, [], p.seed, "")
        notes = {"Script": TITLE, "Compared seeds": int(seeds), "Compared weights": weights.strip() or None}
        return comparison.result(rows, {key: value for key, value in notes.items() if value is not None})


def read_list(text: str) -> list[Weight]:
    """Weights with commas between them; one that has three of its own stands in quotes.

    Raises:
        Refusal: one of them is no weight.
    """
    try:
        return [read_weights(part) for row in csv.reader([text], skipinitialspace=True) for part in row if part.strip()]
    except XAdapterError as problem:
        raise Refusal(problem) from problem


class Comparison:
    """Makes the cells of the grid, row by row.

    Args:
        p: the WebUI's processing object, never processed itself.
        weights: a column each; empty for the one that X-Adapter's own controls say.
    """

    def __init__(self, p: StableDiffusionProcessing, weights: Sequence[Weight]) -> None:
        self._p = p
        self._weighted: list[Mapping[str, Any]] = [{"weight": weight} for weight in weights] or [{}]
        self._weights = weights
        self._family = ""
        self._first: StableDiffusionProcessing | None = None

    def rows(self, count: int) -> list[Row]:
        """A row for each seed, the processing object's own and those that follow it."""
        processing.fix_seed(self._p)
        shared.state.job_count = count * (len(self._weighted) + 2)
        return [self._row(place) for place in range(count)]

    def _row(self, place: int) -> Row:
        row = Row()
        # what the base makes for the first of them is what the others find
        for given in self._weighted:
            if made := self._cell(row, place, **given, enabled=True):
                row.adapted.append(made)
        row.carried_over = self._cell(
            row, place, enabled=True, adapter=NO_ADAPTER, single_stage=False, return_base_image=True
        )
        row.alone = self._cell(row, place, enabled=False)
        return row

    def _cell(self, row: Row, place: int, **given: Any) -> Made | None:
        if shared.state.interrupted or shared.state.stopping_generation:
            return None
        with closing(self._processing(place, given)) as p:
            processed = processing.process_images(p)
            if not processed.images:
                return None
            self._first = self._first or p
            job = getattr(p, ATTRIBUTE, None) if given["enabled"] else None
            if job is not None:
                name = job.settings.base_checkpoint
                self._family = self._family or FAMILY_NAMES[model_files.expected_base_family(name)]
                if given.get("return_base_image") and job.base_pictures:
                    row.base = Made(job.base_pictures[0].shown(), job.base_pictures[0].infotext)
            row.processed.append(processed)
            first = processed.index_of_first_image
            return Made(processed.images[first], processed.infotexts[first])

    def _processing(self, place: int, given: Mapping[str, Any]) -> StableDiffusionProcessing:
        p = copy.copy(self._p)
        p.styles, p.override_settings = list(p.styles), dict(p.override_settings)
        p.extra_generation_params = dict(p.extra_generation_params)
        p.seed, p.subseed = p.seed + place, p.subseed + place
        p.n_iter = p.batch_size = 1
        p.do_not_save_grid = True
        if not given["enabled"]:
            p.prompt = without_base_loras(p.prompt)
        set_arguments(p, **given)
        return p

    def result(self, rows: Sequence[Row], notes: Mapping[str, Any]) -> Processed:
        """The grid, then every picture that was made, each with its own infotext."""
        p = self._first
        p.extra_generation_params = {**p.extra_generation_params, **notes}
        infotext = processing.create_infotext(p, p.all_prompts, p.all_seeds, p.all_subseeds, index=0)
        grid = self._grid(rows)
        if shared.opts.grid_save and not self._p.do_not_save_grid:
            images.save_image(
                grid,
                self._p.outpath_grids,
                FILE_NAME,
                p.all_seeds[0],
                p.all_prompts[0],
                shared.opts.grid_format,
                info=infotext,
                short_filename=not shared.opts.grid_extended_filename,
                p=p,
                grid=True,
            )
        pictures = [(row, made) for row in rows for made in _in_order(row) if made is not None]
        result = copy.copy(rows[0].processed[0])
        result.images = [grid, *(made.picture for _, made in pictures)]
        result.infotexts = [infotext, *(made.infotext for _, made in pictures)]
        result.info, result.index_of_first_image = infotext, 1
        for name in ("all_prompts", "all_negative_prompts", "all_seeds", "all_subseeds"):
            setattr(result, name, [getattr(row.processed[0], name)[0] for row, _ in pictures])
        return result

    def _grid(self, rows: Sequence[Row]) -> Image.Image:
        p = self._first
        blank = Image.new("RGB", (p.width, p.height), shared.opts.grid_background_color)
        cells = [self._enlarged(made.picture) if made else blank for row in rows for made in self._padded(row)]
        width, height = (max(sides) for sides in zip(*(cell.size for cell in cells), strict=True))
        grid = images.image_grid(cells, rows=len(rows))
        across = [[images.GridAnnotation(label)] for label in self._labels()]
        seeds = [f"Seed: {self._p.seed + place}" if len(rows) > 1 else "" for place in range(len(rows))]
        return images.draw_grid_annotations(
            grid, width, height, across, [[images.GridAnnotation(seed)] for seed in seeds]
        )

    def _padded(self, row: Row) -> list[Made | None]:
        missing = [None] * (len(self._weighted) - len(row.adapted))
        return [row.base, row.carried_over, *row.adapted, *missing, row.alone]

    def _enlarged(self, picture: Image.Image) -> Image.Image:
        """The base's picture is smaller than SDXL's."""
        size = self._first.width, self._first.height
        return picture if picture.width >= size[0] else images.resize_image(0, picture, *size)

    def _labels(self) -> list[str]:
        base = self._family or "Base"
        weights = [f"X-Adapter, weight {_written(weight)}" for weight in self._weights] or ["X-Adapter"]
        return [f"{base} alone", f"{base} to SDXL without the adapter (SDEdit + SDXL)", *weights, "SDXL alone"]


def without_base_loras(prompt: str) -> str:
    """A prompt without the LoRAs that are the base's alone: the WebUI would try them on SDXL."""

    def kept(tag: re.Match) -> str:
        given = extra_networks.ExtraNetworkParams(items=tag.group(2).split(":"))
        is_base_only = tag.group(1) in plugins.LORA_TAGS and plugins.UPGRADED not in plugins.models_of(given)
        return "" if is_base_only else tag.group(0)

    return re.sub(extra_networks.re_extra_net, kept, prompt)


def _in_order(row: Row) -> list[Made | None]:
    return [row.base, row.carried_over, *row.adapted, row.alone]


def _written(weight: Weight) -> str:
    return " ".join(f"{number:g}" for number in (weight if isinstance(weight, tuple) else (weight,)))
