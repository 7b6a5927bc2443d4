"""`--annotate` makes the ControlNet's map of a picture, by controlnet_aux."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy
import pytest
from PIL import Image

from lib_xadapter.errors import WrongArgument, WrongFile
from lib_xadapter.headless.annotator_names import Annotator, read_annotators
from lib_xadapter.headless.annotators import annotated
from lib_xadapter.headless.job import Job

HALVES = Image.fromarray(numpy.repeat(numpy.array([[0, 255]], dtype=numpy.uint8), 64, axis=0).repeat(64, axis=1))
JOB = Job(width=256, height=128, control_images=(HALVES,), control_scales=((1.0,),))


@pytest.fixture
def installed(monkeypatch):
    """Something that stands for controlnet_aux: its annotators turn a picture's greys around."""

    class Detector:
        def __init__(self, folder: str = "") -> None:
            self.folder = folder

        @classmethod
        def from_pretrained(cls, folder: str):
            if "broken" in folder:
                raise ValueError("no weights")
            return cls(folder)

        def __call__(self, image, detect_resolution, image_resolution):
            module.asked = (image.size, detect_resolution, image_resolution)
            return Image.fromarray(255 - numpy.asarray(image))

    module = ModuleType("controlnet_aux")
    module.__spec__ = importlib.util.spec_from_loader("controlnet_aux", loader=None)
    module.CannyDetector = module.MidasDetector = Detector
    monkeypatch.setitem(sys.modules, "controlnet_aux", module)
    return module


def weights(folder: Path) -> Path:
    folder.mkdir()
    (folder / "dpt_hybrid-midas-501f0c75.pt").touch()
    return folder


def test_maps_are_made_at_the_bases_size(installed):
    made = annotated(replace(JOB, annotators=(Annotator("canny"),)))
    assert installed.asked == ((128, 64), 64, 64)
    (map_,) = made.control_maps
    assert numpy.asarray(map_)[0, 0].tolist() == [255] * 3
    # what the base may start from stays the picture
    assert made.control_images == JOB.control_images


def test_a_map_that_is_given_is_left_alone(installed):
    assert annotated(JOB) == JOB
    both = replace(JOB, control_images=(HALVES, HALVES), control_scales=((1.0,), (1.0,)))
    made = annotated(replace(both, annotators=(None, Annotator("canny"))))
    assert made.control_maps[0] is HALVES


def test_weights_are_read_from_their_folder(installed, tmp_path):
    folder = weights(tmp_path / "midas")
    assert read_annotators([f"depth:{folder}"], 1) == (Annotator("depth", folder),)
    with pytest.raises(WrongFile, match="--annotate: the weights of 'depth' in .*broken cannot be read"):
        annotated(replace(JOB, annotators=(Annotator("depth", weights(tmp_path / "broken")),)))


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["canny", "canny"], "--annotate is given 2 times, expected once for each --controlnet"),
        (["crayon"], "--annotate: there is no 'crayon'; there is none, canny"),
        (["depth"], "'depth' needs a folder with dpt_hybrid-midas-501f0c75.pt; write depth:FOLDER"),
        (["depth:nowhere"], "needs a folder with dpt_hybrid-midas-501f0c75.pt; in nowhere there is none"),
    ],
)
def test_what_is_wrong_is_named(given, sentence, installed):
    with pytest.raises(WrongArgument, match=sentence):
        read_annotators(given, 1)


def test_without_controlnet_aux_maps_are_given_ready(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert read_annotators([], 2) == (None, None)
    assert read_annotators(["none"], 1) == (None,)
    with pytest.raises(WrongArgument, match=r"--annotate needs controlnet_aux: pip install"):
        read_annotators(["canny"], 1)


def test_the_command_line_makes_the_map(generate, installed, tmp_path):
    HALVES.save(tmp_path / "halves.png")
    control = ["--controlnet", "small-edges", "--control-image", str(tmp_path / "halves.png"), "--control-scale", "2"]
    small = {"steps": "1", "width": "128", "height": "128"}
    assert generate(*control, **small) == 0
    assert generate(*control, "--annotate", "canny", **small) == 0
    given, made = map(Image.open, generate.pictures())
    assert not numpy.array_equal(numpy.asarray(given), numpy.asarray(made))
    assert "Module: canny" in made.text["parameters"] and "Module: none" in given.text["parameters"]


@pytest.mark.parametrize("name", ["canny", "lineart_standard"])
def test_edges_are_where_the_picture_has_them(name):
    """By the real package."""
    pytest.importorskip("controlnet_aux", reason="needs the extra 'annotators'")
    (map_,) = annotated(replace(JOB, annotators=read_annotators([name], 1))).control_maps
    columns = numpy.asarray(map_.convert("L"), dtype=float).mean(axis=0)
    middle = len(columns) // 2
    assert columns[middle - 6 : middle + 6].max() == columns.max() > 0
    assert columns[: middle // 3].max() == 0
