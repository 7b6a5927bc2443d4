"""One table of arguments drives the REST object, its schema and the infotext."""

from __future__ import annotations

import re

import jsonschema
import pytest

from lib_xadapter.errors import WrongArgument
from lib_xadapter.infotext import Change, read_infotext, write_infotext
from lib_xadapter.settings import Settings, defaults, json_schema, read_settings
from tests.pasted_infotext import pasted


def test_an_empty_object_means_the_defaults():
    settings = read_settings({})
    assert settings == Settings()
    assert (settings.enabled, settings.switch_point, settings.weights) == (True, 0.8, (1.0, 1.0, 1.0))


def test_the_weight_is_one_number_or_one_a_level():
    assert read_settings({"weight": 2}).weights == (2.0, 2.0, 2.0)
    assert read_settings({"weight": [1, 0.5, 0]}).weights == (1.0, 0.5, 0.0)


class TestBaseSeeds:
    """The base's own count on from image to image as SDXL's do, to which the job's first one belongs."""

    def test_without_one_they_are_sdxls(self):
        assert Settings().base_seeds([7, 8], 7) == [7, 8]
        assert Settings().of_image(8, 7) == Settings()

    def test_its_own_counts_on_over_all_batches(self):
        assert Settings(base_seed=40).base_seeds([9, 10], 7) == [42, 43]

    def test_where_all_seeds_are_alike_its_are_alike(self):
        assert Settings(base_seed=40).base_seeds([7, 7], 7) == [40, 40]

    def test_each_image_alone_has_the_seed_that_it_has_among_others(self):
        alone = Settings(base_seed=40).of_image(9, 7)
        assert alone.base_seeds([9], 9) == [42]

    def test_after_the_last_seed_comes_the_first(self):
        assert Settings(base_seed=2**32 - 1).base_seeds([7, 8], 7) == [2**32 - 1, 0]


@pytest.mark.parametrize("name", ["None", "none"])
def test_the_adapter_none_is_the_baseline(name):
    assert not read_settings({"adapter": name}).has_adapter


WRONG = [
    ({"swich_point": 1}, "'swich_point' is no argument"),
    ({"switch_point": 1.5}, "'switch_point' is 1.5, expected a number from 0 to 1"),
    ({"switch_point": "high"}, "'switch_point' is 'high', expected a number"),
    ({"switch_point": True}, "'switch_point' is True, expected a number"),
    ({"switch_point": float("nan")}, "'switch_point' is nan"),
    ({"enabled": 1}, "'enabled' is 1, expected true or false"),
    ({"base_prompt": None}, "'base_prompt' is None, expected text"),
    ({"base_width": 100}, "'base_width' is 100, expected 0 or a multiple of 8 from 64 to 2048"),
    ({"base_width": 56}, "'base_width' is 56"),
    ({"base_height": 2056}, "'base_height' is 2056"),
    ({"base_steps": 2.5}, "'base_steps' is 2.5, expected a whole number"),
    ({"base_steps": -1}, "'base_steps' is -1, expected a whole number from 0"),
    ({"base_cfg_scale": -1}, "'base_cfg_scale' is -1, expected a number from 0"),
    ({"base_seed": -2}, "'base_seed' is -2, expected a whole number from -1"),
    ({"refresh_every": 0}, "'refresh_every' is 0, expected a whole number from 1"),
    ({"memory": "little"}, "'memory' is 'little', expected one of auto, lockstep, recorded"),
    ({"base_start": "image"}, "'base_start' is 'image', expected one of noise, control image"),
    ({"weight": [1, 2]}, r"'weight' is \[1, 2\], expected a number or a list of 3 numbers"),
    ({"weight": [1, 2, "3"]}, "'weight' is"),
    ({"guidance_start": 0.6, "guidance_end": 0.5}, "'guidance_start' is 0.6, after 'guidance_end' at 0.5"),
]


@pytest.mark.parametrize(("given", "sentence"), WRONG)
def test_a_wrong_argument_is_named(given, sentence):
    with pytest.raises(WrongArgument, match=sentence):
        read_settings(given)


@pytest.mark.parametrize(
    "given", [given for given, sentence in WRONG if "nan" not in sentence and "guidance_end" not in given]
)
def test_the_schema_refuses_what_is_refused(given):
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(given, json_schema())


def test_the_schema_takes_what_is_taken():
    jsonschema.validate(defaults(), json_schema())
    jsonschema.validate({"weight": [1, 0, 2], "base_width": 640, "base_steps": 12}, json_schema())
    assert set(json_schema()["properties"]) == set(defaults())


CHANGED = [
    {"switch_point": 0.35},
    {"weight": 1.25},
    {"weight": (1.0, 0.5, 0.0)},
    {"base_checkpoint": "v1-5 [abc123]", "adapter": "None"},
    {"base_prompt": "a cat, (fluffy:1.2)\nBREAK [sitting:standing:0.5]"},
    {"base_prompt": '"quoted"'},
    {"base_prompt": " spaces "},
    {"base_prompt": "512x768"},
    {"base_negative_prompt": 'he said: "no"'},
    {"base_width": 384, "base_height": 640, "base_steps": 12, "base_cfg_scale": 4.5},
    {"base_seed": 2**32 - 1, "base_start": "control image", "refresh_every": 3, "cond_only": True},
    {"guidance_start": 0.1, "guidance_end": 0.9, "single_stage": True, "return_base_image": True},
    {"uncond_weight": 0.25},
]


@pytest.mark.parametrize("changed", CHANGED)
def test_what_is_written_under_a_picture_is_read_back(changed):
    written = write_infotext(Settings(**changed), "0.1.0")
    assert len(written) == 1 + len(changed)
    assert read_settings(read_infotext(pasted(written))) == Settings(**changed)


CHANGES = (
    Change("0.9", "switch_point", before=0.5),
    Change("0.10", "switch_point", before=0.6),
    Change("1.0", "base_start", before="control image"),
)
"""Invented: the default went from 0.5 over 0.6 to today's."""


@pytest.mark.parametrize(
    ("version", "switch_point", "base_start"),
    [
        ("0.8.7", 0.5, "control image"),
        ("0.9", 0.6, "control image"),
        ("0.10.1", Settings().switch_point, "control image"),
        ("1.0", Settings().switch_point, "noise"),
        ("2.0", Settings().switch_point, "noise"),
    ],
)
def test_what_a_version_left_out_is_read_as_it_meant_then(monkeypatch, version, switch_point, base_start):
    monkeypatch.setattr("lib_xadapter.infotext.CHANGES", CHANGES)
    read = read_infotext(pasted({"X-Adapter version": version}))
    assert (read["switch_point"], read["base_start"]) == (switch_point, base_start)


def test_what_an_older_version_wrote_is_read_as_written(monkeypatch):
    monkeypatch.setattr("lib_xadapter.infotext.CHANGES", CHANGES)
    written = {"X-Adapter version": "0.1", "X-Adapter switch point": "0.8", "X-Adapter base start": "noise"}
    read = read_infotext(pasted(written))
    assert (read["switch_point"], read["base_start"]) == (0.8, "noise")


def test_what_changes_no_picture_is_not_written():
    assert write_infotext(Settings(memory="recorded"), "0.1.0") == write_infotext(Settings(), "0.1.0")
    assert "memory" not in read_infotext({"X-Adapter version": "0.1.0"})


def test_only_the_version_is_written_of_defaults():
    assert write_infotext(Settings(), "0.1.0") == {"X-Adapter version": "0.1.0"}


def test_every_key_is_one_that_the_webui_can_parse():
    changed = {name: object() for name in defaults()}
    written = write_infotext(Settings(**{**defaults(), **{name: str(value) for name, value in changed.items()}}), "1")
    for key in written:
        assert re.fullmatch(r"\w[\w \-/]+", key)


def test_a_picture_made_without_leaves_everything_as_it_is():
    assert read_infotext({"Steps": "20"}) is None
