"""Whatever is sent as arguments or pasted as an infotext: settings, or one sentence."""

from __future__ import annotations

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings, strategies

from lib_xadapter.errors import WrongArgument
from lib_xadapter.infotext import VERSION_KEY, key_of, read_infotext, write_infotext, written_names
from lib_xadapter.settings import Settings, arguments, json_schema, read_settings
from tests.drawn_settings import SENT
from tests.pasted_infotext import pasted

LONGEST_SENTENCE = 1000
MANY = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
NUMBERS = strategies.integers() | strategies.floats() | strategies.just(10**400)
CHOSEN = ("1", "0.5", "true", "None", "../../etc/passwd", "/etc/passwd", "C:\\x", "a\0b", "\ud800", "NaN", "x" * 10_000)
TEXTS = (
    strategies.text()
    | strategies.text(strategies.characters(categories=["Cs", "Cc", "Lu"]))
    | strategies.sampled_from(CHOSEN)
)
VALUES = strategies.recursive(
    strategies.none() | strategies.booleans() | NUMBERS | TEXTS,
    lambda inner: strategies.lists(inner, max_size=4) | strategies.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)


def deep(levels: int) -> list:
    value: list = []
    for _ in range(levels):
        value = [value]
    return value


@MANY
@given(SENT)
def test_what_the_schema_allows_is_taken_and_written_and_read_as_it_is(sent):
    asked = read_settings(sent)
    jsonschema.validate(sent, json_schema())
    again = read_infotext(pasted(write_infotext(asked, "1.0")))
    written = {name: getattr(asked, name) for name in written_names()}
    assert again == {"enabled": True, **written}
    assert write_infotext(read_settings(again), "1.0") == write_infotext(asked, "1.0")


@MANY
@given(strategies.dictionaries(strategies.sampled_from(list(arguments())) | TEXTS, VALUES, max_size=4))
def test_everything_else_is_told_in_one_sentence(sent):
    try:
        read_settings(sent)
    except WrongArgument as error:
        told = str(error)
        assert "\n" not in told or any("\n" in str(value) for value in sent.values())
        assert len(told) < LONGEST_SENTENCE
    else:
        jsonschema.validate(sent, json_schema())


def test_a_number_with_more_digits_than_python_writes_is_told():
    with pytest.raises(WrongArgument, match="'base_steps' is a number of very many digits, expected a whole number"):
        read_settings({"base_steps": 10**5000})


@pytest.mark.parametrize("name", list(arguments()))
def test_lists_in_lists_are_told_too(name):
    with pytest.raises(WrongArgument, match=f"'{name}' is "):
        read_settings({name: deep(5000)})


@MANY
@given(
    strategies.dictionaries(
        strategies.sampled_from([VERSION_KEY, *map(key_of, written_names()), f"{key_of('base_width')}-1"]), TEXTS
    ),
    TEXTS,
)
def test_any_infotext_is_read_and_what_is_read_can_be_asked_for(pasted, version):
    read = read_infotext({**pasted, VERSION_KEY: version})
    try:
        read_settings(read)
    except WrongArgument as error:
        assert "guidance_start" in str(error) or "base_start" in str(error)


def test_a_value_that_no_argument_can_have_is_passed_over_and_named(caplog):
    read = read_infotext({VERSION_KEY: "1.0", key_of("switch_point"): "high", key_of("base_steps"): "12"})
    assert (read["switch_point"], read["base_steps"]) == (Settings().switch_point, 12)
    assert "X-Adapter switch point is passed over: it is 'high'." in caplog.text
