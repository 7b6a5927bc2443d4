"""Settings go through the WebUI's own infotext, as it writes it and as it reads it again."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings, strategies

from lib_xadapter.infotext import read_infotext, write_infotext, written_names
from lib_xadapter.settings import read_settings
from tests.drawn_settings import SENT

PROMPTS = strategies.sampled_from(["", "a cat", "a cat\nNegative prompt: a dog", "Steps: 5, X-Adapter weight: 2", "{"])
MANY = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@MANY
@given(SENT, PROMPTS)
def test_what_is_written_is_read_as_it_is(webui, sent, prompt):
    asked = read_settings(sent)
    written = write_infotext(asked, "1.0")
    parsed = webui.probed(webui.post("/probe/parsed", {"written": written, "prompt": prompt}))
    again = read_infotext(parsed)
    assert again == {"enabled": True, **{name: getattr(asked, name) for name in written_names()}}
    assert write_infotext(read_settings(again), "1.0") == written
