"""Wherever a call into the WebUI, an extension or torch fails: the message comes, and nothing is left behind.

All seams with all faults take hours. A part of them that is drawn by SEAMS_SEED is looked at by default; SEAMS=all
looks at all of them, and SEAMS_TABLE names a file for the table, whose faults are not looked at again.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.pictures import grey_levels_apart

from . import units
from .asking import arguments, made
from .conftest import PLAIN, same_bytes
from .server import Answer, WebUIServer

ERRORS = ("RuntimeError", "OutOfMemoryError", "KeyboardInterrupt")
MESSAGE = "a fault at a seam"
LOOKED_AT = 12
"""Faults of each kind of job, where not all are wanted."""
SMALL = {**PLAIN, "width": 128, "height": 128, "steps": 2}
PLAIN_PROMPT = "an upgradedxl cat <lora:stylexl:1>"
"""For pictures without X-Adapter: with an SDXL LoRA and a textual inversion."""


@dataclass(frozen=True)
class Kind:
    """A kind of job: X-Adapter's arguments, and what else is asked for.

    Attributes:
        given: X-Adapter's arguments.
        request: what else is asked for.
        picture: whether it is one of img2img.
        units: of ControlNet.
        options: of the WebUI's settings.
        status: of its answer.
    """

    given: Mapping[str, Any] = field(default_factory=dict)
    request: Mapping[str, Any] = field(default_factory=dict)
    picture: bool = False
    units: Sequence[Mapping[str, Any]] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    status: int = 200

    @property
    def server(self) -> str:
        """The fixture of the server that it is asked of."""
        return "controlnet_webui" if self.units else "webui"

    def ask(self, server: WebUIServer) -> Answer:
        asked = {**SMALL, **self.request, **arguments(**self.given)}
        if self.units:
            asked["alwayson_scripts"]["ControlNet"] = {"args": list(self.units)}
        if not self.picture:
            return server.txt2img(**asked)
        return server.img2img(Image.new("RGB", (128, 128), "navy"), **asked, denoising_strength=0.6)

    @contextlib.contextmanager
    def prepared(self, server: WebUIServer) -> Iterator[None]:
        """While open, the WebUI's settings are as this kind wants them."""
        server.post("/sdapi/v1/options", dict(self.options))
        try:
            yield
        finally:
            server.post("/sdapi/v1/options", {name: USUAL[name] for name in self.options})

    def is_same(self, one: Image.Image, other: Image.Image) -> bool:
        """To the byte; a model that was loaded anew lies elsewhere in memory, by which sums are rounded."""
        return grey_levels_apart(one, other) <= 1 if self.options == UNLOADED else same_bytes(one, other)


USUAL = {"xadapter_keep_models": "Keep on the GPU", "xadapter_recordings": 2.0}
"""What the settings are otherwise."""
UNLOADED = {"xadapter_keep_models": "Unload after each job"}
KINDS = {
    "lockstep": Kind({"memory": "lockstep"}),
    "recorded": Kind({"memory": "recorded"}, options={"xadapter_recordings": 0}),
    "recorded before": Kind({"memory": "recorded"}),
    "batch of two": Kind({"memory": "lockstep"}, {"batch_size": 2}),
    "LoRA": Kind({"memory": "lockstep"}, {"prompt": "a cat <lora:style15:0.8>"}),
    "img2img": Kind({"memory": "lockstep"}, picture=True),
    "hires": Kind(
        {"memory": "lockstep"},
        {"enable_hr": True, "hr_scale": 1.5, "hr_upscaler": "Latent", "denoising_strength": 0.6},
    ),
    "refused": Kind({"base_checkpoint": "nobody"}, status=422),
    "ControlNet": Kind({"memory": "lockstep", **units.SMALL}, units=(units.T2I, units.REFERENCE)),
    "cold": Kind({"memory": "lockstep"}, options=UNLOADED),
}


@dataclass
class Outcome:
    """What came of a fault."""

    kind: str
    seam: str
    error: str
    told: bool
    left_behind: list[str]

    @property
    def survived(self) -> bool:
        return self.told and not self.left_behind


class Watched:
    """A server whose pictures before are known."""

    def __init__(self, server: WebUIServer, name: str) -> None:
        self.server, self.name, self.kind = server, name, KINDS[name]
        self.usual = self.kind.ask(server)
        # the first job has loaded what is loaded once
        self.usual = self.kind.ask(server)
        assert self.usual.status == self.kind.status, self.usual.error
        self.plain, self.state = self.plain_picture(), self.looked_inside()

    def plain_picture(self) -> Image.Image:
        return made(self.server.txt2img(**{**SMALL, "prompt": PLAIN_PROMPT})).image

    def looked_inside(self) -> dict[str, Any]:
        return {**self.server.state(), "live_models": None}

    def seams(self) -> list[str]:
        """Of one job, in the order in which they are first passed."""
        self.server.probed(self.server.post("/seams/trace", {"on": True}))
        self.kind.ask(self.server)
        found = self.server.probed(self.server.get("/seams/found"))
        self.server.probed(self.server.post("/seams/trace", {"on": False}))
        return list(found)

    @contextlib.contextmanager
    def fault(self, seam: str, error: str) -> Iterator[None]:
        self.server.probed(self.server.post("/seams/arm", {"seam": seam, "error": error}))
        try:
            yield
        finally:
            still_armed = self.server.probed(self.server.post("/seams/disarm"))
        assert not still_armed, f"{seam} was not passed again"

    def outcome(self, seam: str, error: str) -> Outcome:
        with self.fault(seam, error):
            answer = self.kind.ask(self.server)
        went_on = answer.status == self.usual.status and self.same(answer)
        told = MESSAGE in answer.error or went_on
        return Outcome(self.name, seam, error, told, list(self.left_behind()))

    def same(self, answer: Answer) -> bool:
        return answer.error == self.usual.error and all(map(self.kind.is_same, answer.images, self.usual.images))

    def left_behind(self) -> Iterator[str]:
        if not same_bytes(self.plain_picture(), self.plain):
            yield "the next plain picture is another one"
        state = self.looked_inside()
        yield from (
            f"{name}: {state[name]!r}, not {self.state[name]!r}" for name in state if state[name] != self.state[name]
        )
        again = self.kind.ask(self.server)
        if again.status != self.usual.status or not self.same(again):
            yield f"the next job is another one: {again.error}"


def faults(seams: list[str]) -> list[tuple[str, str]]:
    """Seams with errors: all, or some that are drawn by SEAMS_SEED."""
    everything = [(seam, error) for seam in seams for error in ERRORS]
    if os.environ.get("SEAMS") == "all":
        return everything
    return random.Random(os.environ.get("SEAMS_SEED", "0")).sample(everything, min(LOOKED_AT, len(everything)))


def in_table() -> list[dict[str, Any]]:
    """The faults that stand in the table."""
    table = Path(os.environ.get("SEAMS_TABLE", ""))
    return list(map(json.loads, table.read_text(encoding="utf-8").splitlines())) if table.is_file() else []


def outstanding(name: str, seams: list[str]) -> list[tuple[str, str]]:
    """The faults of a kind that are to be looked at, those of seams that no other kind has passed first."""
    rows = in_table()
    looked_at = {(row["seam"], row["error"]) for row in rows if row["kind"] == name}
    elsewhere = {row["seam"] for row in rows if row["kind"] != name}
    return sorted(set(faults(seams)) - looked_at, key=lambda fault: (fault[0] in elsewhere, fault))


def note(outcome: Outcome, seams: int) -> None:
    """A line of the table, where one is wanted."""
    if table := os.environ.get("SEAMS_TABLE"):
        with Path(table).open("a", encoding="utf-8") as file:
            file.write(json.dumps(vars(outcome) | {"seams": seams}) + "\n")


@pytest.mark.parametrize("name", KINDS)
def test_a_fault_at_a_seam_is_told_and_nothing_is_left_behind(request, name):
    server, outcomes = request.getfixturevalue(KINDS[name].server), []
    with KINDS[name].prepared(server):
        watched = Watched(server, name)
        seams = watched.seams()
        assert len(seams) > 3
        for fault in outstanding(name, seams):
            outcomes.append(watched.outcome(*fault))
            note(outcomes[-1], len(seams))
    fallen = [outcome for outcome in outcomes if not outcome.survived]
    assert not fallen, f"{len(fallen)} of {len(outcomes)} faults:\n" + "\n".join(map(str, fallen))
