"""The routes, the positional arguments and the infotext of the real WebUI."""

from __future__ import annotations

import re
from urllib.parse import urlencode
from urllib.request import ProxyHandler, Request, build_opener

import jsonschema
import pytest

import lib_xadapter
from lib_xadapter.settings import arguments as settings_table
from tests.pictures import grey_levels_apart

from .asking import TITLE, arguments, made, with_xadapter
from .conftest import PLAIN, same_bytes
from .server import WebUIServer

EVERYTHING = {
    "base_checkpoint": "tiny15",
    "adapter": "tiny.safetensors",
    "switch_point": 0.65,
    "weight": [1.0, 0.5, 1.25],
    "base_prompt": 'a dog, "fluffy": (soft:1.2)',
    "base_negative_prompt": "a horse\na cow",
    "base_width": 192,
    "base_height": 128,
    "base_cfg_scale": 5.5,
    "base_steps": 5,
    "guidance_start": 0.1,
    "guidance_end": 0.9,
    "return_base_image": True,
}


def login_cookie(server: WebUIServer, user: str, password: str) -> str:
    """What gradio gives a browser for a name and password on its login page."""
    form = urlencode({"username": user, "password": password}).encode()
    with build_opener(ProxyHandler({})).open(Request(server.url + "/login", form)) as response:
        return "; ".join(cookie.split(";")[0] for cookie in response.headers.get_all("Set-Cookie"))


class TestRoutes:
    def test_models_are_listed_by_the_names_that_requests_take(self, webui):
        listed = webui.get("/xadapter/v1/models").content
        assert listed["adapters"] == ["tiny.bin", "tiny.safetensors"]
        assert [name.split(" [")[0] for name in listed["base_checkpoints"]] == ["tiny15.safetensors"]
        for name in (*listed["base_checkpoints"], "tiny15", "tiny15.safetensors", "tiny15 [0123456789]"):
            assert with_xadapter(webui, {"base_checkpoint": name}, steps=1)
        for name in (*listed["adapters"], "tiny", "tiny [0123456789]"):
            assert with_xadapter(webui, {"adapter": name}, steps=1)

    def test_the_schema_describes_the_object(self, webui):
        schema = webui.get("/xadapter/v1/schema").content
        jsonschema.validate({**EVERYTHING, "enabled": True, "single_stage": False}, schema)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({"swich_point": 1}, schema)

    def test_the_version_is_the_packages(self, webui):
        assert webui.get("/xadapter/v1/version").content == {"version": lib_xadapter.__version__}

    def test_they_ask_for_the_apis_password(self, start_webui):
        with start_webui("auth", credentials="user:secret") as server:
            assert server.get("/xadapter/v1/models").status == 200
            assert server.get("/xadapter/v1/version").status == 200
            for wrong in ("user:guess", "nobody:secret", None):
                server.credentials = wrong
                for route in ("models", "schema", "version"):
                    assert server.get(f"/xadapter/v1/{route}").status == 401
                # who may see the page may ask what the page asks
                assert server.post("/xadapter/v1/plan", {}).status == 200
            server.credentials = "user:secret"

    def test_the_pages_own_route_takes_the_pages_login(self, start_webui):
        with start_webui("login", credentials="user:secret", flags=["--gradio-auth", "me:mine"]) as server:
            assert server.post("/xadapter/v1/plan", {}).status == 200
            server.credentials = None
            assert server.post("/xadapter/v1/plan", {}).status == 401
            headers = {"Content-Type": "application/json", "Cookie": login_cookie(server, "me", "mine")}
            for route, content, status in (("plan", b"{}", 200), ("models", None, 401)):
                asked = Request(f"{server.url}/xadapter/v1/{route}", content, headers)
                assert server.ask(asked, timeout=60).status == status

    def test_the_script_is_listed_for_both_tabs_with_the_same_arguments(self, webui):
        scripts = webui.get("/sdapi/v1/scripts").content
        assert all(TITLE.lower() in scripts[tab] for tab in ("txt2img", "img2img"))
        listed = [script for script in webui.get("/sdapi/v1/script-info").content if script["name"] == TITLE.lower()]
        assert sorted(script["is_img2img"] for script in listed) == [False, True]
        labels = [[argument["label"] for argument in script["args"]] for script in listed]
        assert labels[0] == labels[1]
        assert labels[0][: len(settings_table())] == [row.label for row in settings_table().values()]


class TestPositionalArguments:
    def test_the_pages_list_means_the_same_as_the_object(self, webui):
        listed = {TITLE: {"args": [True, "tiny15", "tiny.safetensors", 0.65, 0.5]}}
        from_list = made(webui.txt2img(**PLAIN, alwayson_scripts=listed)).image
        given = {"base_checkpoint": "tiny15", "adapter": "tiny.safetensors", "switch_point": 0.65, "weight": 0.5}
        assert same_bytes(from_list, with_xadapter(webui, given).image)

    def test_an_empty_list_leaves_it_off(self, webui):
        answer = made(webui.txt2img(**PLAIN, alwayson_scripts={TITLE: {"args": []}}))
        assert "X-Adapter" not in answer.infotexts[0]


class TestInfotext:
    def test_defaults_are_left_out(self, webui):
        keys = re.findall(r"X-Adapter [\w ]+(?=:)", with_xadapter(webui).infotexts[0])
        assert keys == ["X-Adapter version", "X-Adapter base checkpoint", "X-Adapter adapter"]

    @pytest.mark.parametrize(
        "given",
        [{}, EVERYTHING, {"single_stage": True, "weight": 0.5}, {"adapter": "None"}],
        ids=["defaults", "everything", "single stage", "no adapter"],
    )
    def test_the_infotext_alone_makes_the_picture_again(self, webui, given):
        first = with_xadapter(webui, given)
        infotext = first.infotexts[0]
        again = made(webui.txt2img(infotext=infotext))
        assert again.infotexts[0] == infotext
        assert len(again.images) == len(first.images)
        for one, other in zip(first.images, again.images, strict=True):
            assert grey_levels_apart(one, other) <= 1

    @pytest.mark.parametrize(
        "request_", [{}, {"subseed": 3, "subseed_strength": 0.5}], ids=["seeds count on", "variation seeds count on"]
    )
    def test_with_a_base_seed_each_image_of_a_job_is_made_again_by_its_own_text(self, webui, request_):
        # there is a grid among pictures that are saved alone
        both = {"batch_size": 2, "n_iter": 2, "save_images": True}
        whole = with_xadapter(webui, {"base_seed": 40, "base_prompt": "a dog"}, **both, **request_)
        assert len(whole.images) == 5
        # the grid has the text of the first image
        assert whole.infotexts[0].split("X-Adapter")[1:] == whole.infotexts[1].split("X-Adapter")[1:]
        for image, infotext in zip(whole.images[1:], whole.infotexts[1:], strict=True):
            again = made(webui.txt2img(infotext=infotext))
            assert again.infotexts[0] == infotext
            assert grey_levels_apart(again.image, image) <= 1

    def test_an_object_wins_over_the_infotext(self, webui):
        infotext = with_xadapter(webui, {"switch_point": 0.5, "base_prompt": "a dog"}).infotexts[0]
        again = made(webui.txt2img(infotext=infotext, **arguments(switch_point=0.25)))
        assert "X-Adapter switch point: 0.25" in again.infotexts[0]
        assert "X-Adapter base prompt: a dog" in again.infotexts[0]

    def test_what_an_older_version_left_out_is_what_it_meant_then(self, webui):
        older = with_xadapter(webui, {"switch_point": 0.35})
        left_out = older.infotexts[0].replace(", X-Adapter switch point: 0.35", "")
        assert left_out != older.infotexts[0]
        with webui.pretending("a later default"):
            again = made(webui.txt2img(infotext=left_out))
        assert again.infotexts[0] == older.infotexts[0]
        assert same_bytes(again.image, older.image)

    def test_the_loras_of_both_models_keep_their_tags(self, webui):
        prompt = "a cat <lora:style15:0.8> <lora:stylexl:1>"
        assert with_xadapter(webui, prompt=prompt).infotexts[0].startswith(prompt)
