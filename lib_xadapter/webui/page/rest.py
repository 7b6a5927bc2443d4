"""The extension's routes: what there is, what can be asked for, and which version answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from secrets import compare_digest
from typing import Any

import gradio as gr
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.security import HTTPBasic, HTTPBasicCredentials
from modules import shared

from ... import __version__
from ...errors import XAdapterError
from ...families import FAMILY_NAMES
from ...pairs import Pair
from ...settings import Settings, json_schema, read_settings
from .. import model_files
from . import panel, routing
from .forecast import NOT_TICKED, Forecast, TabRequest, memory_mode

PREFIX = "/xadapter/v1"


def add_routes(_: gr.Blocks, app: FastAPI) -> None:
    """Add the routes; called by the WebUI when its server is up."""

    def add(path: str, answer: Callable[[], dict[str, Any]]) -> None:
        app.add_api_route(PREFIX + path, answer, methods=["GET"], dependencies=_authentication())

    app.add_api_route(PREFIX + "/plan", _plan, methods=["POST"], dependencies=_authentication_of_the_page(app))
    add("/version", lambda: {"version": __version__})
    add("/schema", json_schema)
    add("/models", _models)


def _plan(asked: TabRequest) -> dict[str, Any]:
    """What a tab is about to do, and which plugin would go to which model: in data, and each in one line."""
    try:
        settings = read_settings(panel.read_controls(asked.args))
    except XAdapterError as problem:
        return {"line": str(problem), "problem": True}
    if not settings.enabled:
        return {"line": NOT_TICKED}
    family = model_files.expected_base_family(settings.base_checkpoint)
    prompts = [(*both, settings.base_prompt, settings.base_negative_prompt) for both in asked.prompts(settings.hires)]
    expected = [*routing.expected(prompts), *routing.expected_units(asked.units)]
    routes = [routing.with_base(route, family) for route in expected]
    plugins = {"plugins": [asdict(route) for route in routes], "summary": routing.sentence(routes, family)}
    return {"base": FAMILY_NAMES[family], **_forecast(asked, settings, family), **plugins}


def _forecast(asked: TabRequest, settings: Settings, family: str) -> dict[str, Any]:
    # whoever leaves X-Adapter unticked does not wait for what it is made of
    from ..base.models import loaded_models

    try:
        forecast, memory = Forecast.of(asked, settings), memory_mode(loaded_models(), asked, settings)
        pair = model_files.adapter_pair(model_files.find_adapter(settings.adapter)) if settings.has_adapter else Pair()
    except XAdapterError as problem:
        return {"line": str(problem), "problem": True}
    passes = [asdict(one) for one in forecast.passes]
    line = " ".join(filter(None, [forecast.describe(FAMILY_NAMES[family], memory), pair.describe(family)]))
    return {"line": line, "passes": passes, "memory": memory, "pair": str(pair)}


def _models() -> dict[str, list[str]]:
    return {"adapters": list(model_files.adapters()), "base_checkpoints": list(model_files.base_checkpoints())}


def _authentication() -> list[Any]:
    """The same user names and passwords as the WebUI's own routes (--api-auth)."""
    if not shared.cmd_opts.api_auth:
        return []

    def check(credentials: HTTPBasicCredentials = Depends(HTTPBasic())) -> None:  # noqa: B008 - FastAPI's way
        if not _is_known(credentials):
            raise HTTPException(401, "Incorrect username or password", headers={"WWW-Authenticate": "Basic"})

    return [Depends(check)]


def _authentication_of_the_page(app: FastAPI) -> list[Any]:
    """Also whoever may see the page: it has no API password, but gradio's cookie where it asks for a login."""
    if not shared.cmd_opts.api_auth:
        return []
    without_password = HTTPBasic(auto_error=False)

    def check(
        request: Request,
        given: HTTPBasicCredentials | None = Depends(without_password),  # noqa: B008 - FastAPI's way
    ) -> None:
        if not _may_see_the_page(app, request) and not (given and _is_known(given)):
            # without the header that makes a browser ask the user for a password while they type
            raise HTTPException(401, "Incorrect username or password")

    return [Depends(check)]


def _may_see_the_page(app: FastAPI, request: Request) -> bool:
    """As gradio's own app judges it; with --nowebui there is neither."""
    if not isinstance(app, gr.routes.App):
        return False
    token = request.cookies.get("access-token") or request.cookies.get("access-token-unsecure")
    return app.auth is None or token in app.tokens


def _is_known(credentials: HTTPBasicCredentials) -> bool:
    passwords = dict(pair.split(":", 1) for pair in shared.cmd_opts.api_auth.split(","))
    expected = passwords.get(credentials.username)
    return expected is not None and compare_digest(credentials.password.encode(), expected.encode())
