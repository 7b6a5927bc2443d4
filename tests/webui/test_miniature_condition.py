"""With trained weights the WebUI's own picture keeps the base's plugins: more than SDEdit does, over many seeds.

The finished models of the miniature world, ControlNets for edges and LoRAs of the base, in every tab and pass.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
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
from lib_xadapter.evaluation.intervals import Estimate, MeanOverCaptions, compare
from lib_xadapter.evaluation.maps import canny
from lib_xadapter.miniature.captions import caption_of, facts_of
from lib_xadapter.miniature.drawing import BASE_SIZE, UPGRADED_SIZE, base_picture, upgraded_picture
from lib_xadapter.miniature.finished import MiniatureModels
from lib_xadapter.miniature.model_files import BASE, UPGRADED
from lib_xadapter.miniature.scenes import Scene, scene_of
from lib_xadapter.miniature.webui_files import write_for_webui
from lib_xadapter.miniature.worlds import HELD_OUT

SEEDS = range(int(os.environ.get("MINIATURE_SEEDS", "30")))
"""One scene each."""
NARROW_CONTROLNETS = Path(__file__).parent / "narrow_controlnets"
MODELS = MiniatureModels()
SDEDIT, RECIPE, AMPLIFIED = {"weight": 0}, {"weight": 1}, {"weight": 1, "uncond_weight": 0}
FIRMLY = {"weight": 2, "uncond_weight": 0}
PART = (0, 0, UPGRADED_SIZE * 2 // 3, UPGRADED_SIZE)
"""What is painted anew in a given picture: its left two thirds."""


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


def drawn(picture: Callable[..., Any], seed: int, size: int) -> Image.Image:
    return Image.fromarray(picture(scene(seed), size))


def edges(seed: int) -> Image.Image:
    """The map that the ControlNet is given."""
    return canny(drawn(base_picture, seed, BASE_SIZE))


def request(seed: int, **more: Any) -> dict[str, Any]:
    size = {"width": UPGRADED_SIZE, "height": UPGRADED_SIZE}
    prompt = {"prompt": caption_of(facts_of(scene(seed))), "negative_prompt": "", "seed": seed, "cfg_scale": 4}
    return {**prompt, **size, "steps": 15, "sampler_name": "DPM++ 2M", "do_not_save_grid": True, **more}


def scripts(given: Mapping[str, Any], control: Image.Image | None = None) -> dict[str, Any]:
    chosen = {"base_checkpoint": BASE, "adapter": "miniature.safetensors", **given}
    found: dict[str, Any] = {TITLE: {"args": [chosen]}}
    if control is not None:
        unit = {"enabled": True, "module": "none", "model": "miniature-edges", "image": encode_image(control)}
        found["ControlNet"] = {"args": [unit]}
    return {"alwayson_scripts": found}


def in_txt2img(server: WebUIServer, seed: int, asked: dict[str, Any]) -> Answer:
    return server.txt2img(**request(seed), **asked)


def enlarged(server: WebUIServer, seed: int, asked: dict[str, Any]) -> Answer:
    hires = {"enable_hr": True, "hr_scale": 1.25, "hr_upscaler": "Latent", "denoising_strength": 0.6}
    return server.txt2img(**request(seed), **asked, **hires)


def over_another_picture(server: WebUIServer, seed: int, asked: dict[str, Any]) -> Answer:
    given = drawn(upgraded_picture, seed + len(SEEDS), UPGRADED_SIZE)
    return server.img2img(given, **request(seed), **asked, denoising_strength=0.8)


def painted_in(server: WebUIServer, seed: int, asked: dict[str, Any]) -> Answer:
    given = drawn(upgraded_picture, seed + len(SEEDS), UPGRADED_SIZE)
    mask = Image.new("L", given.size, 0)
    mask.paste(255, PART)
    painted = {"mask": mask, "inpainting_fill": 2, "inpaint_full_res": False, "mask_blur": 0}
    return server.img2img(given, **request(seed), **asked, **painted, denoising_strength=1.0)


TABS = {
    "txt2img": in_txt2img,
    "Hires. fix": enlarged,
    "img2img": over_another_picture,
    "inpainting": painted_in,
}


def final(answer: Answer) -> Image.Image:
    return made(answer).images[0].convert("RGB")


def kept(picture: Image.Image, seed: int, tab: str) -> float:
    """F1 of its edges, where it was painted."""
    part = tuple(side * BASE_SIZE // UPGRADED_SIZE for side in PART) if tab == "inpainting" else None
    found = canny(picture.resize((BASE_SIZE, BASE_SIZE), Image.Resampling.LANCZOS))
    return edge_f1(found.crop(part), edges(seed).crop(part))


def difference(values: Mapping[str, list[float]]) -> Estimate:
    """Of the first way less the second, on the same seeds."""
    statistics = {way: MeanOverCaptions(numpy.array(found)) for way, found in values.items()}
    (found,) = compare(statistics, len(SEEDS)).differences
    return found.estimate


@pytest.mark.parametrize(
    ("tab", "given"),
    [*((tab, RECIPE) for tab in TABS), ("txt2img", AMPLIFIED)],
    ids=[*TABS, "txt2img with plain unconds"],
)
def test_more_of_the_edges_is_kept_than_by_sdedit(server, tab, given, record_property):
    values: dict[str, list[float]] = {"X-Adapter": [], "SDEdit": []}
    for seed in SEEDS:
        for way, arguments in (("X-Adapter", given), ("SDEdit", SDEDIT)):
            picture = final(TABS[tab](server, seed, scripts(arguments, edges(seed))))
            values[way].append(kept(picture, seed, tab))
    record_property("F1", {way: float(numpy.mean(found)) for way, found in values.items()})
    record_property("difference", difference(values))
    assert difference(values).low > 0


def test_more_of_a_lora_is_kept_than_by_sdedit(server, record_property):
    """The picture is more like the base's, to CLIP."""
    clip = Clip(MODELS.clip, "cpu")
    values: dict[str, list[float]] = {"X-Adapter": [], "SDEdit": []}
    for seed in SEEDS:
        told = {"prompt": f"{caption_of(facts_of(scene(seed)))} <lora:miniature-lines:1>"}
        for way, arguments in (("X-Adapter", FIRMLY), ("SDEdit", SDEDIT)):
            answer = made(server.txt2img(**request(seed, **told), **scripts({**arguments, "return_base_image": True})))
            picture, base = clip.of_pictures([image.convert("RGB") for image in answer.images])
            values[way].append(float(similarity(picture[None], base[None])[0]))
    record_property("similarity", {way: float(numpy.mean(found)) for way, found in values.items()})
    record_property("difference", difference(values))
    assert difference(values).low > 0
