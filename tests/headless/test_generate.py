"""`generate` makes pictures from the user's own files, and every option has its effect."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
from PIL import Image

from lib_xadapter.headless import generate as generate_module
from lib_xadapter.headless.cli import EXIT_INTERRUPTED
from lib_xadapter.infotext import read_infotext
from lib_xadapter.settings import read_settings
from tests import small_models
from tests.headless.command_line import CommandLine

REPOSITORY = Path(__file__).parents[2]


def pixels(path) -> numpy.ndarray:
    return numpy.asarray(Image.open(path), dtype=numpy.int16)


def first(generate, *more: str, **replaced: str | None) -> numpy.ndarray:
    """The first picture of a run."""
    before = set(generate.pictures())
    assert generate(*more, **replaced) == 0
    return pixels(sorted(set(generate.pictures()) - before, key=lambda path: len(path.stem))[0])


def parameters(text: str) -> dict[str, str]:
    """The last line of an infotext, as the WebUI takes it apart."""
    return dict(part.split(": ", 1) for part in text.splitlines()[-1].split(", "))


def test_single_files_with_a_lora_and_a_controlnet_make_a_picture(generate, small, control_image):
    status = generate(
        "--lora", f"{small.lora}:0.8", "--controlnet", str(small.controlnet), "--control-image", str(control_image),
        upgraded=str(small.upgraded), base=str(small.base), adapter=str(small.adapter), models_dir=None,
    )  # fmt: skip
    assert status == 0
    assert [path.name for path in generate.pictures()] == ["00000-5.png"]
    picture = Image.open(generate.pictures()[0])
    assert picture.size == (128, 128)
    assert picture.text["parameters"].startswith("a cat <lora:small-style:0.8>\nSteps: 2, Sampler: DPM++ 2M")
    assert 'ControlNet 0: "Module: none, Model: small-edges, Weight: 1,' in picture.text["parameters"]


@pytest.fixture(scope="module")
def plain(small, tmp_path_factory):
    """The picture that the command makes when nothing is added."""
    return first(CommandLine(small.folder, small.tokenizer, tmp_path_factory.mktemp("plain")))


def test_the_same_command_makes_the_same_picture(generate, plain):
    assert numpy.array_equal(first(generate), plain)


@pytest.mark.parametrize(
    ("more", "replaced"),
    [
        (["--lora", "small-style"], {}),
        ([], {"prompt": "a cat <lora:small-style>"}),
        (["--weight", "0.5"], {}),
        (["--weight", "1,0,1"], {}),
        (["--switch-point", "0.4"], {}),
        (["--guidance-end", "0.4"], {}),
        (["--guidance-start", "0.4"], {}),
        (["--single-stage"], {}),
        (["--base-prompt", "a dog"], {}),
        (["--negative-prompt", "a dog"], {}),
        (["--base-cfg-scale", "2"], {}),
        (["--base-steps", "5"], {}),
        (["--base-seed", "9"], {}),
        (["--base-width", "96"], {}),
        (["--cfg", "3"], {}),
        (["--reference"], {}),
        (["--sampler", "euler A"], {}),
        ([], {"seed": "6"}),
        ([], {"adapter": "None"}),
    ],
)
def test_every_option_changes_the_picture(more, replaced, generate, plain):
    assert not numpy.array_equal(first(generate, *more, **replaced), plain)


def test_a_controlnet_and_its_scale_change_the_picture(generate, control_image, plain):
    control = ["--controlnet", "small-edges", "--control-image", str(control_image), "--control-scale"]
    assert numpy.array_equal(first(generate, *control, "0"), plain)
    assert not numpy.array_equal(first(generate, *control, "1.5"), plain)


def test_a_t2i_adapter_of_diffusers_and_its_scale_change_the_picture(generate, control_image, plain, tmp_path):
    small_models.t2i_adapter().save_pretrained(tmp_path / "t2i")
    control = ["--controlnet", str(tmp_path / "t2i"), "--control-image", str(control_image), "--control-scale"]
    assert numpy.array_equal(first(generate, *control, "0"), plain)
    assert not numpy.array_equal(first(generate, *control, "1"), plain)


def test_several_loras_and_controlnets_work_at_once(generate, control_image):
    image = str(control_image)
    status = generate(
        "--lora", "small-style:0.5", "small-style:0.25", "--controlnet", "small-edges", "small-edges",
        "--control-image", image, image, "--control-scale", "1", "--control-scale", "0.5",
    )  # fmt: skip
    assert status == 0
    text = Image.open(generate.pictures()[0]).text["parameters"]
    assert "a cat <lora:small-style:0.5> <lora:small-style:0.25>\n" in text
    assert 'ControlNet 1: "Module: none, Model: small-edges, Weight: 0.5,' in text


def test_weight_0_is_no_adapter_at_all(generate):
    assert numpy.array_equal(first(generate, "--weight", "0"), first(generate, adapter="None"))


def test_without_guidance_the_base_follows_its_own_latents(generate):
    """The released code feeds it the upgraded ones."""
    assert not numpy.array_equal(first(generate, "--cfg", "1"), first(generate, "--cfg", "1", "--weight", "0"))


def base_pictures(generate) -> list[numpy.ndarray]:
    return [pixels(path) for path in sorted(generate.out.glob("*-base.png"))]


def test_sdxl_varies_over_the_picture_of_a_base_with_a_seed_of_its_own(generate):
    varied, other = (first(generate, "--return-base-image", "--base-seed", "9", seed=seed) for seed in ("5", "6"))
    assert not numpy.array_equal(varied, other)
    assert numpy.array_equal(*base_pictures(generate))


def test_image_k_of_a_batch_has_the_bases_seed_plus_k(generate):
    generate("--return-base-image", "--base-seed", "8", "--batch", "2")
    generate("--return-base-image", seed="9")
    eighth, ninth, plain_ninth = base_pictures(generate)
    assert numpy.abs(ninth - plain_ninth).max() <= 1
    assert not numpy.array_equal(eighth, ninth)


@pytest.mark.parametrize("sampler", ["DPM++ 2M SDE", "Euler a"])
def test_image_k_of_a_batch_is_the_same_seed_alone(generate, sampler):
    generate("--batch", "2", sampler=sampler)
    together = pixels(generate.pictures()[1])
    alone = first(generate, sampler=sampler, seed="6")
    assert numpy.abs(together - alone).max() <= 1


def test_several_values_make_a_labelled_grid(generate, control_image):
    status = generate(
        "--controlnet", "small-edges", "--control-image", str(control_image), "--control-scale", "0.5", "1.5",
        "--switch-point", "0.4", "0.8", "--weight", "0", "1", "1,0,1", steps="1",
    )  # fmt: skip
    assert status == 0
    assert len(generate.pictures()) == 12
    grid = Image.open(generate.out / "grid00000.png")
    assert grid.width > 3 * 128
    assert grid.height > 4 * 128


def test_what_is_under_a_picture_makes_it_again(generate):
    generate("--weight", "0.7", "--base-prompt", "a dog", "--base-steps", "3", "--switch-point", "0.6")
    text = Image.open(generate.pictures()[0]).text["parameters"]
    settings = read_settings(read_infotext(parameters(text)))
    assert (settings.weight, settings.switch_point, settings.base_steps) == (0.7, 0.6, 3)
    assert (settings.base_prompt, settings.base_checkpoint) == ("a dog", "small-sd15")
    assert settings.adapter == "small.safetensors"
    assert parameters(text)["Size"] == "128x128"


def test_the_bases_picture_is_kept_where_asked_for(generate):
    generate("--return-base-image")
    assert Image.open(generate.out / "00000-5-base.png").size == (64, 64)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_and_low_memory_make_nearly_the_same_picture(generate, dtype, plain):
    difference = numpy.abs(plain - first(generate, "--low-memory", "--dtype", dtype))
    assert difference.mean() < 8


def test_sizes_that_are_not_one_to_two_work(generate):
    """The released code breaks on them."""
    picture = first(generate, "--base-width", "72", "--base-height", "104", width="136", height="72")
    assert picture.shape == (72, 136, 3)


def test_ctrl_c_keeps_what_is_finished(generate, monkeypatch, capsys):
    make = generate_module.make_pictures

    def interrupted(*arguments, **named):
        yield next(make(*arguments, **named))
        raise KeyboardInterrupt

    monkeypatch.setattr(generate_module, "make_pictures", interrupted)
    assert generate("--weight", "0", "1") == EXIT_INTERRUPTED
    assert len(generate.pictures()) == 1
    assert "1 of 2 pictures" in capsys.readouterr().out


def test_a_real_interrupt_ends_the_program_without_a_traceback(generate):
    """In the middle of the second picture of many."""
    weights = [f"{number / 100:g}" for number in range(100)]
    with subprocess.Popen(
        [sys.executable, "-m", "lib_xadapter", *generate.words("--weight", *weights)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    ) as process:
        said = read_until(process.stderr, "picture 2 of 100")
        process.send_signal(signal.SIGINT)
        told, rest = process.communicate()
    said += rest
    assert process.returncode == EXIT_INTERRUPTED
    assert "Traceback" not in said
    assert said.endswith("Interrupted; what was finished is kept.\n")
    finished = len(generate.pictures())
    assert 0 < finished < 100
    assert f"{finished} of 100 pictures" in told
    for path in generate.out.iterdir():
        Image.open(path).verify()


def read_until(stream, sentence: str) -> str:
    """What the stream says up to the sentence, which must come before its end."""
    said = ""
    while sentence not in said:
        letter = stream.read(1)
        assert letter, said
        said += letter
    return said
