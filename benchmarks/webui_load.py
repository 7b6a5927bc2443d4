"""Hours of load on a real WebUI: jobs drawn at random, from two clients at once.

    WEBUI_DIR=... WEBUI_PYTHON=... [CONTROLNET_DIR=...] python -m benchmarks.webui_load [--jobs 500] [--seed 0]

All arguments, sizes, samplers, plugins and modes, bad requests among them, interrupts, model switches, unloaded
checkpoints, refreshed LoRAs and Reload UI. Looked for: an answer that should not be, a job that gives another picture
when it is asked for again later, memory that grows, threads that stay. The seed decides everything but what the two
clients' jobs have to wait for.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy
import psutil
from PIL import Image

from lib_xadapter.settings import arguments, defaults
from tests.pictures import grey_levels_apart
from tests.webui import units
from tests.webui.asking import TITLE
from tests.webui.server import Answer, Installation, WebUIServer, small_models

OK, REFUSED = 200, 422
AGAIN_EVERY, RELOAD_EVERY, MEASURED_EVERY = 20, 150, 5
"""Jobs between two that are asked for again, between two reloads of the page, and between two measurements."""
ROUNDED = 1
"""Grey levels: sums on a CPU are rounded by where tensors lie in memory."""
RECORDINGS = 0.125
"""GB that recordings may fill."""
WARM = 0.1
"""Share of all jobs after which threads are counted for the first time."""
SIZES = tuple(range(64, 329, 8))
SAMPLERS = ("Euler", "Euler a", "DPM++ 2M", "DDIM", "PLMS", "LMS", "Heun", "DPM2 a", "LCM", "DPM++ SDE", "DPM2")
"""Without UniPC and DPM++ 2M SDE, which in the WebUI itself fail where there are two steps or one."""
PROMPTS = (
    "a cat",
    "a [cat:dog:0.5] in a boat",
    "a cat AND a dog :0.5",
    "a cat <lora:style15:0.8>",
    "a cat <lora:style15:0.5> <lora:stylexl:1>",
    "a base15 cat, upgradedxl",
    "(a cat:1.3) BREAK a dog " * 12,
    "",
)
UNITS = (units.T2I, units.REFERENCE)
GIVEN = Image.linear_gradient("L").resize((96, 80)).convert("RGB")
BAD: tuple[Mapping[str, Any], ...] = (
    {"switch_point": 2},
    {"base_steps": 10**9},
    {"weight": [1, 2]},
    {"base_checkpoint": "../../etc/passwd"},
    {"adapter": "nobody\0"},
    {"base_prompt": "<lora:nobody:1>"},
    {"weight": 1e300},
    {"unknown": [[[[]]]]},
)


@dataclass(frozen=True)
class LoadJob:
    """A job.

    Attributes:
        number: of it.
        payload: of the request.
        over_picture: whether it is img2img.
        is_bad: whether it must be refused.
    """

    number: int
    payload: Mapping[str, Any]
    over_picture: bool
    is_bad: bool

    def ask(self, server: WebUIServer) -> Answer:
        return server.img2img(GIVEN, **self.payload) if self.over_picture else server.txt2img(**self.payload)


def drawn(number: int, seed: int, has_controlnet: bool) -> LoadJob:
    """The job of a number."""
    random_ = random.Random(f"{seed} {number}")
    is_bad, plain = random_.random() < 0.1, random_.random() < 0.15
    over_picture = random_.random() < 0.35
    given = dict(random_.choice(BAD)) if is_bad else _settings(random_, over_picture)
    payload = {
        "prompt": random_.choice(PROMPTS),
        "negative_prompt": random_.choice(["", "a dog"]),
        "width": random_.choice(SIZES),
        "height": random_.choice(SIZES),
        "steps": random_.randint(1, 5),
        "sampler_name": random_.choice(SAMPLERS),
        "cfg_scale": random_.choice([1, 4, 7]),
        "seed": random_.randint(0, 2**31),
        "batch_size": random_.choice([1, 1, 1, 2, 3]),
        "n_iter": random_.choice([1, 1, 1, 2]),
        "do_not_save_grid": True,
        "do_not_save_samples": True,
    }
    if over_picture:
        payload["denoising_strength"] = random_.choice([0.2, 0.5, 0.8, 1.0])
    elif random_.random() < 0.15:
        payload |= {"enable_hr": True, "hr_scale": 1.5, "hr_upscaler": "Latent", "denoising_strength": 0.6}
    scripts: dict[str, Any] = {}
    if has_controlnet and not plain and not is_bad and random_.random() < 0.2:
        given |= units.SMALL
        scripts["ControlNet"] = {"args": [random_.choice(UNITS)]}
    if not plain or is_bad:
        scripts[TITLE] = {"args": [given]}
    payload["alwayson_scripts"] = scripts
    return LoadJob(number, payload, over_picture, is_bad)


def _settings(random_: random.Random, over_picture: bool) -> dict[str, Any]:
    """Some arguments, each within its limits, all of which go together."""
    given: dict[str, Any] = {}
    for name, row in arguments().items():
        default = defaults()[name]
        if random_.random() > 0.2 or name in ("enabled", "base_checkpoint", "adapter", "base_start", "guidance_start"):
            continue
        if isinstance(default, bool):
            given[name] = random_.random() < 0.5
        elif row.choices:
            given[name] = random_.choice(row.choices)
        elif isinstance(default, str):
            given[name] = random_.choice(PROMPTS[:4])
        elif row.multiple_of:
            given[name] = random_.choice([0, *range(64, 161, 8)])
        elif name == "base_steps":
            given[name] = random_.randint(0, 6)
        elif isinstance(default, int):
            given[name] = random_.randint(int(row.minimum or 0), 5)
        else:
            low, high = row.reach or (row.minimum, row.maximum)
            given[name] = round(random_.uniform(low, min(high, 10)), 2)
    if not over_picture:
        given.pop("img2img_start", None)
    if over_picture:
        given.pop("single_stage", None)
    return given


@dataclass
class Findings:
    """What came of the load."""

    jobs: int = 0
    refused: int = 0
    interrupted: int = 0
    compared: int = 0
    wrong: list[str] = field(default_factory=list)
    megabytes: list[float] = field(default_factory=list)
    """Resident, without what is free in them: pictures of all sizes leave holes, in the WebUI without X-Adapter too."""
    threads: list[int] = field(default_factory=list)
    most_recorded: int = 0
    """Bytes of all recordings."""

    @property
    def growth(self) -> float:
        """MB a job over the last half, by a line through all that was measured."""
        half = self.megabytes[len(self.megabytes) // 2 :]
        jobs = range(0, MEASURED_EVERY * len(half), MEASURED_EVERY)
        return float(numpy.polyfit(jobs, half, 1)[0]) if len(half) > 1 else 0.0


class Load:
    """Two clients and what disturbs them.

    Args:
        server: started.
        jobs: how many.
        seed: of everything that is drawn.
        has_controlnet: whether the ControlNet extension is there, so that some jobs have units.
    """

    def __init__(self, server: WebUIServer, jobs: int, seed: int, has_controlnet: bool) -> None:
        self._server, self._jobs, self._seed, self._has_controlnet = server, jobs, seed, has_controlnet
        self._process = psutil.Process(server.process.pid)
        self._lock = threading.Lock()
        # nobody asks while the page is reloaded, and who reloads it goes before who would ask
        self._door, self._asking = threading.Lock(), threading.Semaphore(2)
        self._next = 0
        self._disturbed = 0
        self._to_repeat: list[tuple[LoadJob, Answer]] = []
        self.findings = Findings()

    def run(self) -> Findings:
        clients = [threading.Thread(target=self._client) for _ in range(2)]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        return self.findings

    def _client(self) -> None:
        """Raises nothing: a client that ends too early leaves jobs that nobody asked for, and says why."""
        try:
            self._ask()
        except Exception as error:
            with self._lock:
                self.findings.wrong.append(f"a client ended: {type(error).__name__}: {error}")

    def _ask(self) -> None:
        while (number := self._take()) is not None:
            if number and number % RELOAD_EVERY == 0:
                self._reload()
            with self._door:
                self._asking.acquire()
            try:
                self._disturb(number)
                self._one(drawn(number, self._seed, self._has_controlnet))
                if number % AGAIN_EVERY == AGAIN_EVERY - 1:
                    self._again()
                if number % MEASURED_EVERY == 0:
                    self._measure()
            finally:
                self._asking.release()

    def _take(self) -> int | None:
        with self._lock:
            if self._next >= self._jobs:
                return None
            self._next += 1
            return self._next - 1

    def _one(self, job: LoadJob) -> None:
        before = self._disturbed
        try:
            answer = job.ask(self._server)
        except OSError as error:
            self._wrong(job, f"no answer: {error}")
            return
        undisturbed = before == self._disturbed
        with self._lock:
            self.findings.jobs += 1
            self.findings.refused += answer.status == REFUSED
            self.findings.interrupted += not undisturbed
        expected = REFUSED if job.is_bad else OK
        if answer.status != expected and (undisturbed or answer.status not in (OK, REFUSED)):
            self._wrong(job, f"status {answer.status}, expected {expected}: {answer.error[:300]}")
        elif undisturbed and answer.status == OK:
            with self._lock:
                self._to_repeat.append((job, answer))

    def _again(self) -> None:
        """One of the jobs before, which must come to the same pictures."""
        with self._lock:
            if not self._to_repeat:
                return
            place = random.Random(len(self._to_repeat)).randrange(len(self._to_repeat))
            job, first = self._to_repeat.pop(place)
            self._to_repeat.clear()
        before = self._disturbed
        second = job.ask(self._server)
        if before != self._disturbed:
            return
        with self._lock:
            self.findings.compared += 1
        if second.status != OK or len(first.images) != len(second.images):
            self._wrong(job, f"another answer when asked again: status {second.status} {second.error[:300]}")
        elif (apart := max(map(grey_levels_apart, first.images, second.images))) > ROUNDED:
            self._wrong(job, f"another picture when asked again, by {apart} grey levels")

    def _disturb(self, number: int) -> None:
        """What users do in the midst of jobs."""
        random_ = random.Random(f"{self._seed} disturb {number}")
        kind = random_.random()
        if kind < 0.06:
            self._soon(random_, "/sdapi/v1/interrupt")
        elif kind < 0.09:
            self._soon(random_, "/sdapi/v1/skip")
        elif kind < 0.11:
            self._server.post("/sdapi/v1/refresh-loras")
        elif kind < 0.13:
            self._server.post("/sdapi/v1/refresh-checkpoints")
        elif kind < 0.15:
            self._server.post("/sdapi/v1/unload-checkpoint")
            self._server.post("/sdapi/v1/reload-checkpoint")
        elif kind < 0.17:
            # the other client's job may begin under the wrong checkpoint
            self._server.txt2img(
                prompt="a cat",
                width=64,
                height=64,
                steps=1,
                override_settings={"sd_model_checkpoint": "tiny15.safetensors"},
            )

    def _soon(self, random_: random.Random, route: str) -> None:
        def post() -> None:
            with self._lock:
                self._disturbed += 1
            self._server.post(route)
            with self._lock:
                self._disturbed += 1

        threading.Timer(random_.uniform(0, 3), post).start()

    def _reload(self) -> None:
        with self._door:
            for _ in range(2):
                self._asking.acquire()
            try:
                self._server.reload_ui()
            finally:
                self._asking.release(2)

    def _measure(self) -> None:
        memory, recorded = self._server.memory(), self._server.recordings()
        with self._lock:
            self.findings.most_recorded = max(self.findings.most_recorded, recorded)
            self.findings.megabytes.append(memory / 1e6)
            self.findings.threads.append(self._process.num_threads())

    def _wrong(self, job: LoadJob, what: str) -> None:
        print(f"job {job.number}: {what}", flush=True)
        with self._lock:
            self.findings.wrong.append(f"job {job.number}: {what}; {json.dumps(dict(job.payload))}")


def report(findings: Findings, seconds: float, seed: int) -> dict[str, Any]:
    warm = findings.threads[int(WARM * len(findings.threads))] if findings.threads else 0
    return {
        **asdict(findings),
        "seed": seed,
        "seconds": round(seconds),
        "bytes that recordings may fill": int(RECORDINGS * 2**30),
        "megabytes a job over the last half": round(findings.growth, 3),
        "threads after a tenth, and at the end": [warm, findings.threads[-1] if findings.threads else 0],
    }


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=500, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="default: %(default)s")
    options = parser.parse_args(given)
    installation = Installation.from_environment()
    if installation is None:
        raise SystemExit("WEBUI_DIR names no WebUI.")
    more = [Path(os.environ["CONTROLNET_DIR"])] if os.environ.get("CONTROLNET_DIR") else []
    began = time.monotonic()
    with (
        tempfile.TemporaryDirectory() as folder,
        WebUIServer(
            installation,
            Path(folder) / "data",
            [small_models(installation)],
            more_extensions=more,
            options={"xadapter_recordings": RECORDINGS},
        ) as server,
    ):
        findings = Load(server, options.jobs, options.seed, bool(more)).run()
        log = server.log
    summary = report(findings, time.monotonic() - began, options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "webui_load.json"
    path.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    if findings.wrong:
        (options.out / "webui_load.log").write_text(log, encoding="utf-8")
    shown = {name: value for name, value in summary.items() if name not in ("megabytes", "threads", "wrong")}
    print(json.dumps(shown, indent=1), f"{len(findings.wrong)} wrong", path, sep="\n")
    if findings.wrong or findings.jobs != options.jobs:
        raise SystemExit(f"{findings.jobs} of {options.jobs} jobs were answered, {len(findings.wrong)} wrong.")


if __name__ == "__main__":
    main()
