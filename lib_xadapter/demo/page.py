"""`demo --ui`: the demo on a page in the browser, on this machine alone, with the miniature models or one's own."""

from __future__ import annotations

import argparse
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import WrongArgument, XAdapterError
from ..file_names import MODEL_SUFFIXES
from ..headless.generate import choose_placement
from ..headless.generate_command import MOST_CONTROL, Files, check_folder
from ..headless.grid import save_picture
from ..headless.job import LARGEST_CFG, LARGEST_SEED
from ..headless.lora_names import Lora
from ..headless.named_files import FOLDERS, find_file
from ..headless.options import say
from ..miniature.finished import MiniatureModels
from ..settings import Settings, arguments
from .cells import (
    CFG_SCALE,
    NOTICE,
    ROWS,
    SIZE,
    STEPS,
    WEIGHTS,
    Cell,
    DemoModels,
    DemoRequest,
    cells_grid,
    make_cells,
)

try:
    import gradio
except ImportError as error:
    raise XAdapterError('demo --ui needs the package gradio (pip install ".[headless]").') from error

LARGEST_PORT = 65535
MOST_STEPS = 50
SIZES = (128, 1536)
SIZE_STEP = 64
LORA_WEIGHTS = (-2.0, 2.0)
UPGRADED, BASE, ADAPTER, LORA, CONTROLNET = "SDXL checkpoint", "SD1.5 checkpoint", "Adapter", "LoRA", "ControlNet"
KINDS = {UPGRADED: "checkpoint", BASE: "checkpoint", ADAPTER: "adapter", LORA: "lora", CONTROLNET: "controlnet"}
"""What is chosen → the kind of file that `named_files` finds."""
OPTIONS = {"--upgraded": UPGRADED, "--base": BASE, "--adapter": ADAPTER, "--lora": LORA, "--controlnet": CONTROLNET}
"""What errors of the command line call it."""


def open_page(options: argparse.Namespace) -> int:
    """Serve the page until Ctrl-C."""
    if options.port is not None and not 1 <= options.port <= LARGEST_PORT:
        raise WrongArgument(f"--port is {options.port}, expected a number from 1 to {LARGEST_PORT}.")
    if options.models_dir is not None and not options.models_dir.is_dir():
        raise WrongArgument(f"--models-dir: there is no folder {options.models_dir}.")
    check_folder(options.out)
    page = make_page(DemoModels.of_miniature(MiniatureModels()), options)
    try:
        _, address, _ = page.launch(
            server_name="127.0.0.1", server_port=options.port, prevent_thread_lock=True, quiet=True, share=False
        )
    except OSError as error:
        raise WrongArgument(f"--port: {error}.") from error
    say(f"The page is at {address} (Ctrl-C ends it).")
    try:
        page.block_thread()
    finally:
        page.close()
    return 0


class Stopped(Exception):
    """Somebody wants no more pictures."""


class Stops:
    """Which open pages want no more pictures, by gradio's names of their sessions."""

    def __init__(self) -> None:
        self._wanted: dict[str | None, threading.Event] = {}

    def of(self, request: gradio.Request | None) -> threading.Event:
        """Set while the page wants no more pictures."""
        return self._wanted.setdefault(request and request.session_hash, threading.Event())

    def leave(self, request: gradio.Request) -> None:
        """The page is closed."""
        self.of(request).set()
        del self._wanted[request.session_hash]


def make_page(own: DemoModels, options: argparse.Namespace) -> gradio.Blocks:
    """The controls on the left, the grid on the right."""
    stops = Stops()
    with gradio.Blocks(title="X-Adapter demo") as page:
        gradio.Markdown(f"# X-Adapter: SD1.5 plugins on SDXL\n{NOTICE}")
        with gradio.Row():
            with gradio.Column(scale=1):
                controls = _controls(own, options)
                with gradio.Row():
                    generate_button = gradio.Button("Generate", variant="primary", elem_id="generate")
                    stop_button = gradio.Button("Stop", variant="stop", elem_id="stop")
            with gradio.Column(scale=3):
                grid = gradio.Image(label="Pictures", type="pil", format="png", elem_id="grid", interactive=False)
                said = gradio.Markdown(elem_id="said")
        names = tuple(controls)

        def generate(request: gradio.Request | None, *values: Any) -> Iterator[tuple[Image.Image | None, str]]:
            stop = stops.of(request)
            stop.clear()
            chosen = dict(zip(names, values, strict=True))
            with _errors_on_the_page():
                models = read_models(chosen, own, options)
                yield from _pictures(models, read_request(chosen), stop, options.out / "grid.png")

        def stop(request: gradio.Request) -> None:
            stops.of(request).set()

        generate_button.click(generate, list(controls.values()), [grid, said])
        stop_button.click(stop, None, None, queue=False)
        page.unload(stops.leave)
    return page


def _controls(own: DemoModels, options: argparse.Namespace) -> dict[str, Any]:
    """By name, in their order on the page."""
    table = arguments()
    switch_point, weight, base_prompt = (table[name] for name in ("switch_point", "weight", "base_prompt"))
    names, files = [row.name for row in ROWS], own.files
    controls: dict[str, Any] = {
        "prompt": gradio.Textbox(DemoRequest().prompt, label="Prompt", elem_id="prompt"),
        "base_prompt": gradio.Textbox("", label=base_prompt.label, info=base_prompt.tooltip),
        "switch_point": gradio.Slider(
            switch_point.minimum,
            switch_point.maximum,
            Settings().switch_point,
            step=switch_point.step,
            label=switch_point.label,
            info=switch_point.tooltip,
        ),
        "weights": gradio.CheckboxGroup(
            [_label(value) for value in WEIGHTS],
            value=[_label(0.0), _label(1.0)],
            label=weight.label,
            info=weight.tooltip,
        ),
        "rows": gradio.CheckboxGroup(names, value=names, label="Plugins of the SD1.5 model", elem_id="rows"),
    }
    with gradio.Accordion("Models", open=False, elem_id="models"):
        gradio.Markdown("Choose a file, or type its path: single files as in the WebUI, or folders of diffusers.")
        for what, path in ((UPGRADED, files.upgraded), (BASE, files.base), (ADAPTER, files.adapter)):
            controls[what] = _choice(what, path, options.models_dir)
        controls[LORA] = _choice(LORA, files.loras[0].path, options.models_dir, multiselect=True)
        controls["lora_weight"] = gradio.Slider(*LORA_WEIGHTS, 1.0, step=0.05, label="LoRA weight")
        controls[CONTROLNET] = _choice(CONTROLNET, files.controlnets[0], options.models_dir)
    with gradio.Accordion("Control map", open=True, elem_id="control"):
        controls["control_image"] = gradio.Image(
            DemoRequest().map,
            label="Control map",
            type="pil",
            sources=["upload", "clipboard"],
            interactive=True,
            elem_id="map",
        )
        controls["control_scale"] = gradio.Slider(0, MOST_CONTROL, 1.0, step=0.05, label="Strength of the ControlNet")
    controls["size"] = gradio.Slider(
        *SIZES, SIZE, step=SIZE_STEP, label="Width and height", info="SDXL's own are 1024.", elem_id="size"
    )
    controls["steps"] = gradio.Slider(1, MOST_STEPS, STEPS, step=1, label="Steps", elem_id="steps")
    controls["cfg_scale"] = gradio.Slider(
        1, LARGEST_CFG, CFG_SCALE, step=0.5, label="CFG scale", info="The miniature models like 4, real ones 7."
    )
    controls["seed"] = gradio.Number(options.seed, precision=0, label="Seed", minimum=0, maximum=LARGEST_SEED)
    return controls


def _choice(what: str, own: Path, models_folder: Path | None, multiselect: bool = False) -> gradio.Dropdown:
    """The miniature model, those of the WebUI's folder, and whatever is typed."""
    choices = [(own.stem, str(own)), *((name, name) for name in _names(what, models_folder))]
    return gradio.Dropdown(
        choices,
        value=[str(own)] if multiselect else str(own),
        label=what,
        multiselect=multiselect,
        allow_custom_value=True,
        elem_id=f"choose-{what.split()[0].lower()}",
    )


def _names(what: str, models_folder: Path | None) -> list[str]:
    folders = [models_folder / name for name in FOLDERS[KINDS[what]]] if models_folder is not None else []
    found = [(path, folder) for folder in folders for path in sorted(folder.rglob("*"))]
    return [path.relative_to(folder).as_posix() for path, folder in found if path.suffix.lower() in MODEL_SUFFIXES]


def _label(weight: float) -> str:
    return f"{weight:g}"


def read_request(chosen: Mapping[str, Any]) -> DemoRequest:
    """What is to be made.

    Raises:
        WrongArgument: something is missing.
    """
    rows = tuple(row for row in ROWS if row.name in chosen["rows"])
    if not chosen["weights"] or not rows:
        raise WrongArgument("Tick at least one weight and one row of plugins.")
    if any(row.control for row in rows) and chosen["control_image"] is None:
        raise WrongArgument("The ControlNet needs a control map: choose a picture, or untick its row.")
    return DemoRequest(
        chosen["prompt"],
        chosen["base_prompt"],
        int(chosen["seed"] or 0),
        float(chosen["switch_point"]),
        tuple(sorted(map(float, chosen["weights"]))),
        int(chosen["steps"]),
        int(chosen["size"]),
        rows,
        chosen["control_image"],
        float(chosen["control_scale"]),
        float(chosen["cfg_scale"]),
    )


def read_models(chosen: Mapping[str, Any], own: DemoModels, options: argparse.Namespace) -> DemoModels:
    """The files that are chosen; miniature ones run where they are quickest, others on the GPU where there is one.

    Raises:
        XAdapterError: naming the choice whose file there is not.
    """

    def find(name: str, what: str) -> Path:
        return find_file(name, KINDS[what], options.models_dir, what)

    for what in (UPGRADED, BASE, ADAPTER, LORA, CONTROLNET):
        if not chosen[what] and (what in (UPGRADED, BASE, ADAPTER) or what in chosen["rows"]):
            raise WrongArgument(f"{what}: choose a file.")
    files = Files(
        base=find(chosen[BASE], BASE),
        upgraded=find(chosen[UPGRADED], UPGRADED),
        adapter=find(chosen[ADAPTER], ADAPTER),
        loras=tuple(Lora(find(name, LORA), float(chosen["lora_weight"])) for name in chosen[LORA] or ()),
        controlnets=(find(chosen[CONTROLNET], CONTROLNET),) if chosen[CONTROLNET] else (),
    )
    is_miniature = files.upgraded == own.files.upgraded
    if is_miniature != (files.base == own.files.base):
        raise WrongArgument("Choose both models of the miniature pair or neither: no other model has its vocabulary.")
    if is_miniature:
        weight = float(chosen["lora_weight"])
        native = own.native and replace(own.native, loras=tuple(Lora(lora.path, weight) for lora in own.native.loras))
        return DemoModels(files, own.tokenizer, native=native)
    return DemoModels(files, options.tokenizer, choose_placement(None, None, low_memory=False))


def _pictures(
    models: DemoModels, request: DemoRequest, stop: threading.Event, path: Path
) -> Iterator[tuple[Image.Image | None, str]]:
    """The grid so far and a line about it, after every picture."""
    wanted = len(request.rows) * (len(request.weights) + 1 + (models.native is not None))
    cells: list[Cell] = []

    def step(stage: str, done: int, total: int) -> None:
        if stop.is_set():
            raise Stopped

    yield None, "Loading the models …"
    try:
        for cell in make_cells(models, request, step):
            cells.append(cell)
            yield cells_grid(cells, request), f"{len(cells)} of {wanted} pictures"
    except Stopped:
        if not cells:
            yield None, "Stopped before the first picture."
            return
    grid = cells_grid(cells, request)
    save_picture(path, grid)
    many = f"{wanted} pictures" if len(cells) == wanted else f"Stopped: {len(cells)} of {wanted} pictures"
    yield grid, f"{many}, saved as {path}"


@contextmanager
def _errors_on_the_page() -> Iterator[None]:
    """What is wrong is told on the page, in its own words."""
    try:
        yield
    except XAdapterError as error:
        option, colon, rest = str(error).partition(": ")
        raise gradio.Error(f"{OPTIONS.get(option, option)}{colon}{rest}") from error
