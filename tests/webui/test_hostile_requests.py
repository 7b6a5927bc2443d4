"""Whatever a request says to X-Adapter, the WebUI answers with a picture or with 422 and one sentence."""

from __future__ import annotations

import pytest

pytest.importorskip("hypothesis", reason="needs the extra 'test'")

from hypothesis import HealthCheck, assume, example, given, settings, strategies

from lib_xadapter.errors import WrongArgument
from lib_xadapter.settings import arguments, read_settings
from tests.test_hostile_settings import LONGEST_SENTENCE, TEXTS, VALUES, deep

from .asking import TITLE
from .server import Answer, WebUIServer

REQUEST = {"prompt": "a cat", "width": 64, "height": 64, "steps": 1, "seed": 1}
SETTINGS = strategies.dictionaries(strategies.sampled_from(list(arguments())) | TEXTS, VALUES, max_size=4)
WHOLE = SETTINGS.map(lambda sent: [sent]) | strategies.lists(VALUES, max_size=4)
"""Lists: anything else ends in the WebUI itself, before X-Adapter is asked."""
OFTEN = settings(
    max_examples=80,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.function_scoped_fixture],
)


def is_quick(args: list) -> bool:
    """Whether it is refused, or as little work as the rest of the request."""
    if not args or not isinstance(args[0], dict):
        return True
    try:
        asked = read_settings(args[0])
    except WrongArgument:
        return True
    return asked.base_steps <= 4 and max(asked.base_width, asked.base_height) <= 128


def ask(server: WebUIServer, args: list) -> Answer:
    return server.txt2img(**REQUEST, alwayson_scripts={TITLE: {"args": args}})


@OFTEN
@given(WHOLE)
@example([{"weight": float("nan")}])
@example([{"switch_point": float("inf")}])
@example([{"base_steps": 10**400}])
@example([{"base_width": 2**40}])
@example([{"adapter": "../../../etc/passwd"}])
@example([{"base_checkpoint": "/etc/passwd\0.safetensors"}])
@example([{"base_prompt": "\ud800"}])
def test_the_answer_is_a_picture_or_one_sentence(webui, args):
    assume(is_quick(args))
    answer = ask(webui, args)
    assert answer.status in (200, 422), answer.error
    assert len(answer.error) < LONGEST_SENTENCE
    assert str(webui.data) not in answer.error


@pytest.mark.parametrize("args", [[{"weight": deep(500)}], [deep(500)], deep(500)], ids=["argument", "object", "list"])
def test_lists_in_lists_are_told_and_the_next_request_is_answered(webui, args):
    assert ask(webui, args).status == 422
    assert ask(webui, [{}]).status == 200
    assert webui.state()["hooks"] == []
