"""Every kind of LoRA file changes weights as the WebUI's own Lora extension does: tests/golden/webui_loras.npz."""

from __future__ import annotations

from dataclasses import replace

import numpy
import pytest
import torch

from lib_xadapter.headless.compvis_layout import (
    BASE_TEXT_PREFIX,
    FIRST_TEXT_PREFIX,
    SD2_TEXT_PREFIX,
    SECOND_TEXT_PREFIX,
    clip_origin,
    open_clip_origin,
    write_compvis,
)
from lib_xadapter.headless.loras import merge_lora
from lib_xadapter.headless.model_files import load_base, load_upgraded
from tests.headless.lora_figures import GOLDEN, Case, cases, of_the_webui, sampled
from tests.headless.small_sd2 import saved, sd2_weights
from tests.small_models import unet_tensors
from tests.webui.server import Installation

CASES = cases()
TEXT_ENCODERS = {
    "base": ((BASE_TEXT_PREFIX, "text_encoder", clip_origin),),
    "sd2": ((SD2_TEXT_PREFIX, "text_encoder", open_clip_origin),),
    "upgraded": (
        (FIRST_TEXT_PREFIX, "text_encoder", clip_origin),
        (SECOND_TEXT_PREFIX, "text_encoder_2", open_clip_origin),
    ),
}
NEARLY = 1e-5


@pytest.fixture(scope="module")
def loaded(small, tmp_path_factory):
    sd2 = saved(sd2_weights(small.base), tmp_path_factory.mktemp("sd2") / "sd2.safetensors")
    return {
        "base": load_base(small.base, torch.float32, small.tokenizer),
        "sd2": load_base(sd2, torch.float32, small.tokenizer),
        "upgraded": load_upgraded(small.upgraded, torch.float32, small.tokenizer),
    }


@pytest.fixture(scope="module")
def before(loaded) -> dict[str, dict[str, torch.Tensor]]:
    """Each model's weights without a LoRA."""
    return {
        name: {key: value.clone() for key, value in as_checkpoint(pipeline, name).items()}
        for name, pipeline in loaded.items()
    }


@pytest.fixture
def pipelines(loaded):
    """Whose weights are put back afterwards."""
    parts = [
        getattr(pipeline, name)
        for pipeline in loaded.values()
        for name in ("unet", "text_encoder", "text_encoder_2")
        if hasattr(pipeline, name)
    ]
    states = [{key: value.clone() for key, value in part.state_dict().items()} for part in parts]
    yield loaded
    for part, state in zip(parts, states, strict=True):
        part.load_state_dict(state)


def as_checkpoint(pipeline, model: str) -> dict[str, torch.Tensor]:
    """All weights under the names of single files."""
    found = unet_tensors(pipeline.unet)
    for prefix, name, origin in TEXT_ENCODERS[model]:
        found |= write_compvis(getattr(pipeline, name).state_dict(), prefix, origin)
    return found


def changed_by(case: Case, pipelines, before, folder) -> dict[str, torch.Tensor]:
    # models as narrow as these are not told by their widths
    model = "upgraded" if case.model == "upgraded" else "base"
    base = pipelines["sd2" if case.model == "sd2" else "base"]
    lora = replace(case.write(folder), models=(model,))
    assert merge_lora(lora, base, pipelines["upgraded"]) == model
    after = as_checkpoint(pipelines[case.model], case.model)
    return {key: value for key, value in after.items() if not torch.equal(value, before[case.model][key])}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_weights_are_those_that_the_webui_gave(case, pipelines, before, tmp_path):
    golden = numpy.load(GOLDEN)
    expected = {name.split("/", 1)[1]: golden[name] for name in golden if name.startswith(f"{case.name}/")}
    changed = changed_by(case, pipelines, before, tmp_path)
    assert changed.keys() == expected.keys()
    for key, value in changed.items():
        assert numpy.linalg.norm(sampled(value) - expected[key]) < NEARLY * numpy.linalg.norm(expected[key]), key


@pytest.fixture(scope="module")
def webui_weights(small, tmp_path_factory):
    installation = Installation.from_environment()
    if installation is None:
        pytest.skip("needs an AUTOMATIC1111 WebUI: set WEBUI_DIR to its folder (and WEBUI_PYTHON to its Python)")
    return of_the_webui(installation, small, CASES, tmp_path_factory.mktemp("loras"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_weights_are_those_of_the_webui(case, pipelines, before, tmp_path, webui_weights):
    expected = webui_weights[case.name]
    changed = changed_by(case, pipelines, before, tmp_path)
    assert changed.keys() == expected.keys()
    for key, value in changed.items():
        assert float((value - expected[key]).norm() / expected[key].norm()) < NEARLY, key
