"""The X/Y/Z plot over X-Adapter's arguments."""

from __future__ import annotations

import pytest

from lib_xadapter.infotext import PREFIX as KEYS
from lib_xadapter.settings import arguments as table
from tests.pictures import grey_levels_apart

from .asking import BASE, UPGRADED, made, plain, with_xadapter
from .conftest import PLAIN, same_bytes
from .plotting import PREFIX, axis_labels, calls_of, plot

WEIGHT, SWITCH_POINT, ADAPTER = PREFIX + "Weight", PREFIX + "Switch point", PREFIX + "Adapter"
LEVELS, ENABLED, PROMPT = PREFIX + "Weight of each level", PREFIX + "Enabled", PREFIX + "SD1.5 prompt"
LOCKSTEP, RECORDED = {"memory": "lockstep"}, {"memory": "recorded"}
BOTH = pytest.mark.parametrize("memory", [LOCKSTEP, RECORDED], ids=lambda memory: memory["memory"])


@pytest.fixture
def nothing_is_kept(webui):
    """Or else an earlier test's base side could be found."""
    for capacity in (0, 2.0):
        webui.post("/sdapi/v1/options", {"xadapter_recordings": capacity})
        if not capacity:
            with_xadapter(webui, {"memory": "recorded"}, seed=1, steps=1)


def cells(answer):
    """The pictures of a plot without its grid, and their infotexts."""
    made(answer)
    first = answer.info["index_of_first_image"]
    return answer.images[first:], answer.infotexts[first:]


class TestAxes:
    def test_there_is_one_for_each_argument_once(self, webui):
        ours = [label for label in axis_labels(webui) if label.startswith(PREFIX)]
        assert len(ours) == len(set(ours)) == len(table()) + 1

    def test_they_are_there_once_after_the_page_was_reloaded(self, start_webui):
        with start_webui("reloaded") as server:
            before = axis_labels(server)
            server.reload_ui()
            assert axis_labels(server) == before
            pictures, _ = cells(plot(server, (WEIGHT, "0, 1"), given={}))
            assert same_bytes(pictures[1], with_xadapter(server).image)

    def test_ranges_are_read_as_the_webui_reads_them(self, webui):
        pictures, infotexts = cells(plot(webui, (WEIGHT, "0-1 (+0.5)"), given={}))
        assert len(pictures) == 3
        for picture, infotext, weight in zip(pictures, infotexts, (0, 0.5, 1), strict=True):
            alone = with_xadapter(webui, {"weight": weight})
            assert same_bytes(picture, alone.image)
            assert infotext == alone.infotexts[0]

    def test_sums_of_a_range_are_the_numbers_that_were_meant(self, webui):
        _, infotexts = cells(plot(webui, (SWITCH_POINT, "0-1 (+0.2)"), given={}, steps=2))
        told = [text.partition(f"{KEYS}switch point: ")[2] for text in infotexts]
        # the default is not written
        assert told == ["0", "0.2", "0.4", "0.6", "", "1"]

    def test_levels_have_a_weight_each(self, webui):
        pictures, infotexts = cells(plot(webui, (LEVELS, '"1,0.5,0", 0 1 1, 0.5'), given={}))
        for picture, weight in zip(pictures, ([1, 0.5, 0], [0, 1, 1], 0.5), strict=True):
            assert same_bytes(picture, with_xadapter(webui, {"weight": weight}).image)
        assert f"{KEYS}weight: 1 0.5 0" in infotexts[0]

    def test_files_are_found_by_name(self, webui):
        pictures, infotexts = cells(plot(webui, (ADAPTER, "tiny.bin, none"), given={}))
        for picture, adapter in zip(pictures, ("tiny.bin", "None"), strict=True):
            assert same_bytes(picture, with_xadapter(webui, {"adapter": adapter}).image)
        assert f"{KEYS}adapter: tiny.bin" in infotexts[0]
        pictures, _ = cells(plot(webui, (PREFIX + "SD1.5 checkpoint", "tiny15"), given={}))
        assert same_bytes(pictures[0], with_xadapter(webui).image)

    def test_three_axes_at_once(self, webui):
        axes = (PREFIX + "Single stage", "False, True"), (PROMPT, '"", a dog'), (PREFIX + "SD1.5 steps", "2-3")
        pictures, _ = cells(plot(webui, *axes, given={}, steps=3))
        assert len(pictures) == 8
        last = with_xadapter(webui, {"single_stage": True, "base_prompt": "a dog", "base_steps": 3}, steps=3).image
        assert same_bytes(pictures[7], last)

    @pytest.mark.parametrize(
        ("axis", "values", "said"),
        [
            (SWITCH_POINT, "0.5, 1.5", "'switch_point' is 1.5"),
            (LEVELS, '"1,0"', "'weight' is [1.0, 0.0]"),
            (LEVELS, "strong", "'weight' is 'strong'"),
            (ADAPTER, "missing", "'adapter' is 'missing'"),
            (PREFIX + "SD1.5 checkpoint", "missing", "'base_checkpoint' is 'missing'"),
            (PREFIX + "Memory", "none", "'memory' is 'none'"),
            (ENABLED, "perhaps", "'perhaps' is neither true nor false"),
        ],
    )
    def test_a_wrong_value_is_told_before_anything_is_made(self, webui, axis, values, said):
        with webui.recorded() as calls:
            answer = plot(webui, (axis, values), given={})
        assert answer.status == 422
        assert said in answer.error
        assert calls == []


class TestCells:
    def test_an_axis_makes_its_cells_with_xadapter_even_if_it_is_not_ticked(self, webui):
        pictures, _ = cells(plot(webui, (WEIGHT, "0.5, 1")))
        assert same_bytes(pictures[1], with_xadapter(webui).image)

    def test_a_cell_whose_job_cannot_begin_is_not_made_without_xadapter(self, webui):
        """The plot leaves it blank and goes on."""
        with webui.pretending("jobs cannot begin"), webui.recorded() as calls:
            made(plot(webui, (WEIGHT, "0.5, 1")))
        assert calls == []
        assert "no job begins, says the probe" in webui.log

    def test_with_and_without(self, webui):
        pictures, infotexts = cells(plot(webui, (ENABLED, "true, false"), given={"weight": 0.5}))
        assert same_bytes(pictures[0], with_xadapter(webui, {"weight": 0.5}).image)
        assert same_bytes(pictures[1], plain(webui))
        assert [KEYS in infotext for infotext in infotexts] == [True, False]

    def test_no_cell_has_what_was_written_under_another(self, webui):
        prompts = ("Prompt S/R", "<lora:style15:1>, the sea")
        given = {"base_prompt": "a dog"}
        pictures, infotexts = cells(plot(webui, prompts, given=given, prompt="a cat <lora:style15:1>"))
        assert "style15" in infotexts[0]
        assert "style15" not in infotexts[1]
        assert same_bytes(pictures[1], with_xadapter(webui, given, prompt="a cat the sea").image)

    def test_nothing_stays_for_the_next_picture(self, webui):
        before = with_xadapter(webui)
        plot(webui, (WEIGHT, "0.3"), given={})
        after = with_xadapter(webui)
        assert same_bytes(after.image, before.image)
        assert after.infotexts == before.infotexts


@pytest.mark.usefixtures("nothing_is_kept")
class TestReuse:
    """Cells find what the base made for another, in either memory mode."""

    @BOTH
    def test_the_base_runs_once_for_all_weights(self, webui, memory):
        with webui.recorded() as calls:
            pictures, _ = cells(plot(webui, (WEIGHT, "1, 0.5, 0"), given=memory))
        steps, count = PLAIN["steps"], calls_of(calls)
        joint = count[UPGRADED] // 3
        assert 0 < joint < steps
        assert count == {BASE: steps + joint, UPGRADED: 3 * joint}
        for picture, weight in zip(pictures, (1, 0.5, 0), strict=True):
            alone = with_xadapter(webui, {"weight": weight, "memory": "lockstep"}).image
            assert same_bytes(picture, alone)

    @BOTH
    def test_stage_1_runs_once_for_all_switch_points(self, webui, memory):
        with webui.recorded() as calls:
            pictures, _ = cells(plot(webui, (SWITCH_POINT, "0.9, 0.5"), given=memory))
        count = calls_of(calls)
        assert count[BASE] == PLAIN["steps"] + count[UPGRADED]
        for picture, switch_point in zip(pictures, (0.9, 0.5), strict=True):
            alone = with_xadapter(webui, {"switch_point": switch_point, "memory": "lockstep"}).image
            assert same_bytes(picture, alone)

    @BOTH
    @pytest.mark.parametrize("adapters", ["tiny, None", "None, tiny"])
    def test_stage_1_runs_once_with_an_adapter_and_without(self, webui, memory, adapters):
        with webui.recorded() as calls:
            cells(plot(webui, (ADAPTER, adapters), given=memory))
        count = calls_of(calls)
        assert count[BASE] == PLAIN["steps"] + count[UPGRADED] // 2

    @BOTH
    def test_sdxls_own_prompt_may_change(self, webui, memory):
        given = {**memory, "base_prompt": "a dog"}
        with webui.recorded() as calls:
            pictures, _ = cells(plot(webui, ("Prompt S/R", "cat, horse"), given=given))
        count = calls_of(calls)
        assert count[BASE] == PLAIN["steps"] + count[UPGRADED] // 2
        alone = with_xadapter(webui, {"base_prompt": "a dog", "memory": "lockstep"}, prompt="a horse").image
        assert same_bytes(pictures[1], alone)

    @BOTH
    def test_the_bases_side_changes_what_is_found(self, webui, memory):
        with webui.recorded() as calls:
            pictures, _ = cells(plot(webui, (PROMPT, "a dog, a horse"), given=memory))
        count = calls_of(calls)
        assert count[BASE] == 2 * PLAIN["steps"] + count[UPGRADED]
        assert grey_levels_apart(pictures[0], pictures[1]) > 1

    def test_a_single_picture_in_lockstep_keeps_nothing(self, webui):
        for _ in range(2):
            with webui.recorded() as calls:
                with_xadapter(webui, LOCKSTEP)
            assert calls_of(calls)[BASE] > PLAIN["steps"]
