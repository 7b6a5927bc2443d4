"""Another host than the WebUI is told in one line what it has not, and goes on."""

from __future__ import annotations

import ast
import logging
import runpy
import sys
from pathlib import Path

import pytest

from lib_xadapter.host_modules import REQUIRED, missing

REPOSITORY = Path(__file__).parents[1]
HOSTS = ("modules", "ldm", "sgm", "k_diffusion")


def imported(path: Path) -> set[str]:
    """The host's modules that a file imports, as far as they are modules and not names in them."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            # `from modules import shared` imports a module, `from modules.processing import Processed` a name in one
            whole = node.module == "modules"
            found |= {f"modules.{alias.name}" for alias in node.names} if whole else {str(node.module)}
    return {name for name in found if name.split(".")[0] in HOSTS}


def test_every_module_of_the_host_that_is_imported_is_looked_for():
    files = sorted((REPOSITORY / "lib_xadapter" / "webui").rglob("*.py"))
    needed = set().union(*map(imported, files))
    assert needed - set(REQUIRED) == set()
    assert len(files) > 20


def test_what_is_not_there_is_found_without_importing_anything():
    names = ["json", "json.decoder", "json.nothing", "nothing.at.all"]
    assert missing(names) == ["json.nothing", "nothing.at.all"]


@pytest.fixture
def script(caplog, monkeypatch):
    """What the WebUI does: run the file and look at what is in it."""
    monkeypatch.syspath_prepend(str(REPOSITORY))
    caplog.set_level(logging.ERROR)
    return lambda: runpy.run_path(str(REPOSITORY / "scripts" / "xadapter.py"))


@pytest.mark.skipif(not missing(), reason="this is the WebUI")
def test_the_script_says_so_and_offers_nothing(script, caplog):
    assert "XAdapter" not in script()
    assert caplog.messages == [
        "X-Adapter is off: it runs in AUTOMATIC1111's WebUI 1.10, and this host has no modules.cache, modules.devices, "
        f"modules.extra_networks and {len(missing()) - 3} more."
    ]
    assert not any(name.startswith("lib_xadapter.webui.") for name in sys.modules)


@pytest.fixture
def forge(tmp_path, monkeypatch):
    (tmp_path / "modules_forge").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))


def test_forge_is_told_by_its_name(forge, script, caplog):
    assert "XAdapter" not in script()
    assert caplog.messages == ["X-Adapter is off: it runs in AUTOMATIC1111's WebUI 1.10, and this is WebUI Forge."]
