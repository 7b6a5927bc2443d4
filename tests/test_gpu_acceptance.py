"""The report on a GPU says of each goal what was measured, and leaves open what was not."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu_acceptance import PORTIONS, REPORT, Portion, found, main, report, run

ROOT = Path(__file__).parents[1]

TESTS = """<testsuites><testsuite>
<testcase classname="tests.cuda.test_overlap" name="test_a"/>
<testcase classname="tests.cuda.test_on_a_gpu" name="test_b">{more}</testcase>
<testcase classname="tests.cuda.test_on_a_gpu" name="test_c"><skipped/></testcase>
</testsuite></testsuites>"""


def mapping_row(dtype: str, rows: int, ceiling: float, fast: float, apart: float) -> dict:
    case = f"1024x1024, {rows} rows, {dtype}"
    return {"case": case, "path": "cuda", "of the ceiling": ceiling, "times as fast": {"median": fast}, "apart": apart}


@pytest.fixture
def results(tmp_path):
    """A folder with results of every portion that meet every goal."""
    contents = {
        "mapping_layers-cuda": {
            "rows": [
                mapping_row("float16", 2, 0.5, 1.1, 0.001),
                mapping_row("float16", 8, 0.75, 1.6, 0.002),
                mapping_row("bfloat16", 8, 0.75, 1.6, 0.008),
            ]
        },
        "joint_step-float16-cuda": {
            "rows": [
                {"step": "joint, one after the other", "rows": 2, "of the sum": {"median": 1.0}},
                {"step": "joint, overlapped", "rows": 2, "of the sum": {"median": 0.9}},
            ]
        },
        "peak_memory-cuda": {
            "result": {
                "recorded beyond SDXL alone, GB": 0.6,
                "adapter, GB": 0.4258,
                "estimated for a joint step beside the weights, GB": 3.0,
                "measured for a joint step beside the weights, GB": 2.0,
            }
        },
    }
    for name, content in contents.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    (tmp_path / "tests.xml").write_text(TESTS.format(more=""))
    return tmp_path


def change(folder: Path, name: str, edit) -> None:
    path = folder / f"{name}.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def test_with_nothing_measured_every_goal_is_open(tmp_path):
    assert {finding.met for finding in found(tmp_path)} == {None}
    assert "not run" in report(tmp_path, {"joint": "diffusers not installed"})


def test_goals_that_are_met_are(results):
    assert {finding.met for finding in found(results)} == {True}
    assert main(["--portion", REPORT, "--out", str(results)]) == 0
    assert json.loads((results / "acceptance.json").read_text())["findings"]


@pytest.mark.parametrize(
    ("name", "edit", "goal"),
    [
        ("mapping_layers-cuda", lambda c: c["rows"][0].update(apart=0.006), "float16: within 0.005"),
        ("mapping_layers-cuda", lambda c: c["rows"][2].update(apart=0.03), "bfloat16: within 0.02"),
        ("mapping_layers-cuda", lambda c: c["rows"][1].update({"of the ceiling": 0.69}), "0.7 of the ceiling"),
        ("mapping_layers-cuda", lambda c: c["rows"][1]["times as fast"].update(median=1.4), "1.5 times as fast"),
        ("joint_step-float16-cuda", lambda c: c["rows"][1]["of the sum"].update(median=0.96), "0.95 of the sum"),
        ("peak_memory-cuda", lambda c: c["result"].update({"adapter, GB": 0.2}), "at most 0.3 GB more"),
    ],
)
def test_a_goal_that_is_missed_is_told_and_the_others_stay(results, name, edit, goal):
    change(results, name, edit)
    assert [goal in finding.goal for finding in found(results) if finding.met is False] == [True]
    assert main(["--portion", REPORT, "--out", str(results)]) == 1


def test_a_test_that_fails_is_counted(results):
    (results / "tests.xml").write_text(TESTS.format(more="<failure/>"))
    [finding] = [finding for finding in found(results) if finding.met is False]
    assert finding.measured == "1 of 2 fail, 1 skipped"


def test_what_does_not_come_to_its_end_is_told(tmp_path):
    assert run(Portion((("-c", "raise SystemExit(3)"),), 60), tmp_path) == "raise SystemExit(3) ended with 3"
    assert run(Portion(((),), 60, needs=("no_such_package",)), tmp_path) == "no_such_package not installed"
    assert "not through after 0.01 seconds" in run(
        Portion((("-c", "import threading; threading.Event().wait()"),), 0.01), tmp_path
    )


def test_the_portions_ask_for_what_the_benchmarks_offer(tmp_path):
    pytest.importorskip("diffusers", reason="needs the extra 'headless'")
    for portion in PORTIONS.values():
        for _, module, *rest in portion.commands:
            if module.startswith("benchmarks."):
                asked = [word.format(out=tmp_path) for word in rest]
                options = importlib.import_module(module).read_options(asked)
                assert options.out == tmp_path
                assert options.device.type == "cuda"


def test_all_of_it_takes_twenty_minutes_at_most_and_no_portion_more_than_eight():
    assert max(portion.longest for portion in PORTIONS.values()) <= 8 * 60
    assert sum(portion.longest for portion in PORTIONS.values()) <= 20 * 60


BLOCKED = ("diffusers", "transformers", "jsonschema", "matplotlib", "peft", "accelerate", "modules", "gradio", "triton")


def test_gpu_tests_are_collected_where_there_is_torch_and_little_else():
    block = f"""
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED!r}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
import pytest
sys.exit(pytest.main(["tests/cuda", "-m", "gpu", "--collect-only", "-q", "-p", "no:cacheprovider"]))
"""
    answer = subprocess.run([sys.executable, "-c", block], cwd=ROOT, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "test_overlap.py" in answer.stdout and "test_on_a_gpu.py" in answer.stdout
