"""`demo --ui`: the demo on a page in the browser, on this machine alone."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from PIL import Image

from ..errors import WrongArgument, XAdapterError
from ..settings import arguments
from .demo import NOTICE, PROMPT, ROWS, STEPS, WEIGHTS, DemoRequest, cells_grid, default_cache, make_cells
from .grid import save_picture
from .options import say
from .small_models import SmallModels, make_small_models

try:
    import gradio
except ImportError as error:
    raise XAdapterError('demo --ui needs the package gradio (pip install ".[headless]").') from error

LARGEST_PORT = 65535
MOST_STEPS = 20


def open_page(options: argparse.Namespace) -> int:
    """Serve the page until Ctrl-C."""
    if options.port is not None and not 1 <= options.port <= LARGEST_PORT:
        raise WrongArgument(f"--port is {options.port}, expected a number from 1 to {LARGEST_PORT}.")
    small = make_small_models(options.cache or default_cache())
    page = make_page(small, options)
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


def make_page(small: SmallModels, options: argparse.Namespace) -> gradio.Blocks:
    """The controls on the left, the grid on the right."""
    table = arguments()
    with gradio.Blocks(title="X-Adapter demo") as page:
        gradio.Markdown(f"# X-Adapter: SD1.5 plugins on SDXL\n{NOTICE}")
        with gradio.Row():
            with gradio.Column(scale=1):
                prompt = gradio.Textbox(PROMPT, label="Prompt", elem_id="prompt")
                row = table["switch_point"]
                switch_point = gradio.Slider(
                    row.minimum, row.maximum, 0.8, step=row.step, label=row.label, info=row.tooltip
                )
                weights = gradio.CheckboxGroup(
                    [_label(weight) for weight in WEIGHTS],
                    value=[_label(0.0), _label(1.0)],
                    label=table["weight"].label,
                    info=table["weight"].tooltip,
                )
                plugins = gradio.CheckboxGroup(
                    [row.name for row in ROWS], value=[row.name for row in ROWS], label="Plugins of the SD1.5 model"
                )
                steps = gradio.Slider(1, MOST_STEPS, STEPS, step=1, label="Steps")
                seed = gradio.Number(options.seed, precision=0, label="Seed")
                button = gradio.Button("Generate", variant="primary", elem_id="generate")
            with gradio.Column(scale=3):
                grid = gradio.Image(label="Pictures", type="pil", format="png", elem_id="grid", interactive=False)
                said = gradio.Markdown(elem_id="said")

        def generate(*values: Any) -> Iterator[tuple[Image.Image, str]]:
            request = _read(*values)
            cells = []
            wanted = len(request.rows) * (len(request.weights) + 1)
            for cell in make_cells(small, request):
                cells.append(cell)
                yield cells_grid(cells), f"{len(cells)} of {wanted} pictures"
            path = save_picture(options.out / "grid.png", cells_grid(cells))
            yield cells_grid(cells), f"{wanted} pictures, saved as {path}"

        button.click(generate, [prompt, switch_point, weights, plugins, steps, seed], [grid, said])
    return page


def _label(weight: float) -> str:
    return f"{weight:g}"


def _read(
    prompt: str, switch_point: float, weights: list[str], plugins: list[str], steps: int, seed: int | None
) -> DemoRequest:
    if not weights or not plugins:
        raise gradio.Error("Tick at least one weight and one row of plugins.")
    return DemoRequest(
        prompt,
        int(seed or 0),
        switch_point,
        tuple(sorted(map(float, weights))),
        int(steps),
        tuple(row for row in ROWS if row.name in plugins),
    )
