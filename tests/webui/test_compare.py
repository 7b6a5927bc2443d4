"""The script that compares: each model alone, with the adapter and without it, from one seed."""

from __future__ import annotations

import pytest

from tests.pictures import grey_levels_apart

from .asking import BASE, HALF, UPGRADED, base_alone, made, plain, sdedit, with_xadapter
from .conftest import PLAIN, is_blank, same_bytes
from .plotting import calls_of, scripted

COMPARE = "x-adapter: compare"
STYLE = "a cat <lora:style15:1>"
BOTH = pytest.mark.parametrize("memory", ["lockstep", "recorded"])


def compare(server, seeds=1, weights="", given=None, **request):
    return scripted(server, COMPARE, [seeds, weights], given, **request)


@pytest.fixture(scope="module")
def usual(webui):
    """One seed, one weight: the grid, then four pictures."""
    return made(compare(webui, given={"memory": "lockstep"}, seed=60))


class TestPictures:
    def test_there_is_one_grid_and_each_picture_beside_it(self, usual):
        assert usual.info["index_of_first_image"] == 1
        full, half = (PLAIN["width"], PLAIN["height"]), tuple(HALF.values())
        assert [image.size for image in usual.images[1:]] == [half, full, full, full]
        grid = usual.images[0]
        assert grid.width == 4 * PLAIN["width"]
        assert grid.height > PLAIN["height"]
        assert not is_blank(grid.crop((0, 0, grid.width, grid.height - PLAIN["height"])))

    def test_the_base_alone_is_the_webuis_own(self, webui, usual):
        assert grey_levels_apart(usual.images[1], base_alone(webui, seed=60)) <= 1

    def test_without_the_adapter_it_is_the_img2img_tabs(self, webui, usual):
        assert grey_levels_apart(usual.images[2], sdedit(webui, usual.images[1], 0.8, seed=60)) <= 1

    def test_with_the_adapter_it_is_xadapters(self, webui, usual):
        assert same_bytes(usual.images[3], with_xadapter(webui, {"memory": "lockstep"}, seed=60).image)

    def test_the_upgraded_model_alone_is_the_plain_picture(self, webui, usual):
        assert same_bytes(usual.images[4], plain(webui, seed=60))

    def test_the_bases_loras_are_not_tried_on_sdxl(self, webui):
        pictures = made(compare(webui, seed=61, prompt=STYLE)).images
        assert same_bytes(pictures[4], plain(webui, seed=61, prompt="a cat"))
        assert grey_levels_apart(pictures[1], base_alone(webui, seed=61, prompt=STYLE)) <= 1

    def test_each_has_an_infotext_of_its_own(self, webui, usual):
        grid, base, carried_over, adapted, alone = usual.infotexts
        assert "Size: 128x128" in base
        assert "Model: tiny15" in base
        assert "Script: X-Adapter: compare" in grid.replace('"', "")
        assert "X-Adapter adapter: None" in carried_over
        assert adapted == with_xadapter(webui, {"memory": "lockstep"}, seed=60).infotexts[0]
        assert "X-Adapter" not in alone
        for text in usual.infotexts[1:]:
            assert "Compared" not in text

    def test_seeds_are_rows_and_weights_are_columns(self, webui):
        answer = made(compare(webui, 2, '0.5, "1,0.5,0"', seed=62))
        assert len(answer.images) == 1 + 2 * 5
        grid = answer.images[0]
        assert grid.height > 2 * PLAIN["height"]
        for row, seed in enumerate((62, 63)):
            pictures = answer.images[1 + 5 * row : 6 + 5 * row]
            assert same_bytes(pictures[2], with_xadapter(webui, {"weight": 0.5}, seed=seed).image)
            assert same_bytes(pictures[3], with_xadapter(webui, {"weight": [1, 0.5, 0]}, seed=seed).image)
            assert same_bytes(pictures[4], plain(webui, seed=seed))
        assert answer.info["all_seeds"] == [62] * 5 + [63] * 5

    def test_a_wrong_weight_is_told(self, webui):
        answer = compare(webui, 1, "strong")
        assert answer.status == 422
        assert "'weight' is 'strong'" in answer.error


class TestTheBase:
    @BOTH
    def test_it_runs_once_a_seed(self, webui, memory):
        seed = {"lockstep": 70, "recorded": 80}[memory]
        with webui.recorded() as calls:
            made(compare(webui, 2, "0.5, 1", given={"memory": memory}, seed=seed))
        count, steps = calls_of(calls), PLAIN["steps"]
        # two weights and the picture without the adapter take as many steps; SDXL alone takes all
        joint = (count[UPGRADED] // 2 - steps) // 3
        assert 0 < joint < steps
        assert count == {BASE: 2 * (steps + joint), UPGRADED: 2 * (3 * joint + steps)}

    def test_with_a_seed_of_its_own_it_runs_once(self, webui):
        with webui.recorded() as calls:
            made(compare(webui, 2, "1", given={"base_seed": 90, "base_prompt": "a dog"}, seed=91))
        count, steps = calls_of(calls), PLAIN["steps"]
        joint = (count[UPGRADED] // 2 - steps) // 2
        assert count[BASE] == steps + joint


class TestInterrupting:
    @pytest.mark.parametrize("place", ["base_unet", "upgraded_unet"])
    def test_what_was_made_is_shown_and_the_next_picture_is_right(self, webui, place):
        before = plain(webui)
        with webui.fault(place, after=3, error="interrupt"):
            answer = made(compare(webui, 2, "1", given={"memory": "lockstep"}, seed=95))
        assert len(answer.images) == 2
        assert answer.images[0].height > 2 * PLAIN["height"]
        state = webui.state()
        assert state["hooks"] == []
        assert same_bytes(plain(webui), before)

    def test_an_error_ends_it_with_its_message(self, webui):
        with webui.fault("upgraded_unet", after=2):
            answer = compare(webui, seed=96)
        assert answer.status == 500
        assert webui.state()["hooks"] == []
        assert not is_blank(made(compare(webui, seed=96)).images[3])
