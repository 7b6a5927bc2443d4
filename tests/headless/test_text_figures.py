"""What the text encoders say is what the WebUI's own text encoding says: tests/golden/webui_text.npz."""

from __future__ import annotations

import numpy
import pytest

from tests.headless.text_figures import (
    GOLDEN,
    PROMPTS,
    SmallEncoders,
    of_the_webui,
    sampled,
    told_here,
    write_inversions,
)
from tests.webui.server import Installation

NEARLY = 1e-5


@pytest.fixture(scope="module")
def encoders():
    return SmallEncoders.made()


@pytest.fixture(scope="module")
def embeddings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inversions") / "embeddings"
    write_inversions(folder)
    return folder


@pytest.fixture(scope="module")
def ours(encoders, embeddings):
    return told_here(encoders, embeddings)


def of_prompt(told, number: int) -> dict:
    return {key: told[key] for key in told if key.split("/")[1] == str(number)}


numbered = pytest.mark.parametrize(
    "number", range(len(PROMPTS)), ids=[f"{prompt[:40]} {skip}" for prompt, skip in PROMPTS]
)


@numbered
def test_each_model_is_told_what_the_webui_told_it(number, ours):
    expected, told = of_prompt(numpy.load(GOLDEN), number), of_prompt(ours, number)
    assert told.keys() == expected.keys()
    for key, value in told.items():
        found = sampled(value)
        assert found.shape == expected[key].shape, key
        assert numpy.linalg.norm(found - expected[key]) < NEARLY * numpy.linalg.norm(expected[key]), key


@pytest.fixture(scope="module")
def theirs(encoders, embeddings):
    installation = Installation.from_environment()
    if installation is None:
        pytest.skip("needs an AUTOMATIC1111 WebUI: set WEBUI_DIR to its folder (and WEBUI_PYTHON to its Python)")
    return of_the_webui(installation, encoders, embeddings.parent)


@numbered
def test_each_model_is_told_what_the_webui_tells_it(number, ours, theirs):
    expected, told = of_prompt(theirs, number), of_prompt(ours, number)
    assert told.keys() == expected.keys()
    for key, value in told.items():
        assert value.shape == expected[key].shape, key
        assert float((value - expected[key]).norm() / expected[key].norm()) < NEARLY, key


def test_a_textual_inversion_changes_what_is_said(ours):
    """Lest none be found on both sides."""
    plain, named = (ours[f"sd1/{number}/0/tokens"] for number in (0, 9))
    assert float((plain - named).norm() / plain.norm()) > 1e-2
