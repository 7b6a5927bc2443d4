"""Who is answered by which route, under every way of locking the WebUI, and what an answer never tells."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import pytest

from .asking import TITLE
from .conftest import PLAIN
from .server import REPOSITORY, Reply, WebUIServer

CREDENTIALS = "user:secret"
OK, UNAUTHORIZED, REFUSED = 200, 401, 422
ROUTES = ("version", "schema", "models", "plan")
PLAN = {"args": [True], "prompt": "a cat", "negative_prompt": "", "units": []}


@dataclass(frozen=True)
class Lock:
    """Flags of the WebUI, and which of our routes answer everybody then."""

    flags: tuple[str, ...] = ()
    api_password: bool = False
    open_routes: tuple[str, ...] = ROUTES


LOCKS = {
    "none": Lock(),
    # whoever may see the page may ask what the page asks
    "--api-auth": Lock(api_password=True, open_routes=("plan",)),
    "--gradio-auth": Lock(("--gradio-auth", "me:mine")),
    "both": Lock(("--gradio-auth", "me:mine"), api_password=True, open_routes=()),
    "--nowebui": Lock(("--nowebui",)),
    "--nowebui and --api-auth": Lock(("--nowebui",), api_password=True, open_routes=()),
}
"""As of the WebUI's own routes: its login guards the page alone, --api-auth guards the API."""


@pytest.fixture(scope="module", params=LOCKS)
def locked(request, start_webui) -> Iterator[tuple[Lock, WebUIServer]]:
    lock = LOCKS[request.param]
    credentials = CREDENTIALS if lock.api_password else None
    with start_webui("locked", flags=lock.flags, credentials=credentials) as server:
        yield lock, server


def ask(server: WebUIServer, route: str, headers: Mapping[str, str] | None = None, known: bool = True) -> Reply:
    content = json.dumps(PLAN).encode() if route == "plan" else None
    headers = {"Content-Type": "application/json", **(headers or {})}
    request = urllib.request.Request(f"{server.url}/xadapter/v1/{route}", content, headers)
    credentials, server.credentials = server.credentials, server.credentials if known else None
    try:
        return server.ask(request, 600)
    finally:
        server.credentials = credentials


@pytest.mark.parametrize("route", ROUTES)
def test_who_knows_the_password_is_answered(locked, route):
    _, server = locked
    assert ask(server, route).status == OK


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Basic bWU6bWluZQ=="},
        {"Authorization": "Bearer x"},
        {"Cookie": "access-token=x; access-token-unsecure=x"},
        {"X-Forwarded-For": "127.0.0.1", "X-Forwarded-Host": "localhost", "Forwarded": "for=127.0.0.1"},
    ],
    ids=["nothing", "another password", "a token", "a cookie", "a proxy"],
)
def test_who_does_not_is_answered_where_there_is_none(locked, route, headers):
    lock, server = locked
    expected = OK if route in lock.open_routes else UNAUTHORIZED
    assert ask(server, route, headers, known=False).status == expected


def test_there_are_no_other_routes(locked):
    _, server = locked
    described = server.get("/openapi.json").content["paths"]
    assert {path for path in described if "xadapter" in path} == {f"/xadapter/v1/{route}" for route in ROUTES}


@pytest.mark.parametrize(
    "given",
    [
        {"adapter": "nobody"},
        {"adapter": "../../../etc/passwd"},
        {"base_checkpoint": "/etc/passwd"},
        {"base_prompt": "<lora:../../nobody:1>"},
        {"adapter": "cut"},
    ],
    ids=str,
)
def test_no_answer_tells_where_the_machine_keeps_what(locked, given):
    _, server = locked
    cut = server.data / "models" / "X-Adapter" / "cut.safetensors"
    cut.write_bytes(b"{}")
    places = [str(server.data), str(server.installation.folder), str(REPOSITORY)]
    told = [json.dumps(ask(server, route).content) for route in ROUTES]
    answer = server.txt2img(**{**PLAIN, "steps": 1}, alwayson_scripts={TITLE: {"args": [given]}})
    assert answer.status == REFUSED, answer.error
    cut.unlink()
    assert [place for place in places if any(place in text for text in (*told, answer.error))] == []
