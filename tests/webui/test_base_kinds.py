"""Other kinds of base than a plain SD1.5 checkpoint: SD2.x, models that predict the velocity, inpainting models."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.pictures import grey_levels_apart

from .. import lora_formats
from .asking import HALF, TITLE, arguments, made, plain, sdedit, with_xadapter
from .conftest import PLAIN, is_between
from .server import Installation, WebUIServer, environment
from .small_loras import TINY15, add_lora

CHECKPOINTS = "models/Stable-diffusion"
STEPS = {"steps": 3}
PICTURES = {"weight": 0, "switch_point": 0.2, "return_base_image": True}
KINDS = ("tiny21", "tiny21v", "tiny15v", "tiny15i", "tiny21i")
TINY21 = replace(lora_formats.SD21, channels=(32, 64, 128, 128), context_width=256, text_encoders=((256, 10),))


@pytest.fixture(scope="module")
def bases(installation: Installation, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    script = Path(__file__).parent / "small_bases.py"
    clip = models / "models/tiny-clip"
    command = [installation.python, "-I", script, installation.folder, folder, clip]
    made_them = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert made_them.returncode == 0, made_them.stderr
    add_velocity_sdxl(models / CHECKPOINTS, folder / CHECKPOINTS)
    return folder


def add_velocity_sdxl(source: Path, target: Path) -> None:
    """The small SDXL checkpoint once more, as one that predicts the velocity; its .yaml says so."""
    (target / "tinyxlv.safetensors").symlink_to(source / "tinyxl.safetensors")
    config = (source / "tinyxl.yaml").read_text()
    assert "EpsScaling" in config
    velocity = config.replace("EpsScaling", "VScaling").replace("EpsWeighting", "EDMWeighting")
    (target / "tinyxlv.yaml").write_text(velocity)


@pytest.fixture(scope="module")
def server(start_webui, models: Path, bases: Path) -> Iterator[WebUIServer]:
    # a setting that config.json lacks is not put back after a request that overrides it
    options = {"sd_noise_schedule": "Default"}
    with start_webui("bases", models=[models, bases], options=options) as started:
        yield started


def own_picture(server: WebUIServer, kind: str, **request):
    """What the WebUI makes with the checkpoint selected."""
    chosen = {**request.pop("override_settings", {}), "sd_model_checkpoint": f"{kind}.safetensors"}
    return plain(server, **{**HALF, **STEPS, **request}, override_settings=chosen)


def is_a_picture(image: Image.Image) -> bool:
    """Numbers that are none become black."""
    return len(image.getcolors(image.width * image.height)) > 100


def ours(server: WebUIServer, kind: str, given: dict | None = None, **request):
    return with_xadapter(server, {**PICTURES, "base_checkpoint": kind, **(given or {})}, **{**STEPS, **request})


@pytest.mark.parametrize("sampler", ["Euler", "DDIM"])
@pytest.mark.parametrize("kind", KINDS)
def test_its_picture_is_the_webuis_own(server, kind, sampler):
    answer = ours(server, kind, sampler_name=sampler)
    assert is_a_picture(answer.images[1])
    assert grey_levels_apart(answer.images[1], own_picture(server, kind, sampler_name=sampler)) <= 1
    expected = sdedit(server, answer.images[1], 0.2, sampler_name=sampler, **STEPS)
    assert grey_levels_apart(answer.images[0], expected) <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_it_guides_sdxl_in_the_joint_stage(server, kind):
    usual = {"switch_point": 0.8, "return_base_image": False}
    without, half, guided = (ours(server, kind, {**usual, "weight": weight}).image for weight in (0, 0.5, 1))
    assert is_between(half, without, guided)
    assert is_a_picture(guided)


@pytest.mark.parametrize("sampler", ["Euler", "DDIM"])
def test_an_sdxl_model_that_predicts_the_velocity_is_guided_too(server, sampler):
    """Without weight it makes what it makes in the img2img tab."""
    request = {"sampler_name": sampler, "override_settings": {"sd_model_checkpoint": "tinyxlv.safetensors"}}
    given = {"switch_point": 0.8}
    without, start = ours(server, "tiny15", given, **request).images
    assert grey_levels_apart(without, sdedit(server, start, 0.8, **request, **STEPS)) <= 1
    half, guided = (ours(server, "tiny15", {**given, "weight": weight}, **request).images[0] for weight in (0.5, 1))
    assert is_a_picture(guided)
    assert is_between(half, without, guided)
    assert grey_levels_apart(without, ours(server, "tiny15", given, sampler_name=sampler).images[0]) > 1


@pytest.mark.parametrize("kind", ["tiny15v", "tiny21v"])
def test_a_zero_terminal_snr_schedule_is_followed(server, kind):
    schedule = {"sd_noise_schedule": "Zero Terminal SNR"}
    usual, rescaled = ours(server, kind), ours(server, kind, override_settings=schedule)
    assert grey_levels_apart(rescaled.images[1], own_picture(server, kind, override_settings=schedule)) <= 1
    assert grey_levels_apart(rescaled.images[1], usual.images[1]) > 1
    assert grey_levels_apart(ours(server, kind).images[1], usual.images[1]) == 0


def test_a_change_of_schedule_is_known_before_sdxl_samples(server):
    """The base is taken along the levels that SDXL's sampler will have, and not along the last job's."""
    given, schedule = {"weight": 1, "switch_point": 0.8}, {"sd_noise_schedule": "Zero Terminal SNR"}
    usual, rescaled, again = (
        ours(server, "tiny15v", given, override_settings=settings).images[0] for settings in ({}, schedule, {})
    )
    assert grey_levels_apart(usual, again) == 0
    assert grey_levels_apart(usual, rescaled) > 1


@pytest.mark.parametrize("make", [lora_formats.lora, lora_formats.loha], ids=lambda make: make.__name__)
def test_sd2_takes_its_own_loras(server, make):
    name = f"sd2 {make.__name__}"
    add_lora(server, name, lora_formats.unet_file(TINY21, make) | lora_formats.text_file(TINY21, make))
    prompt = f"a cat <lora:{name}:0.7>"
    answer = ours(server, "tiny21", prompt=prompt)
    assert grey_levels_apart(answer.images[1], own_picture(server, "tiny21", prompt=prompt)) <= 1
    assert grey_levels_apart(answer.images[1], ours(server, "tiny21").images[1]) > 1
    assert f"LoRA {name} to SD2" in answer.infotexts[0]


def test_an_sd15_lora_on_sd2_is_refused_by_name(server):
    answer = server.txt2img(
        **{**PLAIN, "prompt": "a cat <lora:style15:1>"},
        alwayson_scripts={"X-Adapter": {"args": [{"base_checkpoint": "tiny21"}]}},
    )
    assert answer.status == 422
    assert "'style15'" in answer.error and "the SD2 model" in answer.error
    made(server.txt2img(**PLAIN))


def test_a_base_that_needs_a_given_picture_is_refused_by_name(server):
    answer = server.txt2img(**PLAIN, **arguments(base_checkpoint="tiny15e"))
    assert answer.status == 422
    assert "'tiny15e', whose UNet takes 8 channels" in answer.error
    listed = server.get("/xadapter/v1/models").content["base_checkpoints"]
    assert {name.split(".")[0] for name in listed} == {"tiny15", *KINDS}


@pytest.mark.parametrize("kind", ["tiny15i", "tiny21i"])
def test_an_inpainting_bases_picture_in_a_batch_is_the_one_made_alone(server, kind):
    alone = ours(server, kind, seed=PLAIN["seed"] + 1).images[1]
    assert grey_levels_apart(ours(server, kind, batch_size=2, do_not_save_grid=True).images[3], alone) <= 1


@pytest.mark.parametrize("memory", ["lockstep", "recorded"])
@pytest.mark.parametrize("keeping", ["Keep on the GPU", "Keep in RAM", "Unload after each job"])
def test_a_picture_with_another_base_in_the_midst_of_a_job_leaves_it_its_own(server, memory, keeping):
    outer, inner = {"memory": memory}, {"memory": memory, "base_checkpoint": "tiny21"}
    server.post("/sdapi/v1/options", {"xadapter_keep_models": keeping})
    try:
        expected = [with_xadapter(server, outer, seed=seed, **STEPS).image for seed in (60, 61)]
        between = with_xadapter(server, inner, seed=123, **STEPS).image
        scripts = {TITLE: {"args": [outer]}, "Inner": {"args": [inner]}}
        asked = {**PLAIN, **STEPS, "seed": 60, "n_iter": 2, "do_not_save_grid": True}
        answer = made(server.txt2img(**asked, alwayson_scripts=scripts))
    finally:
        server.post("/sdapi/v1/options", {"xadapter_keep_models": "Keep on the GPU"})
    first = answer.info["index_of_first_image"]
    for one, other in zip(answer.images[first:], [*expected, between, between], strict=True):
        assert grey_levels_apart(one, other) <= 1
    assert server.state()["hooks"] == []


@pytest.fixture
def words(server) -> Iterator[None]:
    """Textual inversions as wide as the text encoders of SD1.5 and SD2."""
    files = {server.data / f"embeddings/word{width}.safetensors": width for width in (768, 1024)}
    for file, width in files.items():
        save_file({"emb_params": torch.zeros(1, width)}, file)
    assert server.post("/sdapi/v1/refresh-embeddings").status == 200
    yield
    for file in files:
        file.unlink()
    assert server.post("/sdapi/v1/refresh-embeddings").status == 200


@pytest.mark.parametrize(
    ("base", "name", "fits", "other", "misfit"),
    [("tiny15", "SD1.5", "768", "SD2", "1024"), ("tiny21", "SD2", "1024", "SD1.5", "768")],
)
def test_the_route_tells_plugins_by_the_base_that_they_fit(server, words, base, name, fits, other, misfit):
    add_lora(server, "wide768", lora_formats.unet_file(TINY15, lora_formats.lora))
    add_lora(server, "wide1024", lora_formats.unet_file(TINY21, lora_formats.lora))
    # lists the LoRAs
    assert server.post("/sdapi/v1/refresh-loras").status == 200
    prompt = "a word768 cat, word1024 <lora:wide768:1> <lora:wide1024:1>"
    asked = {"prompt": prompt, "args": [{"base_checkpoint": base}]}
    plan = server.post("/xadapter/v1/plan", asked).content
    assert plan["base"] == name
    assert set(plan["summary"].split("; ")) == {
        f"textual inversion word{fits} to {name}",
        f"textual inversion word{misfit} to neither model (it was made for {other})",
        f"LoRA wide{fits} to {name}",
        f"LoRA wide{misfit} to neither model (it was made for {other})",
    }
