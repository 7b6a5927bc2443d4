"""A pair of tiny models, pictures for it, and `train` runs on them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

for needed in ("diffusers", "accelerate", "datasets"):
    pytest.importorskip(needed, reason="needs the extra 'train'")
os.environ["HF_HUB_OFFLINE"] = "1"

REPOSITORY = Path(__file__).parents[3]


@dataclass(frozen=True)
class TrainCommand:
    """Says what has to be said to train a tiny adapter on the CPU; options can be given other values, or None."""

    folder: Path
    data: Path
    out: Path

    def words(self, *more: str, **replaced: object) -> list[str]:
        usual: dict[str, object] = {
            "base": self.folder / "base",
            "upgraded": self.folder / "upgraded",
            "data": self.data,
            "out": self.out,
            "size": 32,
            "batch": 4,
            "steps": 6,
            "learning-rate": 1e-3,
            "precision": "float32",
            "save-every": 2,
            "tracker": "none",
        } | {name.replace("_", "-"): value for name, value in replaced.items()}
        given = [str(word) for name, value in usual.items() if value is not None for word in (f"--{name}", value)]
        return ["train", "--cpu", *given, *more]

    def __call__(self, *more: str, **replaced: object) -> int:
        """Exit status of the command, in this process."""
        from lib_xadapter.headless.cli import main

        return main(self.words(*more, **replaced))

    def start(self, *more: str, processes: int = 1, code: str = "", **replaced: object) -> subprocess.Popen:
        """The command in processes of its own; `code` runs in each of them before it."""
        words = self.words(*more, **replaced)
        called = "from lib_xadapter.headless.cli import program\nprogram()"
        driver = f"import sys\nsys.argv[1:] = {words!r}\n{code}\n{called}"
        path = self.out.parent / f"driver-{abs(hash(driver))}.py"
        path.write_text(driver, encoding="utf-8")
        launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
        launcher = [*launcher, "--main_process_port", "0"] if processes > 1 else []
        quiet = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(REPOSITORY)}
        return subprocess.Popen(
            [sys.executable, *launcher, str(path)],
            env=os.environ | quiet,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, *more: str, **replaced: object) -> tuple[int, str]:
        """Exit status and output of the command in processes of its own."""
        started = self.start(*more, **replaced)
        try:
            output, _ = started.communicate(timeout=500)
        finally:
            if started.poll() is None:
                os.killpg(started.pid, signal.SIGKILL)
        return started.returncode, output


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """The models' folder."""
    from tests.training.tiny_models import save_base, save_upgraded

    folder = tmp_path_factory.mktemp("tiny")
    save_base(folder / "base")
    save_upgraded(folder / "upgraded")
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """64 pictures with captions."""
    from tests.training.tiny_models import save_pictures

    return save_pictures(tmp_path_factory.mktemp("data") / "pictures", 64)


@pytest.fixture
def train(tiny, pictures, tmp_path) -> TrainCommand:
    return TrainCommand(tiny, pictures, tmp_path / "out")
