"""Scenes, captions and the drawings of both worlds."""

from __future__ import annotations

import dataclasses
import itertools

import numpy
import pytest

from lib_xadapter.errors import WrongArgument
from lib_xadapter.miniature.captions import WORDS, caption_of, facts_of, parse
from lib_xadapter.miniature.drawing import PAINT, base_picture, depth_map, edge_map, label_map, upgraded_picture
from lib_xadapter.miniature.scenes import SECRET_SHAPE, SHAPES, Background, Scene, SceneObject, scene_of
from lib_xadapter.miniature.shapes import CELLS, distance_table
from lib_xadapter.miniature.styles import STYLES, styled_picture
from lib_xadapter.miniature.worlds import FIRST_SCENES, HELD_OUT, LARGEST_SEED, first_scene

MANY = range(200)


@pytest.fixture
def two_squares() -> Scene:
    """A red square in front of a blue one that it hides a corner of, on white."""

    def square(colour: str, x: float) -> SceneObject:
        return SceneObject("square", colour, "medium", "center", x, x, 0.15, 0.0)

    return Scene((square("red", 0.4), square("blue", 0.55)), Background("plain", ("white",)))


def test_a_seed_gives_the_same_scene_each_time():
    assert scene_of(7) == scene_of(7)


def test_seeds_give_scenes_of_their_own():
    assert len({scene_of(seed) for seed in MANY}) == len(MANY)


def test_a_caption_tells_all_that_its_grammar_has():
    for seed in MANY:
        facts = facts_of(scene_of(seed))
        assert parse(caption_of(facts)) == facts


def test_a_caption_consists_of_the_grammar_s_words():
    assert {word for seed in MANY for word in caption_of(facts_of(scene_of(seed))).split()} <= set(WORDS)


def test_the_grammar_has_no_word_for_the_secret_shape():
    assert SECRET_SHAPE not in WORDS


def test_no_scene_that_is_learned_from_is_held_out():
    assert first_scene("fine-tuning", LARGEST_SEED) + 1_000_000 <= HELD_OUT


def test_each_kind_of_scenes_has_seeds_of_its_own():
    firsts = sorted(first_scene(kind, seed) for kind in FIRST_SCENES for seed in (0, 1, LARGEST_SEED))
    assert all(after - before >= 1_000_000 for before, after in itertools.pairwise(firsts))


@pytest.mark.parametrize("caption", ["", "a red circle", "small red circle left on plaid", "small red dog left on sky"])
def test_another_text_is_no_caption(caption):
    with pytest.raises(WrongArgument, match="grammar"):
        parse(caption)


@pytest.mark.parametrize("shape", [*SHAPES, SECRET_SHAPE])
def test_the_distance_to_a_shape_grows_by_one_with_each_step_away(shape):
    slopes = numpy.linalg.norm(distance_table(shape)[2:-2, 2:-2, 1:], axis=-1)
    assert numpy.median(slopes) == pytest.approx(1, abs=0.02)


def test_a_ring_has_a_hole():
    middle = CELLS // 2
    assert distance_table("ring")[middle, middle, 0] > 0 > distance_table("circle")[middle, middle, 0]


def test_what_stands_in_front_hides_what_is_behind(two_squares):
    picture, labels = base_picture(two_squares), label_map(two_squares, 64)
    assert tuple(picture[30, 30]) == PAINT["red"]
    assert labels[30, 30] == 0
    assert tuple(picture[40, 40]) == PAINT["blue"]
    assert labels[40, 40] == 1
    assert labels[2, 2] == -1


def test_depth_is_nearer_in_front(two_squares):
    depth = depth_map(two_squares, 64)
    assert depth[30, 30] > depth[40, 40] > depth[2, 2] == 0


def test_edges_run_where_another_object_begins(two_squares):
    row = edge_map(two_squares, 64)[30] > 0
    labels = label_map(two_squares, 64)[30]
    assert row.sum() == 3
    assert numpy.array_equal(row[:-1], labels[:-1] != labels[1:])


def test_the_base_world_is_flat_and_the_upgraded_world_is_not(two_squares):
    inside = label_map(two_squares, 64) == 0
    inside &= (
        numpy.roll(inside, 2, 0) & numpy.roll(inside, -2, 0) & numpy.roll(inside, 2, 1) & numpy.roll(inside, -2, 1)
    )
    flat, shaded = base_picture(two_squares), upgraded_picture(two_squares, 64)
    assert flat[inside].std(0).max() == 0
    assert shaded[inside].std(0).max() > 5


def test_both_worlds_show_the_same_scene(two_squares):
    apart = base_picture(two_squares, 128).astype(int) - upgraded_picture(two_squares)
    assert numpy.abs(apart).mean() < 30


def test_an_object_casts_a_shadow_to_the_lower_right(two_squares):
    alone = dataclasses.replace(two_squares, objects=two_squares.objects[:1])
    without = upgraded_picture(dataclasses.replace(alone, objects=()))
    darker = without.astype(int).sum(-1) - upgraded_picture(alone).sum(-1, dtype=int)
    outside = label_map(alone, 128) == -1
    rows, columns = numpy.nonzero(outside & (darker > 40))
    assert rows.mean() > 0.4 * 128
    assert columns.mean() > 0.4 * 128


@pytest.mark.parametrize("style", STYLES)
def test_a_style_changes_a_picture_and_leaves_its_size(two_squares, style):
    picture = base_picture(two_squares)
    styled = styled_picture(picture, two_squares, style)
    assert styled.shape == picture.shape
    assert numpy.abs(styled.astype(int) - picture).mean() > 2
