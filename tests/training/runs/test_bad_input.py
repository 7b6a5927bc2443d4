"""What is wrong is said in one line that names the option, with exit status 2 and nothing written."""

from __future__ import annotations

import shutil

import pytest

from lib_xadapter.mapping import MappingLayers, layout_for, save_adapter
from tests.training.tiny_models import save_upgraded
from tests.training.tiny_pair import tiny_base, tiny_upgraded

WRONG = [
    ({"size": 36}, "--size is 36, expected a multiple of 16"),
    ({"size": 0}, "--size is 0, expected a multiple of 16"),
    ({"batch": 0}, "--batch is 0, expected a whole number from 1"),
    ({"batch": 2.5}, "--batch is 2.5, expected a whole number from 1"),
    ({"learning-rate": -1}, "--learning-rate is -1, expected a number from 0"),
    ({"learning-rate": "nan"}, "--learning-rate is nan, expected a number from 0"),
    ({"empty-prompts": 1.5}, "--empty-prompts is 1.5, expected a number from 0 to 1"),
    ({"keep": 0}, "--keep is 0, expected a whole number from 1"),
    ({"positions": "everywhere"}, "argument --positions: invalid choice: 'everywhere'"),
    ({"steps": "many"}, "argument --steps: invalid _number value: 'many'"),
    ({"optimizer": "adamw-8bit"}, "--optimizer is adamw-8bit: it needs bitsandbytes, which is not installed"),
    ({"tracker": "paper"}, "--tracker is 'paper'"),
    ({"base": "nobody"}, "--base: there is no file nobody"),
    ({"data": "nowhere"}, "--data: "),
    ({"init": "nobody"}, "--init: there is no file nobody"),
    ({"norm": ""}, "GroupNorm needs multiples of 32 channels"),
]


@pytest.fixture
def refused(train, capsys):
    """Runs a command that must be refused; gives its one line."""

    def run(*more: str, **options: object) -> str:
        capsys.readouterr()
        try:
            status = train(*more, **options)
        except SystemExit as ended:
            status = ended.code
        said = capsys.readouterr().err.strip()
        assert status == 2, said
        (line,) = [line for line in said.splitlines() if line.startswith("xadapter train: ")]
        return line

    return run


@pytest.mark.parametrize(("options", "sentence"), WRONG, ids=[str(options) for options, _ in WRONG])
def test_a_wrong_option_is_named(options, sentence, refused, train):
    more = ("--norm",) if options.pop("norm", None) == "" else ()
    assert sentence in refused(*more, **options)
    assert not train.out.exists()


@pytest.mark.parametrize("missing", ["base", "upgraded", "data"])
def test_a_missing_option_is_named(missing, refused):
    assert f"the following arguments are required: --{missing}" in refused(**{missing: None})


def test_models_of_the_wrong_family_are_named(refused, tiny):
    assert "--base: The folder" in (said := refused(base=tiny / "upgraded")) and "expected SD1.5" in said
    assert "expected SDXL" in refused(upgraded=tiny / "base")


def test_a_folder_without_pictures_is_named(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "--data: " in refused(data=tmp_path / "empty")


def test_pictures_without_captions_are_named(refused, pictures, tmp_path):
    bare = shutil.copytree(pictures, tmp_path / "bare", ignore=shutil.ignore_patterns("*.txt"))
    assert "caption" in refused(data=bare)


def test_a_shard_that_is_none_is_named(refused, tmp_path):
    (tmp_path / "00000.tar").write_bytes(b"no tar" * 100)
    assert "00000.tar" in refused(data=tmp_path / "00000.tar")


def test_a_folder_with_a_training_is_not_begun_anew(refused, train):
    train(steps=1)
    assert "which holds a training: --resume goes on with it" in refused(steps=1)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"learning-rate": 2e-3}, "--learning-rate is 0.002, but step-00000001.safetensors was trained with 0.001"),
        ({"fusion": "spade"}, "--fusion is 'spade', but step-00000001.safetensors was trained with 'addition'"),
        ({"seed": 1}, "--seed is 1, but step-00000001.safetensors was trained with 0"),
        ({"steps": 9}, "--steps is 9, but step-00000001.safetensors was trained with 1"),
    ],
    ids=str,
)
def test_another_recipe_does_not_go_on(options, sentence, refused, train):
    train(steps=1)
    assert sentence in refused("--resume", **{"steps": 1, **options})


def test_other_pictures_and_models_do_not_go_on(refused, train, pictures, tmp_path):
    train(steps=1)
    fewer = shutil.copytree(pictures, tmp_path / "fewer", ignore=shutil.ignore_patterns("000.*"))
    said = refused("--resume", steps=1, data=fewer)
    assert "--data is another than that which the checkpoint was trained with" in said
    other = save_upgraded(tmp_path / "other", prediction_type="v_prediction")
    assert "--upgraded is another" in refused("--resume", steps=1, upgraded=other)


def test_a_file_to_go_on_from_must_be_of_the_recipe(refused, tmp_path):
    layers = MappingLayers(layout_for(tiny_base(), tiny_upgraded()), "guidance")
    save_adapter(layers, tmp_path / "own.safetensors")
    assert "--init: its fusion is guidance, --fusion is addition" in refused(init=tmp_path / "own.safetensors")


def test_a_model_that_predicts_something_else_is_told(refused, tmp_path):
    other = save_upgraded(tmp_path / "other", prediction_type="sample")
    assert "predicts 'sample', expected noise (epsilon) or velocity" in refused(upgraded=other)
