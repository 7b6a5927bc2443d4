"""The diffusers host makes what the real WebUI makes: same files, prompt, seed, steps and sampler, same latents.

Relative errors in float32 on the CPU; the WebUI here runs on PyTorch 2.1, the diffusers host on what is current.
"""

from __future__ import annotations

import base64
import dataclasses
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from tests.pictures import grey_levels_apart

from .asking import arguments, made
from .server import WebUIServer

os.environ["HF_HUB_OFFLINE"] = "1"
pytest.importorskip("diffusers", reason="needs the extra 'headless'")

from lib_xadapter import load_adapter
from lib_xadapter.headless.grid import save_picture
from lib_xadapter.headless.job import Job
from lib_xadapter.headless.jobs import make_pictures, request_of
from lib_xadapter.headless.lora_names import Lora
from lib_xadapter.headless.loras import merge_lora
from lib_xadapter.headless.model_files import load_base, load_upgraded
from lib_xadapter.headless.models import Models
from lib_xadapter.headless.pictures import Painted
from lib_xadapter.headless.pipeline import TwoStages
from lib_xadapter.headless.sampler_table import sampler_named
from lib_xadapter.settings import Settings
from tests.pictures import control_map

TOLERANCE = 1e-3
JOB = Job(
    prompt="a (cat:1.3) on a mat",
    negative_prompt="blurred",
    settings=Settings(switch_point=0.8, weight=1.0),
    width=256,
    height=256,
    steps=8,
    sampler="DPM++ 2M",
    seed=7,
)


@dataclass(frozen=True)
class Latents:
    """What to compare, stage by stage.

    Attributes:
        base: the base's finished latents, None for a single stage.
        start: the upgraded model's at the first step of the joint stage, scaled as its UNet takes them.
        finished: the upgraded model's finished latents.
    """

    base: Tensor | None
    start: Tensor
    finished: Tensor


@dataclass(frozen=True)
class Files:
    """The small checkpoints that the WebUI runs on."""

    folder: Path

    def models(self, *loras: Lora) -> Models:
        checkpoints, tokenizer = self.folder / "Stable-diffusion", self.folder / "tiny-clip"
        base = load_base(checkpoints / "tiny15.safetensors", torch.float32, tokenizer)
        upgraded = load_upgraded(checkpoints / "tinyxl.safetensors", torch.float32, tokenizer)
        for lora in loras:
            merge_lora(lora, base, upgraded)
        return Models(base, upgraded, load_adapter(self.folder / "X-Adapter" / "tiny.safetensors"))

    def lora(self, name: str, weight: float) -> Lora:
        return Lora(self.folder / "Lora" / f"{name}.safetensors", weight)


@pytest.fixture(scope="module")
def files(models) -> Files:
    return Files(models / "models")


@pytest.fixture(scope="module")
def plain_models(files) -> Models:
    return files.models()


def headless(models: Models, job: Job) -> Latents:
    scales = tuple(scale for (scale,) in job.control_scales)
    stages, request = TwoStages(models), request_of(models, job, job.settings, scales)
    base = None if job.settings.single_stage else stages.base_latents(request)
    steps = stages.joint_steps_of(request)
    start = steps.scaled(stages.start(request, base, steps).latents, steps.timesteps[0])
    # whoever asks twice draws other noise from the generators
    request = request_of(models, job, job.settings, scales)
    finished = stages.upgraded_latents(request, base)
    return Latents(base if request.has_stage_one else None, start, finished)


def in_the_webui(
    server: WebUIServer, job: Job, prompt: str | None = None, size: str = "tiny", units: Sequence[dict] = ()
) -> Latents:
    """`size` names base and adapter, `units` are those of the ControlNet extension."""
    given = {name: value for name, value in dataclasses.asdict(job.settings).items() if value != default_of(name)}
    over = {} if job.init_image is None else {"denoising_strength": job.strength}
    if job.mask is not None:
        over |= {"mask": job.mask, "mask_blur": 0, "inpainting_fill": 1, "inpaint_full_res": False}
    pictures = () if job.init_image is None else (job.init_image,)
    ask = server.txt2img if job.init_image is None else server.img2img
    with server.recorded_samplings() as samplings:
        answer = ask(
            *pictures,
            prompt=prompt or job.prompt,
            negative_prompt=job.negative_prompt,
            width=job.width,
            height=job.height,
            steps=job.steps,
            cfg_scale=job.cfg_scale,
            sampler_name=job.sampler,
            seed=job.seed,
            batch_size=job.batch,
            **over,
            alwayson_scripts={
                **({"ControlNet": {"args": list(units)}} if units else {}),
                **arguments(**{"base_checkpoint": f"{size}15", "adapter": size, **given})["alwayson_scripts"],
            },
        )
    made(answer)
    *base, joint = samplings
    finished = [torch.tensor(sampling["finished"]) for sampling in (*base, joint)]
    return Latents(finished[0] if base else None, scaled(joint, job.sampler), finished[-1])


def where_painted(latents: Latents, job: Job) -> Latents:
    """Inside the mask alone: some of the WebUI's samplers finish with something else outside, which is blended out."""
    painted = Painted(job.init_image, job.strength, job.mask)
    inside, of_base = (painted.latent_mask(size, job.batch) for size in (job.size, job.base_size))
    base = None if latents.base is None else latents.base * of_base
    return Latents(base, latents.start * inside, latents.finished * inside)


def default_of(name: str) -> Any:
    return getattr(Settings(), name)


def scaled(sampling: dict[str, Any], sampler: str) -> Tensor:
    """A sampling's first latents as the UNet takes them; samplers on timesteps have them like that."""
    start = torch.tensor(sampling["start"])
    return start if sampler_named(sampler).on_timesteps else start / math.sqrt(1 + sampling["level"] ** 2)


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours - theirs).norm() / theirs.norm())


def check(ours: Latents, theirs: Latents) -> None:
    """Every stage agrees."""
    for stage in ("base", "start", "finished"):
        one, other = getattr(ours, stage), getattr(theirs, stage)
        assert (one is None) == (other is None), stage
        if one is not None:
            assert relative_error(one, other) < TOLERANCE, stage


SAMPLERS = ["DPM++ 2M", "DDIM", "Euler", "Euler a", "Heun", "LMS", "DPM2", "DPM2 a", "PLMS"]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_both_hosts_finish_every_stage_with_the_same_latents(sampler, webui, plain_models):
    job = replace(JOB, sampler=sampler)
    check(headless(plain_models, job), in_the_webui(webui, job))


@pytest.mark.parametrize(
    "settings",
    [
        {"switch_point": 1.0},
        {"switch_point": 0.3},
        {"weight": 0.0},
        {"weight": (1.0, 0.5, 1.5), "guidance_start": 0.2, "guidance_end": 0.6},
        {"base_prompt": "a [dog]", "base_cfg_scale": 3.0, "base_steps": 5, "base_width": 192},
        {"base_seed": 11},
        {"single_stage": True},
    ],
    ids=str,
)
def test_every_argument_means_the_same_in_both_hosts(settings, webui, plain_models):
    job = replace(JOB, settings=replace(JOB.settings, **settings))
    check(headless(plain_models, job), in_the_webui(webui, job))


@pytest.mark.parametrize(
    "request_made",
    [
        {"negative_prompt": ""},
        {"batch": 2},
        {"prompt": "a cat, " * 40},
        {"sampler": "DDIM", "steps": 30},
        {"width": 384, "cfg_scale": 3.0},
    ],
    ids=str,
)
def test_every_request_means_the_same_in_both_hosts(request_made, webui, plain_models):
    job = replace(JOB, **request_made)
    check(headless(plain_models, job), in_the_webui(webui, job))


@pytest.mark.parametrize(
    "prompt",
    [
        "a [cat:dog:0.5] on a [big:0.3] mat",
        "a [cat|dog] on a mat",
        "a cat :1.2 AND a dog :0.6",
        "a cat BREAK on a ((mat)) [[red]]",
        "a (cat:0.4), \\(red\\), [::2]",
    ],
)
def test_every_prompt_means_the_same_in_both_hosts(prompt, webui, plain_models):
    job = replace(JOB, prompt=prompt, negative_prompt="[blurred:red:0.4]")
    check(headless(plain_models, job), in_the_webui(webui, job))


def picture() -> Image.Image:
    return control_map(256)


def mask() -> Image.Image:
    image = Image.new("L", (256, 256))
    ImageDraw.Draw(image).ellipse((70, 70, 200, 190), fill=255)
    return image


@pytest.mark.parametrize("settings", [{}, {"img2img_start": "base", "switch_point": 0.5}], ids=str)
@pytest.mark.parametrize("sampler", ["DPM++ 2M", "DDIM", "Euler a"])
def test_a_picture_is_painted_over_alike(sampler, settings, webui, plain_models):
    job = replace(JOB, sampler=sampler, init_image=picture(), settings=replace(JOB.settings, **settings))
    check(headless(plain_models, job), in_the_webui(webui, job))


@pytest.mark.parametrize("settings", [{}, {"img2img_start": "base", "switch_point": 0.5}], ids=str)
@pytest.mark.parametrize("sampler", ["DPM++ 2M", "DDIM", "Euler"])
def test_inpainting_is_alike(sampler, settings, webui, plain_models):
    settings = replace(JOB.settings, **settings)
    job = replace(JOB, sampler=sampler, init_image=picture(), mask=mask(), settings=settings)
    ours, theirs = headless(plain_models, job), in_the_webui(webui, job)
    check(where_painted(ours, job), where_painted(theirs, job))


def test_a_prompt_that_changes_over_a_picture(webui, plain_models):
    job = replace(JOB, prompt="a [cat:dog:0.3]", init_image=picture(), strength=0.6)
    check(headless(plain_models, job), in_the_webui(webui, job))


@pytest.mark.parametrize("name", ["style15", "stylexl"])
def test_a_lora_does_the_same_in_both_hosts(name, webui, files, plain_models):
    ours = headless(files.models(files.lora(name, 0.8)), JOB)
    check(ours, in_the_webui(webui, JOB, f"{JOB.prompt} <lora:{name}:0.8>"))
    assert relative_error(ours.finished, headless(plain_models, JOB).finished) > TOLERANCE


def test_the_adapter_acts_in_both(plain_models):
    """Lest two hosts agree on doing nothing."""
    guided, alone = (
        headless(plain_models, replace(JOB, settings=replace(JOB.settings, weight=weight))) for weight in (1.0, 0.0)
    )
    assert relative_error(guided.finished, alone.finished) > 10 * TOLERANCE


def test_text_under_a_headless_picture_makes_it_again_in_the_webui(webui, files, tmp_path):
    """Read by the WebUI from the PNG, and pasted."""
    job = replace(
        JOB,
        settings=Settings(
            base_checkpoint="tiny15", adapter="tiny.safetensors", base_prompt="a dog, red", base_steps=5, base_seed=3
        ),
        switch_points=(0.7,),
        weights=((1.0, 0.5, 1.5),),
        model="tinyxl",
        loras=(("style15", 0.8),),
    )
    ours = next(make_pictures(files.models(files.lora("style15", 0.8)), job))
    read = png_info(webui, save_picture(tmp_path / "ours.png", ours.image, ours.text))
    pasted = made(webui.txt2img(infotext=read["info"]))
    again = png_info(webui, save_picture(tmp_path / "pasted.png", pasted.image, pasted.infotexts[0]))
    assert read["info"] == ours.text
    said = again["parameters"]
    assert float(said.pop("CFG scale")) == float(read["parameters"].pop("CFG scale"))
    assert {key: said.get(key) for key in read["parameters"]} == read["parameters"]
    assert grey_levels_apart(pasted.image, ours.image) <= 1


def png_info(server: WebUIServer, path: Path) -> dict[str, Any]:
    """What the WebUI reads from a PNG: the text, and the text taken apart."""
    reply = server.post("/sdapi/v1/png-info", {"image": base64.b64encode(path.read_bytes()).decode()})
    assert reply.status == 200, reply.content
    return reply.content
