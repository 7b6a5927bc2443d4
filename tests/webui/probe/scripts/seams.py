"""Faults at every seam: each call that X-Adapter's WebUI side makes into the WebUI, an extension or torch can fail.

An extension for tests only. While nothing is traced or armed, nothing of the WebUI is replaced. What runs in a job is
watched by the interpreter's profiler, which sees every call, and whose own exceptions come out of the call it sees.

    POST /seams/trace   {"on": true}: note the seams of the jobs from now on
    GET  /seams/found   seam → how often it was passed
    POST /seams/arm     {"seam": one of them, "passes": that go well first, "error": one of ERRORS}
    POST /seams/disarm  take a fault back; tells whether it was still armed
"""

import contextlib
import sys
import types
from typing import Any
from unittest.mock import patch

import fastapi
import torch
from modules import script_callbacks
from modules.api import api

OURS = "/lib_xadapter/webui/"
THEIRS = ("modules", "ldm", "sgm", "k_diffusion", "torch", "lora", "network", "scripts", "annotator", "lib_controlnet")
"""Packages of the WebUI, its extensions and torch; of `network…` and `lora…` any module of the Lora extension."""
NOT_THEIRS = ("torch._C._log_api_usage_once",)
MESSAGE = "a fault at a seam"

ERRORS = {
    "RuntimeError": lambda: RuntimeError(MESSAGE),
    "OutOfMemoryError": lambda: torch.cuda.OutOfMemoryError(f"CUDA out of memory: {MESSAGE}"),
    "KeyboardInterrupt": lambda: KeyboardInterrupt(MESSAGE),
}


def called_here(frame: types.FrameType, event: str, arg: Any) -> "tuple[types.FrameType | None, str]":
    """Who calls, and what is called; "" for what is none of theirs."""
    if event == "call":
        return frame.f_back, f"{frame.f_globals.get('__name__') or ''}.{frame.f_code.co_name}"
    if event == "c_call":
        owner = getattr(arg, "__self__", None)
        module = getattr(arg, "__module__", None) or type(owner).__module__
        return frame, f"{module}.{arg.__name__}"
    return None, ""


def is_theirs(called: str) -> bool:
    return called.split(".")[0].startswith(THEIRS) and not called.startswith(NOT_THEIRS)


class Seams:
    """Notes the seams of jobs, and lets one armed fault fire."""

    def __init__(self) -> None:
        self.found: dict[str, int] = {}
        self.armed: tuple[str, int, str] | None = None
        self.passed = 0
        self.replaced = contextlib.ExitStack()

    def watch(self, on: bool) -> None:
        self.replaced.close()
        if on:
            self.replaced.enter_context(patch.object(api, "process_images", self.watched(api.process_images)))

    def watched(self, process_images: Any) -> Any:
        def call(p: Any) -> Any:
            sys.setprofile(self.look)
            try:
                return process_images(p)
            except KeyboardInterrupt as error:
                # the server would take it for its own end
                raise RuntimeError(f"KeyboardInterrupt: {error}") from error
            finally:
                sys.setprofile(None)

        return call

    def look(self, frame: types.FrameType, event: str, arg: Any) -> None:
        caller, called = called_here(frame, event, arg)
        if caller is None or not called or not is_theirs(called):
            return
        _, ours, name = caller.f_code.co_filename.rpartition(OURS)
        if not ours:
            return
        seam = f"{name}:{caller.f_lineno} {caller.f_code.co_name} → {called}"
        self.found[seam] = self.found.get(seam, 0) + 1
        if self.armed is None or self.armed[0] != seam:
            return
        self.passed += 1
        if self.passed > self.armed[1]:
            error = ERRORS[self.armed[2]]()
            self.armed = None
            raise error


def add_routes(_: object, app: fastapi.FastAPI) -> None:
    seams = Seams()
    script_callbacks.on_script_unloaded(lambda: seams.watch(False))

    @app.post("/seams/trace")
    def trace(on: bool = fastapi.Body(..., embed=True)) -> None:
        seams.found = {}
        seams.watch(on)

    @app.get("/seams/found")
    def found() -> dict[str, int]:
        return seams.found

    @app.post("/seams/arm")
    def arm(seam: str = fastapi.Body(...), passes: int = fastapi.Body(0), error: str = fastapi.Body(...)) -> None:
        seams.armed, seams.passed = (seam, passes, error), 0
        seams.watch(True)

    @app.post("/seams/disarm")
    def disarm() -> bool:
        was_armed, seams.armed = seams.armed is not None, None
        seams.watch(False)
        return was_armed


script_callbacks.on_app_started(add_routes)
