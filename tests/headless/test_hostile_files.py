"""Files of the command line that are broken anywhere: an answer, or one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import numpy
import pytest
import safetensors.torch
import torch
import yaml
from hypothesis import HealthCheck, given, settings, strategies
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lib_xadapter.errors import WrongArgument, XAdapterError
from lib_xadapter.headless.inversions import read_inversion
from lib_xadapter.headless.job import open_picture
from lib_xadapter.headless.loras import load_lora
from lib_xadapter.headless.model_configs import read_yaml_beside
from lib_xadapter.headless.prompt_grammar import read_styles
from lib_xadapter.headless.recipes import OVERRIDES, REST_FIELDS, options_of_job, options_of_png
from tests.test_hostile_files import broken
from tests.test_hostile_settings import TEXTS, VALUES

MANY = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
MUTATIONS = 80
CONFIG = {
    "model": {
        "params": {
            "parameterization": "v",
            "unet_config": {"params": {"num_heads": 8, "num_head_channels": -1}},
            "denoiser_config": {"params": {"scaling_config": {"target": "denoiser_scaling.VScaling"}}},
        }
    }
}
TEXT = (
    "a cat, sitting\nNegative prompt: dog\nSteps: 20, Sampler: Euler, CFG scale: 7, Seed: 1, Size: 512x512, "
    'Model: some, X-Adapter version: 1, X-Adapter weight: 1 0.5 0, X-Adapter base prompt: "a, b"'
)


def mutated(whole: bytes, name: str):
    random = numpy.random.default_rng(list(name.encode()))
    return (broken(whole, random) for _ in range(MUTATIONS))


def told_or_read(reader, path: Path) -> None:
    """Anything but an answer or one of our own errors ends the test."""
    try:
        reader(path)
    except XAdapterError as error:
        assert str(error)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_textual_inversions(tmp_path, suffix):
    path, vectors = tmp_path / f"word{suffix}", torch.ones(2, 64)
    if suffix == ".pt":
        torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": vectors}, "name": "word"}, path)
    else:
        safetensors.torch.save_file({"emb_params": vectors}, path)
    for content in mutated(path.read_bytes(), suffix):
        path.write_bytes(content)
        told_or_read(read_inversion, path)


def test_loras_that_are_merged(pipe, small, tmp_path):
    path = tmp_path / "lora.safetensors"
    before = {name: value.clone() for name, value in pipe.base.unet.state_dict().items()}
    for content in mutated(small.lora.read_bytes(), "lora"):
        path.write_bytes(content)
        told_or_read(lambda path: load_lora(pipe.base, path, weight=0.0), path)
    assert all(torch.equal(value, before[name]) for name, value in pipe.base.unet.state_dict().items())


@pytest.mark.parametrize("kind", ["mutated", "nested", "aliases"])
def test_configs_beside_checkpoints(tmp_path, kind):
    path = tmp_path / "model.yaml"
    texts = {
        "mutated": mutated(yaml.safe_dump(CONFIG).encode(), "yaml"),
        "nested": [b"[" * 100_000, b"a: " * 10_000],
        # a few lines that would be gigabytes if anybody wrote them out
        "aliases": [
            b"a0: &a0 [x, x]\n"
            + b"".join(b"a%d: &a%d [*a%d, *a%d]\n" % (level, level, level - 1, level - 1) for level in range(1, 60))
            + b"model: {params: {unet_config: {params: {}}, denoiser_config: *a59}}\n"
        ],
    }
    for content in texts[kind]:
        path.write_bytes(content)
        told_or_read(read_yaml_beside, tmp_path / "model.safetensors")


def test_a_config_says_what_the_model_predicts(tmp_path):
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(CONFIG))
    assert read_yaml_beside(tmp_path / "model.safetensors").prediction_type == "v_prediction"


def test_pictures_whose_settings_are_taken_over(tmp_path):
    path = tmp_path / "picture.png"
    told = PngInfo()
    told.add_text("parameters", TEXT)
    Image.new("RGB", (16, 16)).save(path, pnginfo=told)
    assert options_of_png(path)["base_prompt"] == "a, b"
    for content in mutated(path.read_bytes(), "png"):
        path.write_bytes(content)
        told_or_read(options_of_png, path)
        told_or_read(lambda path: open_picture(path, "--init-image"), path)


@MANY
@given(strategies.text() | strategies.lists(TEXTS).map(lambda parts: ", ".join([TEXT, *parts])))
def test_any_text_in_a_picture(tmp_path, text):
    path = tmp_path / "picture.png"
    told = PngInfo()
    told.add_itxt("parameters", text.encode("utf-8", "ignore").decode())
    Image.new("RGB", (4, 4)).save(path, pnginfo=told)
    told_or_read(options_of_png, path)


@MANY
@given(
    strategies.dictionaries(
        strategies.sampled_from([*REST_FIELDS, "override_settings", "alwayson_scripts"]) | TEXTS,
        VALUES
        | strategies.dictionaries(strategies.sampled_from([*OVERRIDES, "X-Adapter"]), VALUES)
        | strategies.fixed_dictionaries({"X-Adapter": strategies.fixed_dictionaries({"args": VALUES})}),
        max_size=4,
    )
)
def test_any_job_file(tmp_path, job):
    path = tmp_path / "job.json"
    path.write_text(json.dumps(job), encoding="utf-8")
    told_or_read(options_of_job, path)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[" * 100_000, b"{}{", b"a: [*b]"])
def test_job_files_that_are_no_text(tmp_path, content):
    for path in (tmp_path / "job.json", tmp_path / "job.yaml"):
        path.write_bytes(content)
        with pytest.raises(WrongArgument, match=r"^--job: job\."):
            options_of_job(path)


def test_styles(tmp_path):
    path = tmp_path / "styles.csv"
    whole = b'name,prompt,negative_prompt\r\nmine,"a {prompt}, b",c\r\n'
    for content in mutated(whole, "styles"):
        path.write_bytes(content)
        told_or_read(read_styles, path)
