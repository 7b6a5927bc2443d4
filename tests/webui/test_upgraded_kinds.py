"""Other models than one plain SDXL: refiners, checkpoints of the second pass, inpainting checkpoints."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from tests.pictures import grey_levels_apart

from .asking import BASE, UPGRADED, over, plain, sdedit, with_xadapter
from .conftest import PLAIN, is_blank, same_bytes
from .server import Installation, WebUIServer, environment

OTHER, REFINER, INPAINTING = "otherxl", "tinyrefiner", "tinyxli"
MEMORY = [{"memory": "lockstep"}, {"memory": "recorded"}]
HIRES = {
    "enable_hr": True,
    "hr_scale": 1.5,
    "hr_upscaler": "Lanczos",
    "denoising_strength": 0.6,
    "hr_second_pass_steps": 4,
}
JOINT = int(0.8 * PLAIN["steps"]) + 1
"""Steps of SDXL at the usual switch point."""


@pytest.fixture(scope="module")
def upgraded(installation: Installation, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("upgraded")
    script = Path(__file__).parent / "small_upgraded.py"
    command = [installation.python, "-I", script, installation.folder, folder, models / "models/tiny-clip"]
    made_them = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert made_them.returncode == 0, made_them.stderr
    return folder


@pytest.fixture(scope="module", params=[1, 2, 3], ids=lambda kept: f"{kept} kept")
def server(start_webui, models: Path, upgraded: Path, request) -> Iterator[WebUIServer]:
    """Servers that keep one and several checkpoints loaded."""
    options = {"sd_checkpoints_limit": request.param, "sd_checkpoints_keep_in_cpu": True}
    with start_webui("upgraded", models=[models, upgraded], options=options) as started:
        yield started


@pytest.fixture(scope="module")
def before(server) -> tuple[Image.Image, Image.Image]:
    """A plain picture and one of X-Adapter's, on a server that has had a refiner already."""
    plain(server, refiner_checkpoint=REFINER, refiner_switch_at=0.5)
    return plain(server), with_xadapter(server, {}).image


def refined(server: WebUIServer, given: dict, refiner: str, **request):
    with server.recorded() as calls:
        answer = with_xadapter(server, given, refiner_checkpoint=refiner, refiner_switch_at=0.5, **request)
    return answer, [call["model"] for call in calls]


def said(server: WebUIServer, sentence: str) -> int:
    return server.log.count(sentence)


class TestRefiner:
    def test_an_sdxl_of_the_same_shape_goes_on_with_the_adapter(self, server, before):
        (in_lockstep, models), (recorded, _) = (refined(server, memory, OTHER) for memory in MEMORY)
        assert models[-2 * JOINT :] == [BASE, UPGRADED] * JOINT
        assert same_bytes(in_lockstep.image, recorded.image)
        assert "Refiner: otherxl" in in_lockstep.infotexts[0]
        assert grey_levels_apart(in_lockstep.image, before[1]) > 1

    @pytest.mark.parametrize("memory", MEMORY, ids=str)
    def test_the_sdxl_refiner_goes_on_alone_and_a_line_says_so(self, server, before, memory):
        earlier = said(server, "does not fit tinyrefiner")
        answer, models = refined(server, memory, REFINER, seed=31)
        assert models[-2:] == [UPGRADED] * 2
        assert models.count(UPGRADED) == JOINT
        assert not is_blank(answer.image)
        assert said(server, "does not fit tinyrefiner") == earlier + 1

    @pytest.mark.parametrize("refiner", [OTHER, REFINER])
    def test_without_residuals_it_refines_as_the_tab_does(self, server, before, refiner):
        request = {"refiner_checkpoint": refiner, "refiner_switch_at": 0.5}
        given = {"weight": 0, "switch_point": 0.6, "return_base_image": True}
        ours, base = with_xadapter(server, given, **request).images
        assert grey_levels_apart(ours, sdedit(server, base, 0.6, **request)) <= 1

    @pytest.mark.parametrize("refiner", [OTHER, REFINER])
    @pytest.mark.parametrize("memory", MEMORY, ids=str)
    def test_the_next_batch_and_the_next_pictures_are_right(self, server, before, refiner, memory):
        answer, _ = refined(server, memory, refiner, n_iter=2, do_not_save_grid=True)
        second, _ = refined(server, memory, refiner, seed=PLAIN["seed"] + 1)
        assert grey_levels_apart(answer.images[1], second.image) <= 1
        assert same_bytes(plain(server), before[0])
        assert same_bytes(with_xadapter(server, {}).image, before[1])
        assert server.state()["hooks"] == []

    def test_it_refines_over_a_picture_too(self, server, before):
        request = {"refiner_checkpoint": OTHER, "refiner_switch_at": 0.5, "denoising_strength": 0.9}
        made = []
        for memory in MEMORY:
            # the VAE draws from torch's own generator, which this leaves in one place
            plain(server)
            made.append(over(server, before[0], memory, **request).image)
        in_lockstep, recorded = made
        assert same_bytes(in_lockstep, recorded)
        assert grey_levels_apart(in_lockstep, over(server, before[0], **request).image) > 1


class TestHiresCheckpoint:
    @pytest.mark.parametrize("memory", MEMORY, ids=str)
    def test_another_sdxl_goes_along(self, server, before, memory):
        with server.recorded() as calls:
            with_xadapter(server, memory, hr_checkpoint_name=OTHER, **HIRES, seed=41)
        last = [call["model"] for call in calls[-8:]]
        assert last.count(BASE) == last.count(UPGRADED) == 4
        assert same_bytes(plain(server), before[0])

    @pytest.mark.parametrize("memory", MEMORY, ids=str)
    def test_one_that_does_not_fit_ends_x_adapters_part_there_and_a_line_says_so(self, server, before, memory):
        earlier = said(server, "does not fit tinyrefiner")
        with server.recorded() as calls:
            answer = with_xadapter(server, memory, hr_checkpoint_name=REFINER, **HIRES, seed=42)
        assert [call["model"] for call in calls[-4:]] == [UPGRADED] * 4
        assert answer.image.size == (384, 384)
        assert said(server, "does not fit tinyrefiner") == earlier + 1
        assert same_bytes(plain(server), before[0])


class TestInpaintingCheckpoint:
    @pytest.fixture
    def inpainting(self, server, before) -> Iterator[WebUIServer]:
        server.post("/sdapi/v1/options", {"sd_model_checkpoint": INPAINTING})
        yield server
        server.post("/sdapi/v1/options", {"sd_model_checkpoint": "tinyxl"})

    def test_it_is_guided_from_noise_and_over_a_mask(self, inpainting, before):
        mask = Image.new("L", (PLAIN["width"], PLAIN["height"]), 0)
        ImageDraw.Draw(mask).ellipse((70, 70, 180, 190), fill=255)
        masked = {"mask": mask, "inpaint_full_res": False}
        guided, alone = (over(inpainting, before[0], given, **masked).image for given in ({}, {"weight": 0}))
        assert grey_levels_apart(guided, alone) > 1
        assert grey_levels_apart(alone, over(inpainting, before[0], **masked).image) <= 1
        assert not is_blank(with_xadapter(inpainting, {}).image)
