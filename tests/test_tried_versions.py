"""A host in another version than X-Adapter was tried with is told, naming both; one that does not tell is not."""

from __future__ import annotations

import pytest

from lib_xadapter.tried_versions import Version, difference


@pytest.mark.parametrize("found", ["v1.10.1", "1.10.1", "v1.10.1-3-gabcdef", "<none>", "", " v1.10.1\n"])
def test_the_tried_one_and_an_unknown_one_are_not_told(found):
    assert difference([Version("the WebUI", "v1.10.1", found)]) == ""


@pytest.mark.parametrize("found", ["v1.10.2", "v1.9.4", "v1.10", "v2.0.1-pre-1661"])
def test_another_one_is_told_with_both(found):
    assert difference([Version("the WebUI", "v1.10.1", found)]) == f"the WebUI {found} (tried: v1.10.1)"


def test_several_are_told_in_one_line():
    versions = [Version("one", "1", "2"), Version("same", "1", "1"), Version("other", "3", "4")]
    assert difference(versions) == "one 2 (tried: 1) and other 4 (tried: 3)"
