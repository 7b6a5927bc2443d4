"""With trained weights the WebUI's own picture keeps the base's plugins: more than SDEdit does, over many seeds.

The finished models of the miniature world, ControlNets for edges and LoRAs of the base, in every tab and pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy
import pytest
from PIL import Image

from . import units
from .asking import TITLE, made
from .server import Answer, WebUIServer, encode_image

pytest.importorskip("diffusers", reason="needs the extra 'headless'")
pytest.importorskip("cv2", reason="needs the extra 'evaluate'")
pytest.importorskip("skimage", reason="needs the extra 'evaluate'")

from lib_xadapter.evaluation.figures.clip import Clip, similarity
from lib_xadapter.evaluation.figures.condition import edge_f1
from lib_xadapter.evaluation.intervals import MeanOverCaptions, compare
from lib_xadapter.evaluation.maps import canny
from lib_xadapter.miniature.captions import caption_of, facts_of
from lib_xadapter.miniature.drawing import BASE_SIZE, UPGRADED_SIZE, base_picture, upgraded_picture
from lib_xadapter.miniature.finished import MiniatureModels
from lib_xadapter.miniature.model_files import BASE, UPGRADED
from lib_xadapter.miniature.scenes import Scene, scene_of
from lib_xadapter.miniature.styles import styled_picture
from lib_xadapter.miniature.webui_files import write_for_webui
from lib_xadapter.miniature.worlds import HELD_OUT

SEEDS = range(30)
"""One scene each."""
NARROW_CONTROLNETS = Path(__file__).parent / "narrow_controlnets"
MODELS = MiniatureModels()
Part = tuple[int, int, int, int]
WHOLE: Part = (0, 0, UPGRADED_SIZE, UPGRADED_SIZE)
LEFT: Part = (0, 0, UPGRADED_SIZE * 2 // 3, UPGRADED_SIZE)
"""What is painted anew in a given picture: two thirds."""


@pytest.fixture(scope="module")
def server(tmp_path_factory, start_webui) -> Iterator[WebUIServer]:
    folder = tmp_path_factory.mktemp("miniature-trained")
    write_for_webui(MODELS.folder, folder)
    extensions = {"more_extensions": [units.extension(), NARROW_CONTROLNETS]}
    options = {"sd_model_checkpoint": UPGRADED}
    with start_webui("miniature-condition", models=[folder], options=options, **extensions) as started:
        yield started


def scene(seed: int) -> Scene:
    return scene_of(HELD_OUT + seed)


def edges(seed: int) -> Image.Image:
    """The map that the ControlNet is given."""
    return canny(Image.fromarray(base_picture(scene(seed), BASE_SIZE)))


def another_picture(seed: int) -> Image.Image:
    """What is painted over: of another scene, as SDXL's world shows it."""
    return Image.fromarray(upgraded_picture(scene(seed + len(SEEDS)), UPGRADED_SIZE))


@dataclass(frozen=True)
class Plugin:
    """What the base has and SDXL has not, and how much of it a picture keeps.

    Attributes:
        given: X-Adapter's arguments.
        kept: a picture, the scene's seed and the part that counts → a number, more is better.
        in_prompt: what the prompt says of it.
        has_map: whether ControlNet is given the scene's edges.
    """

    given: Mapping[str, Any]
    kept: Callable[[Image.Image, int, Part], float]
    in_prompt: str = ""
    has_map: bool = False

    def request(self, seed: int, given: Mapping[str, Any]) -> dict[str, Any]:
        chosen = {"base_checkpoint": BASE, "adapter": "miniature.safetensors", **given}
        scripts: dict[str, Any] = {TITLE: {"args": [chosen]}}
        if self.has_map:
            picture = encode_image(edges(seed))
            unit = {"enabled": True, "module": "none", "model": "miniature-edges", "image": picture}
            scripts["ControlNet"] = {"args": [unit]}
        return {
            "prompt": caption_of(facts_of(scene(seed))) + self.in_prompt,
            "width": UPGRADED_SIZE,
            "height": UPGRADED_SIZE,
            "steps": 15,
            "sampler_name": "DPM++ 2M",
            "cfg_scale": 4,
            "seed": seed,
            "alwayson_scripts": scripts,
        }


def edges_kept(picture: Image.Image, seed: int, part: Part) -> float:
    """F1 of the edges at the base's size."""
    left, top, right, bottom = (side * BASE_SIZE // UPGRADED_SIZE for side in part)
    found = canny(picture.resize((BASE_SIZE, BASE_SIZE), Image.Resampling.LANCZOS))
    return edge_f1(found.crop((left, top, right, bottom)), edges(seed).crop((left, top, right, bottom)))


@cache
def clip() -> Clip:
    return Clip(MODELS.clip, "cpu")


def lines_kept(picture: Image.Image, seed: int, part: Part) -> float:
    """How like a line drawing of the scene it is, to CLIP."""
    drawing = Image.fromarray(styled_picture(base_picture(scene(seed), UPGRADED_SIZE), scene(seed), "lines"))
    pair = [one.resize(drawing.size, Image.Resampling.LANCZOS).crop(part) for one in (picture, drawing)]
    found, wanted = clip().of_pictures(pair)
    return float(similarity(found[None], wanted[None])[0])


SDEDIT = {"weight": 0}
CONTROLNET, LORA = "ControlNet", "LoRA"
PLUGINS = {
    CONTROLNET: Plugin({"weight": 1}, edges_kept, has_map=True),
    "ControlNet, plain unconds": Plugin({"weight": 1, "uncond_weight": 0}, edges_kept, has_map=True),
    LORA: Plugin({"weight": 2, "uncond_weight": 0}, lines_kept, " <lora:miniature-lines:1>"),
}


def in_txt2img(server: WebUIServer, seed: int, request: dict[str, Any]) -> Answer:
    return server.txt2img(**request)


def enlarged(server: WebUIServer, seed: int, request: dict[str, Any]) -> Answer:
    hires = {"enable_hr": True, "hr_scale": 1.25, "hr_upscaler": "Latent", "denoising_strength": 0.6}
    return server.txt2img(**request, **hires)


def over_another_picture(server: WebUIServer, seed: int, request: dict[str, Any]) -> Answer:
    return server.img2img(another_picture(seed), **request, denoising_strength=0.8)


def painted_in(server: WebUIServer, seed: int, request: dict[str, Any]) -> Answer:
    mask = Image.new("L", (UPGRADED_SIZE, UPGRADED_SIZE), 0)
    mask.paste(255, LEFT)
    painted = {"mask": mask, "inpainting_fill": 2, "inpaint_full_res": False, "mask_blur": 0}
    return server.img2img(another_picture(seed), **request, **painted, denoising_strength=1.0)


TABS = {
    "txt2img": (in_txt2img, WHOLE),
    "Hires. fix": (enlarged, WHOLE),
    "img2img": (over_another_picture, WHOLE),
    "inpainting": (painted_in, LEFT),
}
"""What asks for a picture, and the part of it that is made."""
CASES = [*((name, tab) for name in (CONTROLNET, LORA) for tab in TABS), ("ControlNet, plain unconds", "txt2img")]


@pytest.mark.parametrize(("name", "tab"), CASES)
def test_more_of_it_is_kept_than_by_sdedit(server, name, tab, record_property):
    plugin, (ask, part) = PLUGINS[name], TABS[tab]
    kept: dict[str, list[float]] = {"X-Adapter": [], "SDEdit": []}
    for seed in SEEDS:
        for way, given in (("X-Adapter", plugin.given), ("SDEdit", SDEDIT)):
            picture = made(ask(server, seed, plugin.request(seed, given))).images[0].convert("RGB")
            kept[way].append(plugin.kept(picture, seed, part))
    (found,) = compare({way: MeanOverCaptions(numpy.array(one)) for way, one in kept.items()}, len(SEEDS)).differences
    record_property("kept", {way: round(float(numpy.mean(one)), 3) for way, one in kept.items()})
    record_property("difference", found.estimate)
    assert found.estimate.low > 0
