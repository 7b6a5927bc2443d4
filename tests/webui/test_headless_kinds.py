"""The diffusers host beside the real WebUI with other kinds of base, LoRAs of other kinds and textual inversions."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from .asking import arguments, made
from .server import WebUIServer
from .small_loras import TINY15, add_lora
from .test_base_kinds import CHECKPOINTS, KINDS, bases, server  # noqa: F401

os.environ["HF_HUB_OFFLINE"] = "1"
pytest.importorskip("diffusers", reason="needs the extra 'headless'")

from lib_xadapter import load_adapter
from lib_xadapter.headless.inversions import Inversions
from lib_xadapter.headless.job import Job
from lib_xadapter.headless.jobs import request_of
from lib_xadapter.headless.lora_names import Lora
from lib_xadapter.headless.loras import merge_lora
from lib_xadapter.headless.model_files import load_base, load_upgraded
from lib_xadapter.headless.models import Models
from lib_xadapter.headless.pipeline import TwoStages

from .. import lora_formats
from .test_headless_agreement import JOB as USUAL
from .test_headless_agreement import TOLERANCE

JOB = replace(USUAL, steps=4, sampler="Euler")


def loaded(models: Path, checkpoint: Path) -> Models:
    folder = models / "models"
    tokenizer = folder / "tiny-clip"
    return Models(
        load_base(checkpoint, torch.float32, tokenizer),
        load_upgraded(folder / "Stable-diffusion/tinyxl.safetensors", torch.float32, tokenizer),
        load_adapter(folder / "X-Adapter/tiny.safetensors"),
        inversions=Inversions.below(models / "embeddings"),
    )


def latents(models: Models, job: Job) -> list[torch.Tensor]:
    """The base's finished ones and SDXL's."""
    stages, request = TwoStages(models), request_of(models, job, job.settings)
    base = stages.base_latents(request)
    return [base, stages.upgraded_latents(request, base)]


def in_the_webui(server: WebUIServer, kind: str, job: Job, prompt: str | None = None) -> list[torch.Tensor]:  # noqa: F811
    with server.recorded_samplings() as samplings:
        answer = server.txt2img(
            prompt=prompt or job.prompt,
            negative_prompt=job.negative_prompt,
            width=job.width,
            height=job.height,
            steps=job.steps,
            cfg_scale=job.cfg_scale,
            sampler_name=job.sampler,
            seed=job.seed,
            **arguments(base_checkpoint=kind, adapter="tiny", weight=1.0, switch_point=0.8),
        )
    made(answer)
    return [torch.tensor(sampling["finished"]) for sampling in samplings]


def check(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    for stage, one, other in zip(("base", "finished"), ours, theirs, strict=True):
        assert one.shape == other.shape
        assert float((one - other).norm() / other.norm()) < TOLERANCE, stage


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_of_base_make_the_same(kind, server, models, bases):  # noqa: F811
    ours = latents(loaded(models, bases / CHECKPOINTS / f"{kind}.safetensors"), JOB)
    check(ours, in_the_webui(server, kind, JOB))


@pytest.mark.parametrize(
    "prompt", ["a cat, base15", "upgradedxl cat", "[base15:a cat:0.5] and (upgradedxl:1.2)"], ids=lambda prompt: prompt
)
def test_textual_inversions_do_the_same(prompt, server, models):  # noqa: F811
    job = replace(JOB, prompt=prompt)
    ours = latents(loaded(models, models / CHECKPOINTS / "tiny15.safetensors"), job)
    check(ours, in_the_webui(server, "tiny15", job))


@pytest.mark.parametrize("name", ["lokr", "dora", "oft", "norm"])
def test_loras_of_other_kinds_do_the_same(name, server, models):  # noqa: F811
    make = lora_formats.FORMATS[name]
    path = add_lora(
        server, f"headless {name}", lora_formats.unet_file(TINY15, make) | lora_formats.text_file(TINY15, make)
    )
    with_lora = loaded(models, models / CHECKPOINTS / "tiny15.safetensors")
    merge_lora(Lora(path, 0.5, 0.8, models=("base",)), with_lora.base, with_lora.upgraded)
    tag = f"<lora:headless {name}:0.5:0.8:model=base>"
    check(latents(with_lora, JOB), in_the_webui(server, "tiny15", JOB, f"{JOB.prompt} {tag}"))
