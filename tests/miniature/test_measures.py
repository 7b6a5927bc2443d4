"""The networks by which miniature pictures are measured: they learn, and `evaluate` reads their files."""

from __future__ import annotations

import pytest

pytest.importorskip("diffusers", reason="needs the extra 'headless'")
pytest.importorskip("cv2", reason="needs the extra 'evaluate'")

import numpy
import torch
from PIL import Image

from lib_xadapter.evaluation.figures.clip import Clip
from lib_xadapter.evaluation.maps import DepthEstimator
from lib_xadapter.miniature import measures
from lib_xadapter.miniature.captions import caption_of, facts_of
from lib_xadapter.miniature.drawing import base_picture
from lib_xadapter.miniature.learning import Course, Drawn, learn
from lib_xadapter.miniature.scenes import scene_of
from lib_xadapter.miniature.vocabulary import write_tokenizer

COURSE = Course(steps=30, batch=8, learning_rate=3e-3, warmup=2)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("network", "loss_of"),
    [(measures.ClipWithStyles, measures.clip_loss), (measures.depth_estimator, measures.depth_loss)],
    ids=["clip", "depth"],
)
def test_eight_pictures_are_learned_by_heart(network, loss_of, tmp_path):
    module = network()
    loss = loss_of(module, COURSE.batch)

    def always_the_same(drawn):
        return loss(Drawn.of(9, 0))

    with torch.no_grad():
        first = float(always_the_same(None))
    learn(module, always_the_same, COURSE, tmp_path, "stage")
    with torch.no_grad():
        assert float(always_the_same(None)) < 0.8 * first


def test_evaluate_reads_the_clip(tmp_path):
    write_tokenizer(tmp_path / "tokenizer")
    model = measures.clip().eval()
    measures.save_clip(model, tmp_path / "clip", tmp_path / "tokenizer")
    scene = scene_of(1)
    clip = Clip(tmp_path / "clip")
    assert clip.of_pictures([Image.fromarray(base_picture(scene))]).shape == (1, measures.WIDTH)
    told, other = clip.of_texts([caption_of(facts_of(scene)), caption_of(facts_of(scene_of(2)))])
    assert not numpy.allclose(told, other)


def test_evaluate_reads_the_depth_estimator(tmp_path):
    measures.save_depth_estimator(measures.depth_estimator(), tmp_path / "depth")
    found = DepthEstimator(tmp_path / "depth")(Image.fromarray(base_picture(scene_of(1))))
    assert (found.size, found.mode) == ((64, 64), "L")
    assert numpy.asarray(found).max() == 255
