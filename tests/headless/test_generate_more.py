"""What `generate` takes over from pictures, job files and lists, and what it leaves out where it is there already."""

from __future__ import annotations

import json

import numpy
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lib_xadapter.headless.generate_command import batches_of, read_prompts, styled
from lib_xadapter.headless.options import read_options


def texts(generate) -> list[str]:
    return [Image.open(path).text["parameters"] for path in generate.pictures()]


def seeds(generate) -> list[str]:
    return [path.stem.split("-")[1] for path in generate.pictures()]


def pixels(path) -> numpy.ndarray:
    return numpy.asarray(Image.open(path), dtype=int)


@pytest.mark.parametrize(
    ("given", "batches"),
    [
        (([5], None, 2), [(5, 0, 2)]),
        (([5], 3, 2), [(5, 0, 2), (5, 2, 1)]),
        (([5, 9], None, 1), [(5, 0, 1), (9, 0, 1)]),
        (([5, 9], 2, 4), [(5, 0, 2), (9, 0, 2)]),
    ],
    ids=str,
)
def test_seeds_and_numbers_become_batches(given, batches):
    assert batches_of(*given) == batches


def test_a_prompt_file_and_several_seeds_make_a_picture_each(generate, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\n# not this one\n\na dog\n")
    assert generate("--prompt-file", str(file), "--seed", "5", "8", steps="1", width="64", height="64") == 0
    assert seeds(generate) == ["5", "8", "5", "8"]
    assert [text.splitlines()[0] for text in texts(generate)] == ["a cat", "a cat", "a dog", "a dog"]


def test_what_is_there_is_left_out_when_a_sweep_is_resumed(generate, capsys):
    small = {"steps": "1", "width": "64", "height": "64"}
    assert generate("--weight", "0.5", **small) == 0
    assert generate("--weight", "0.5", "1", "--resume", **small) == 0
    assert len(generate.pictures()) == 2
    assert "1 of 2 pictures" in capsys.readouterr().out
    assert generate("--weight", "0.5", "1", "--resume", **small) == 0
    assert "All 2 pictures are in" in capsys.readouterr().out


def test_a_picture_is_made_again_from_what_is_written_in_it(generate):
    assert generate("--weight", "0.7", "--base-prompt", "a, dog", "--negative-prompt", "fog", width="64") == 0
    (first,) = generate.pictures()
    again = dict.fromkeys(("prompt", "width", "height", "steps", "seed", "upgraded", "base", "adapter"))
    assert generate("--from-png", str(first), **again) == 0
    _, second = generate.pictures()
    assert numpy.array_equal(pixels(first), pixels(second))
    assert len(set(texts(generate))) == 1


@pytest.mark.parametrize("images", [("--batch", "2"), ("--num", "2")], ids=" ".join)
def test_every_image_of_several_is_made_again_from_what_is_written_in_it(generate, images):
    assert generate("--base-seed", "8", *images, width="64") == 0
    _, second = generate.pictures()
    again = dict.fromkeys(("prompt", "width", "height", "steps", "seed", "upgraded", "base", "adapter"))
    assert generate("--from-png", str(second), **again) == 0
    *_, alone = generate.pictures()
    assert "X-Adapter base seed: 9" in Image.open(second).text["parameters"]
    assert numpy.abs(pixels(second) - pixels(alone)).max() <= 1


def test_styles_are_put_around_the_prompt(generate, tmp_path):
    path = tmp_path / "styles.csv"
    path.write_text('name,prompt,negative_prompt\nink,"ink, {prompt}",grey\n')
    words = generate.words("--styles", str(path), "--style", "ink", prompt="a cat")
    options = read_options(words)
    assert styled(options, options.prompt) == ("ink, a cat", "grey")
    lines = tmp_path / "prompts.txt"
    lines.write_text("a dog\n")
    options.prompt_file = lines
    assert read_prompts(options, "") == ["ink, a dog"]


def test_options_go_before_what_is_taken_over(generate):
    assert generate(steps="1", width="64", height="64") == 0
    (first,) = generate.pictures()
    words = generate.words("--from-png", str(first), "--weight", "0.5", seed="9", width=None)
    options = read_options(words)
    assert (options.seed, options.weight, options.width) == ([9], [0.5], 64)


@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_a_job_file_has_the_fields_of_rest(suffix, generate, tmp_path):
    job = {
        "prompt": "a dog",
        "steps": 3,
        "cfg_scale": 4.5,
        "sampler_name": "Euler",
        "seed": 8,
        "alwayson_scripts": {"X-Adapter": {"args": [{"switch_point": 0.5, "weight": [1, 0, 1], "base_steps": 2}]}},
    }
    path = tmp_path / f"job.{suffix}"
    path.write_text(json.dumps(job))
    options = read_options(generate.words("--job", str(path), prompt=None, steps=None, seed=None))
    assert (options.prompt, options.steps, options.cfg, options.sampler) == ("a dog", 3, 4.5, "Euler")
    assert (options.seed, options.switch_point, options.weight) == ([8], [0.5], [(1, 0, 1)])
    assert options.base_steps == 2


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"promt": "a"}', "has the field 'promt'"),
        ("[1]", "holds no object"),
        ("{", "is neither JSON nor YAML"),
        ('{"alwayson_scripts": {"Other": {}}}', "has 'alwayson_scripts'"),
        ('{"alwayson_scripts": {"X-Adapter": {"args": [{"weigth": 1}]}}}', "'weigth' is no argument"),
    ],
)
def test_a_job_file_that_is_wrong_is_named(text, sentence, generate, tmp_path, capsys):
    path = tmp_path / "job.json"
    path.write_text(text)
    with pytest.raises(SystemExit):
        read_options(generate.words("--job", str(path)))
    assert sentence in capsys.readouterr().err


def test_a_picture_without_settings_is_named(generate, tmp_path, capsys):
    path = tmp_path / "plain.png"
    Image.new("RGB", (8, 8)).save(path)
    with pytest.raises(SystemExit):
        read_options(generate.words("--from-png", str(path)))
    assert "plain.png carries no settings" in capsys.readouterr().err


class TestInitImage:
    @pytest.fixture
    def picture(self, tmp_path):
        path = tmp_path / "init.png"
        Image.effect_noise((64, 64), 80).convert("RGB").save(path)
        return str(path)

    def test_it_takes_the_place_of_the_bases_picture(self, generate, picture):
        small = {"width": "64", "height": "64"}
        for more in ([], ["--init-image", picture], ["--init-image", picture, "--strength", "0.25"]):
            assert generate(*more, **small) == 0
        one, two, three = map(pixels, generate.pictures())
        assert (one != two).any()
        assert (two != three).any()
        assert "Denoising strength: 0.75" in texts(generate)[1]
        assert "Denoising strength" not in texts(generate)[0]

    def test_it_is_painted_over_again_as_strongly_as_is_written(self, generate, picture, caplog):
        assert generate("--init-image", picture, "--strength", "0.25", width="64", height="64") == 0
        (first,) = generate.pictures()
        again = dict.fromkeys(("prompt", "width", "height", "steps", "seed", "upgraded", "base", "adapter"))
        assert generate("--from-png", str(first), "--init-image", picture, **again) == 0
        assert not caplog.messages
        _, second = generate.pictures()
        assert numpy.array_equal(pixels(first), pixels(second))
        read_options(generate.words("--from-png", str(first), **again))
        told = (
            f"--from-png: {first.name} was painted over another picture, which it does not carry; without --init-image"
        )
        assert told in caplog.messages[0]

    def test_the_strength_of_hires_fix_is_none_of_painting_over(self, generate, caplog):
        assert generate(steps="1", width="64", height="64") == 0
        (path,) = generate.pictures()
        text = Image.open(path).info["parameters"] + ", Denoising strength: 0.4, Hires upscale: 2"
        told = PngInfo()
        told.add_text("parameters", text)
        Image.open(path).save(path, pnginfo=told)
        assert read_options(generate.words("--from-png", str(path))).strength == 0.75
        assert not caplog.messages

    def test_a_mask_takes_part(self, generate, picture, tmp_path):
        mask = tmp_path / "mask.png"
        Image.linear_gradient("L").resize((64, 64)).point(lambda level: 255 * (level > 127)).save(mask)
        small = {"width": "64", "height": "64", "steps": "4"}
        assert generate("--init-image", picture, "--mask", str(mask), **small) == 0
        assert generate("--init-image", picture, **small) == 0
        masked, whole = map(pixels, generate.pictures())
        assert (masked != whole).any()
        outside = numpy.asarray(Image.open(mask)) == 0
        assert (masked[outside] == numpy.asarray(Image.open(picture))[outside]).all()

    def test_the_base_can_repaint_it_first(self, generate, picture):
        small = {"width": "64", "height": "64"}
        for start in ("picture", "base"):
            assert generate("--init-image", picture, "--img2img-start", start, "--return-base-image", **small) == 0
        over_picture, of_base, over_base = generate.pictures()
        assert of_base.stem == f"{over_base.stem}-base"
        assert (pixels(over_picture) != pixels(over_base)).any()
        assert ["X-Adapter img2img start: base" in text for text in texts(generate)] == [False, True, True]

    @pytest.mark.parametrize(
        ("more", "sentence"),
        [
            (["--mask", "IMAGE"], "--mask is given, but there is no --init-image"),
            (["--init-image", "IMAGE", "--strength", "0"], "--strength is 0, expected a number above 0"),
            (["--init-image", "IMAGE", "--single-stage"], "--init-image is given, but a single stage"),
            (["--img2img-start", "base"], "--img2img-start is 'base', but there is no --init-image"),
            (["--init-image", "IMAGE", "--base-start", "control image"], "over an --init-image the base starts from"),
        ],
    )
    def test_what_does_not_go_together_is_named(self, generate, picture, more, sentence, capsys):
        assert generate(*(picture if word == "IMAGE" else word for word in more)) == 2
        assert sentence in capsys.readouterr().err
