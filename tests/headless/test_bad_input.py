"""What is wrong is said in one line that names the option, with exit status 2 and nothing written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from lib_xadapter import mapping_choice
from lib_xadapter.errors import WrongFile
from lib_xadapter.headless import options
from lib_xadapter.headless.cli import main
from lib_xadapter.headless.named_files import find_file
from tests import small_models
from tests.small_adapter import AdapterPlan, save

REPOSITORY = Path(__file__).parents[2]

OUT_OF_RANGE = [
    (["--switch-point", "1.5"], "argument --switch-point: is 1.5, expected a number from 0 to 1"),
    (["--switch-point", "high"], "argument --switch-point: is 'high', expected a number"),
    (["--weight", "1,2"], "argument --weight: is [1, 2], expected a number or a list of 3 numbers"),
    (["--base-width", "100"], "argument --base-width: is 100, expected 0 or a multiple of 8"),
    (["--base-steps", "2.5"], "argument --base-steps: is 2.5, expected a whole number"),
    (["--guidance-start", "0.9", "--guidance-end", "0.1"], "--guidance-start is 0.9, after --guidance-end at 0.1"),
    (["--width", "100"], "--width is 100, expected a multiple of 8 from 64 to 4096"),
    (["--height", "32"], "--height is 32, expected a multiple of 8"),
    (["--steps", "0"], "--steps is 0, expected a whole number from 1 to 150"),
    (["--steps", "many"], "argument --steps: invalid int value: 'many'"),
    (["--cfg", "0"], "--cfg is 0, expected a number from 1 to 30"),
    (["--cfg", "nan"], "--cfg is nan, expected a number from 1 to 30"),
    (["--batch", "0"], "--batch is 0, expected a whole number from 1"),
    (["--seed", "-1"], "--seed is -1, expected a whole number from 0"),
    (["--sampler", "Best"], "--sampler is 'Best', expected one of DPM++ 2M"),
    (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
    (["--device", "abacus"], "--device is 'abacus', which this machine does not have; it has cpu"),
    (["--dtype", "float32", "--dtype", "float16"], "--dtype is given twice."),
    (["--base-seed", "1", "--base-seed", "1"], "--base-seed is given twice."),
    (["--lora", "small-style:strong"], "--lora: 'small-style:strong' is no FILE or FILE:WEIGHT"),
    (["--lora", "nobody"], "--lora: there is no lora 'nobody'"),
    (["--prompt", "<lora:nobody>"], "--prompt: there is no lora 'nobody'"),
    (["--upgraded", "nobody"], "--upgraded: there is no checkpoint 'nobody'"),
    (["--adapter", "nobody"], "--adapter: there is no adapter 'nobody'"),
    (["--controlnet", "small-edges"], "--control-image is given 0 times, expected once for each --controlnet"),
    (["--controlnet", "nobody"], "--controlnet: there is no controlnet 'nobody'"),
    (["--control-scale", "1"], "--control-scale is given 1 times"),
    (["--base-start", "control image"], "--base-start is 'control image', but there is no --control-image"),
    (["--base-start", "control image", "--single-stage"], "--base-start is 'control image', but a single stage"),
    (["--models-dir", "nowhere"], "--models-dir: there is no folder nowhere"),
    (["--tokenizer", "nowhere"], "--base: The tokenizer folder nowhere misses vocab.json"),
    (["--nonsense"], "unrecognized arguments: --nonsense"),
]


@pytest.fixture
def refused(generate, capsys):
    """Runs a command that must be refused; gives its one line."""

    def run(*more: str, **replaced: str | None) -> str:
        try:
            status = generate(*more, **replaced)
        except SystemExit as ended:
            status = ended.code
        said = capsys.readouterr().err
        assert status == 2
        assert len(said.splitlines()) == 1
        assert not generate.out.exists()
        return said

    return run


@pytest.mark.parametrize(("more", "sentence"), OUT_OF_RANGE, ids=[" ".join(more) for more, _ in OUT_OF_RANGE])
def test_a_wrong_option_is_named(more, sentence, refused):
    assert sentence in refused(*more)


def test_a_missing_option_is_named(refused):
    assert "--adapter" in refused(adapter=None)


@pytest.mark.parametrize(
    ("option", "file", "sentence"),
    [
        ("base", "small-sdxl", "--base: small-sdxl.safetensors is a checkpoint of SDXL, expected SD1.5"),
        ("upgraded", "small-sd15", "--upgraded: small-sd15.safetensors is a checkpoint of SD1.5, expected SDXL"),
    ],
)
def test_a_checkpoint_of_the_wrong_family_is_named(option, file, sentence, refused):
    assert sentence in refused(**{option: file})


def test_a_file_of_another_kind_is_named(refused, small):
    assert "--adapter: small-style.safetensors is not an X-Adapter file" in refused(adapter=str(small.lora))
    assert "--base: small.safetensors is no checkpoint that is known" in refused(base=str(small.adapter))
    assert "--lora: small.safetensors is no LoRA" in refused("--lora", str(small.adapter))


def test_an_adapter_for_other_models_is_named(refused, tmp_path):
    path = save(AdapterPlan(in_channels=(128, 128, 32)).weights(), tmp_path / "other.safetensors")
    assert "--adapter: The adapter does not fit the base model: level 1" in refused(adapter=str(path))


def test_a_cut_off_file_is_named(refused, tmp_path, small):
    path = tmp_path / "cut.safetensors"
    path.write_bytes(small.base.read_bytes()[:5000])
    assert "--base: cut.safetensors" in refused(base=str(path))


def test_a_text_is_no_safetensors_file(refused, tmp_path):
    path = tmp_path / "text.safetensors"
    path.write_text("Once upon a time there was a checkpoint.")
    assert "--base: text.safetensors is no safetensors file: no header begins" in refused(base=str(path))


def broken(path, source, key: str | None = None):
    """A copy of a file of tensors with a NaN in it."""
    tensors = safetensors.torch.load_file(source)
    name = key or next(name for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.ndim > 1)
    tensors[name].view(-1)[0] = torch.nan
    safetensors.torch.save_file(tensors, path)
    return name


def test_plugins_that_are_not_finite_are_named(refused, small, tmp_path, control_image):
    path = tmp_path / "nan.safetensors"
    key = broken(path, small.lora)
    assert f"--lora: nan.safetensors: '{key}' holds NaN or infinite values" in refused("--lora", str(path))
    broken(path, small.controlnet)
    control = ["--controlnet", str(path), "--control-image", str(control_image)]
    assert "--controlnet: nan.safetensors: '" in refused(*control)


def test_a_t2i_adapter_of_another_width_or_beside_a_controlnet_is_refused(refused, tmp_path, control_image):
    small_models.t2i_adapter((32, 64)).save_pretrained(tmp_path / "narrow")
    small_models.t2i_adapter().save_pretrained(tmp_path / "t2i")
    image = str(control_image)
    told = refused("--controlnet", str(tmp_path / "narrow"), "--control-image", image)
    assert "--controlnet: The T2I-Adapter narrow gives features of 32, 64 channels" in told
    told = refused("--controlnet", str(tmp_path / "t2i"), "small-edges", "--control-image", image, image)
    assert "--controlnet: ControlNets and T2I-Adapters cannot act in one picture" in told


def test_a_picture_that_overflows_is_none(generate, small, tmp_path, capsys):
    tensors = safetensors.torch.load_file(small.lora)
    path = tmp_path / "huge.safetensors"
    safetensors.torch.save_file({key: tensor * 1e18 for key, tensor in tensors.items()}, path)
    assert generate("--lora", str(path)) == 2
    # after the progress that was shown
    assert "The latents of the base model are no longer finite" in capsys.readouterr().err.splitlines()[-1]
    assert not generate.pictures()


def test_a_conversion_does_not_write_over_a_file(small, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"mine")
    assert main(["convert", str(small.adapter), str(out)]) == 2
    assert "is there already; --force writes over it" in capsys.readouterr().err
    assert out.read_bytes() == b"mine"
    assert main(["convert", str(small.adapter), str(out), "--force"]) == 0
    assert out.stat().st_size > 4


def test_a_lora_that_is_not_there_is_told_with_where_it_was_looked_for(refused, small):
    said = refused(
        "--lora", "nobody", models_dir=None, base=str(small.base), upgraded=str(small.upgraded), adapter="None"
    )
    assert "--lora: there is no file nobody in /" in said


@pytest.mark.parametrize("words", [["--help"], ["generate", "--help"], ["generate", "--width", "100"]])
def test_help_and_mistakes_take_no_heavy_imports(words):
    program = (
        "import sys\nfrom lib_xadapter.headless.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "assert not {'torch', 'diffusers', 'transformers'} & sys.modules.keys()"
    )
    needed = ["--base", "x", "--upgraded", "y", "--adapter", "None"] if "--width" in words else []
    ended = subprocess.run(
        [sys.executable, "-c", program, *words, *needed], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr


def test_the_options_choices_are_those_of_the_mapping_path():
    assert options.MAPPING_CHOICES == mapping_choice.MAPPING_CHOICES


def test_a_pickle_that_holds_code_is_refused(refused, tmp_path):
    path = tmp_path / "evil.ckpt"
    torch.save({"state_dict": {"model.diffusion_model.x": print}}, path)
    said = refused(base=str(path))
    assert "--base: evil.ckpt" in said
    assert "weights_only" not in said


def test_an_unreadable_picture_is_named(refused, tmp_path):
    path = tmp_path / "edge.png"
    path.write_bytes(b"no picture")
    control = ["--controlnet", "small-edges", "--control-image", str(path)]
    assert "--control-image: edge.png is no picture that can be read" in refused(*control)
    path.unlink()
    assert f"--control-image: there is no file {path}" in refused(*control)


def test_a_folder_that_cannot_be_written_to_is_named(generate, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert generate(out=str(tmp_path / "file" / "out")) == 2
    assert "--out is" in capsys.readouterr().err


def test_a_folder_that_is_no_model_is_named(refused, tmp_path):
    assert "misses model_index.json" in refused(base=str(tmp_path))


@pytest.mark.parametrize("command", [["inspect"], ["convert"], ["demo", "--seed", "-1"], ["convert", "a", "b.bin"]])
def test_the_other_commands_say_so_too(command, capsys):
    try:
        status = main(command)
    except SystemExit as ended:
        status = ended.code
    assert status == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_conversion_that_fails_leaves_nothing(tmp_path, capsys):
    source, out = tmp_path / "lora.safetensors", tmp_path / "out.safetensors"
    safetensors.torch.save_file({"x": torch.zeros(1)}, source)
    assert main(["convert", str(source), str(out)]) == 2
    assert list(tmp_path.iterdir()) == [source]


def test_folders_of_diffusers_are_found_by_name_and_what_they_hold_is_not(tmp_path):
    """In a models folder, beside single files."""
    for name in ("mine/model_index.json", "mine/unet/config.json", "mine/unet/weights.safetensors", "other.ckpt"):
        path = tmp_path / "Stable-diffusion" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert find_file("mine", "checkpoint", tmp_path, "--base") == tmp_path / "Stable-diffusion" / "mine"
    assert find_file("other", "checkpoint", tmp_path, "--base").name == "other.ckpt"
    with pytest.raises(WrongFile, match=r"there is mine, other\.ckpt"):
        find_file("weights", "checkpoint", tmp_path, "--base")
