"""Prompts are read as the real WebUI's own parser reads them: tests/golden/webui_words.json holds what it gave."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from lib_xadapter.errors import WrongArgument
from lib_xadapter.headless.prompt_grammar import combined_prompts, prompt_schedule, read_styles, with_style
from lib_xadapter.headless.prompts import read_attention
from tests.webui.server import Installation

FIGURES = Path(__file__).parents[1] / "golden" / "webui_words.json"
GOLDEN = json.loads(FIGURES.read_text(encoding="utf-8"))
SCRIPT = Path(__file__).parent / "webui_words.py"


@pytest.mark.parametrize(("prompt", "steps", "given"), GOLDEN["schedules"])
def test_schedules_are_the_webuis(prompt, steps, given):
    assert [[stretch.last_step, stretch.text] for stretch in prompt_schedule(prompt, steps)] == given


@pytest.mark.parametrize(("prompt", "given"), GOLDEN["and"])
def test_combined_prompts_are_the_webuis(prompt, given):
    assert [[part.text, part.weight] for part in combined_prompts(prompt)] == given


@pytest.mark.parametrize(("prompt", "given"), GOLDEN["attention"])
def test_attention_is_the_webuis(prompt, given):
    read = read_attention(prompt)
    assert [part.text for part in read] == [text for text, _ in given]
    assert [part.weight for part in read] == pytest.approx([weight for _, weight in given])


def test_the_webui_reads_them_so():
    """Where there is one, its parser gives today what lies in the file."""
    installation = Installation.from_environment()
    if installation is None:
        pytest.skip("needs an AUTOMATIC1111 WebUI: set WEBUI_DIR to its folder (and WEBUI_PYTHON to its Python)")
    command = [installation.python, SCRIPT, installation.folder, FIGURES]
    given = json.loads(subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stdout)
    assert given == {kind: GOLDEN[kind] for kind in given}


def test_styles_are_read_by_name_and_put_around_a_prompt(tmp_path):
    path = tmp_path / "styles.csv"
    path.write_text('name,prompt,negative_prompt\nink,"ink, {prompt}, black",grey\nfog,in fog,\n', encoding="utf-8")
    styles = read_styles(path)
    assert with_style("a cat", styles["ink"].prompt) == "ink, a cat, black"
    assert with_style("a cat", styles["fog"].prompt) == "a cat, in fog"
    assert with_style("", styles["ink"].negative_prompt) == "grey"
    path.write_text("title\nx\n")
    with pytest.raises(WrongArgument, match="has no column 'name'"):
        read_styles(path)
