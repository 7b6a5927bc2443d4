"""Which model gets which LoRA: what its file was made for, unless the tag or the user's settings say more."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.pictures import grey_levels_apart

from .. import lora_formats
from .asking import arguments, base_alone, made, sdedit, with_xadapter
from .conftest import PLAIN, same_bytes
from .server import WebUIServer
from .small_loras import TINY15, add_lora

STEPS = {"steps": 3}
PICTURES = {"weight": 0, "switch_point": 0.2, "return_base_image": True}


@pytest.fixture(scope="module")
def server(webui: WebUIServer) -> WebUIServer:
    """With a LoRA of one text encoder, which fits both models."""
    numbered = lora_formats.kohya_text(0)
    add_lora(webui, "numbered", lora_formats.file_of(TINY15.text_layers(0), lora_formats.lora, numbered))
    return webui


@pytest.fixture
def network_of_the_settings(server: WebUIServer) -> Iterator:
    """Sets the setting "Add network to prompt", until the test ends."""

    def choose(name: str) -> None:
        assert server.post("/sdapi/v1/options", {"sd_lora": name}).status == 200

    yield choose
    choose("None")


def both_pictures(server: WebUIServer, prompt: str, given: dict | None = None):
    return with_xadapter(server, {**PICTURES, **(given or {})}, prompt=prompt, **STEPS)


def expect(server: WebUIServer, answer, base: str, upgraded: str) -> None:
    """The pictures are the WebUI's own for these prompts of the base and of SDXL."""
    ours, start = answer.images
    assert grey_levels_apart(start, base_alone(server, prompt=base, **STEPS)) <= 1
    assert grey_levels_apart(ours, sdedit(server, start, 0.2, prompt=upgraded, **STEPS)) <= 1


class TestModelArgument:
    """`<lora:name:1:model=…>` wins over what the file was made for."""

    @pytest.mark.parametrize(
        ("tag", "base", "upgraded"),
        [
            ("<lora:numbered:1>", "a cat", "a cat <lora:numbered:1>"),
            ("<lora:numbered:1:model=base>", "a cat <lora:numbered:1>", "a cat"),
            ("<lora:numbered:1:model=sdxl>", "a cat", "a cat <lora:numbered:1>"),
            ("<lora:numbered:1:model=both>", "a cat <lora:numbered:1>", "a cat <lora:numbered:1>"),
            ("<lora:style15:0.5:model=base>", "a cat <lora:style15:0.5>", "a cat"),
        ],
    )
    def test_decides(self, server, tag, base, upgraded):
        expect(server, both_pictures(server, f"a cat {tag}"), base, upgraded)

    def test_the_lora_changes_either_model(self, server):
        without, of_both = both_pictures(server, "a cat"), both_pictures(server, "a cat <lora:numbered:1:model=both>")
        assert all(grey_levels_apart(*pair) > 1 for pair in zip(without.images, of_both.images, strict=True))

    def test_sends_even_an_sd15_file_to_sdxl(self, server):
        told = both_pictures(server, "a cat <lora:style15:1:model=sdxl>")
        expect(server, told, "a cat", "a cat <lora:style15:1>")

    @pytest.mark.parametrize("value", ["sd15", "", "BASE "])
    def test_of_another_value_is_refused(self, server, value):
        answer = server.txt2img(**PLAIN | {"prompt": f"a cat <lora:style15:1:model={value}>"}, **arguments())
        assert answer.status == 422
        assert f"'model={value}' of the LoRA 'style15' is not among base, sdxl, both" in answer.error

    def test_in_the_base_prompt_sdxl_is_refused(self, server):
        given = {"base_prompt": "a cat <lora:style15:1:model=sdxl>"}
        answer = server.txt2img(**PLAIN, **arguments(**given))
        assert answer.status == 422
        assert "'style15' in the SD1.5 prompt was made for SDXL" in answer.error

    def test_stays_in_the_infotext(self, server):
        tag = "<lora:style15:0.5:model=base>"
        infotext = both_pictures(server, f"a cat {tag}").infotexts[0]
        assert tag in infotext


class TestAddNetworkToPrompt:
    """The setting adds its LoRA to the model that it was made for, and to no other."""

    @pytest.mark.parametrize(
        ("name", "base", "upgraded"),
        [("style15", "a cat <lora:style15:1>", "a cat"), ("stylexl", "a cat", "a cat <lora:stylexl:1>")],
    )
    def test_goes_to_one_model_only(self, server, network_of_the_settings, name, base, upgraded):
        network_of_the_settings(name)
        answer = both_pictures(server, "a cat")
        network_of_the_settings("None")
        expect(server, answer, base, upgraded)
        assert f"a cat<lora:{name}:1.0>" in answer.infotexts[0]

    def test_the_setting_stays_as_it_is(self, server, network_of_the_settings):
        network_of_the_settings("style15")
        both_pictures(server, "a cat")
        assert server.get("/sdapi/v1/options").content["sd_lora"] == "style15"

    def test_a_lora_named_in_the_prompt_has_its_own_weight(self, server, network_of_the_settings):
        network_of_the_settings("style15")
        answer = both_pictures(server, "a cat <lora:style15:0.3>")
        network_of_the_settings("None")
        expect(server, answer, "a cat <lora:style15:0.3>", "a cat")
        assert answer.infotexts[0].count("<lora:") == 1

    def test_each_batch_has_it_once(self, server, network_of_the_settings):
        network_of_the_settings("style15")
        request = {**PLAIN, **STEPS, "n_iter": 2, "do_not_save_grid": True}
        answer = made(server.txt2img(**request, **arguments(**PICTURES)))
        network_of_the_settings("None")
        for place, start in enumerate(answer.images[-2:]):
            prompt = "a cat <lora:style15:1>"
            assert grey_levels_apart(start, base_alone(server, prompt=prompt, seed=7 + place, **STEPS)) <= 1

    def test_leaves_no_trace(self, server, network_of_the_settings):
        before = both_pictures(server, "a cat").images
        network_of_the_settings("style15")
        both_pictures(server, "a cat")
        network_of_the_settings("None")
        after = both_pictures(server, "a cat").images
        assert all(same_bytes(*pair) for pair in zip(before, after, strict=True))


class TestTelling:
    """The picture says which plugin went to which model, and the route says it before."""

    PROMPT = "a base15 cat, upgradedxl <lora:style15:0.5> <lora:stylexl:1> <lora:numbered:1:model=both>"
    SPLIT = (
        "LoRA style15 to SD1.5; LoRA numbered to SD1.5 and SDXL; LoRA stylexl to SDXL; "
        "textual inversion base15 to SD1.5; textual inversion upgradedxl to SDXL"
    )

    def test_it_stands_in_the_infotext(self, server):
        answer = both_pictures(server, self.PROMPT)
        assert f"X-Adapter plugins: {self.SPLIT}" in answer.infotexts[0]

    def test_nothing_is_said_where_there_are_none(self, server):
        assert "X-Adapter plugins" not in both_pictures(server, "a cat").infotexts[0]

    def test_what_nothing_could_take_is_named(self, server):
        add_lora(server, "strange", {"transformer_single_blocks_0_attn_to_q.lora_up.weight": (8, 2)})
        answer = both_pictures(server, "a cat <lora:strange:1> <lora:style15:1>")
        assert "X-Adapter plugins: LoRA style15 to SD1.5; LoRA strange to neither model" in answer.infotexts[0]

    def route(self, server, prompt, **arguments):
        return server.post("/xadapter/v1/plan", {"prompt": prompt, "args": [arguments]}).content

    def test_the_route_splits_as_the_run_does(self, server):
        split = self.route(server, prompt=self.PROMPT)
        found = {plugin["name"]: plugin["models"] for plugin in split["plugins"]}
        assert found == {
            "style15": ["base"],
            "stylexl": ["sdxl"],
            "numbered": ["base", "sdxl"],
            "base15": ["base"],
            "upgradedxl": ["sdxl"],
        }
        assert set(split["summary"].split("; ")) == set(self.SPLIT.split("; "))

    def test_the_route_tells_what_will_be_refused(self, server):
        prompt = "a cat <lora:nobody:1> <lora:style15:1:model=sd15>"
        split = self.route(server, prompt=prompt, base_prompt="<lora:stylexl:1>")
        problems = {plugin["name"]: plugin["problem"] for plugin in split["plugins"]}
        assert problems["nobody"] == "there is none of that name"
        assert "'model=sd15'" in problems["style15"]
        assert "was made for SDXL" in problems["stylexl"]

    def test_the_base_prompt_is_the_bases(self, server):
        split = self.route(server, prompt="a cat <lora:style15:1>, upgradedxl", base_prompt="base15, upgradedxl")
        found = {plugin["name"]: plugin["models"] for plugin in split["plugins"]}
        assert found == {"style15": ["base"], "base15": ["base"], "upgradedxl": ["sdxl"]}

    def test_the_route_counts_the_setting(self, server, network_of_the_settings):
        network_of_the_settings("style15")
        assert self.route(server, prompt="a cat")["summary"] == "LoRA style15 to SD1.5"

    def test_another_shape_of_request_is_refused(self, server):
        assert server.post("/xadapter/v1/plan", {"prompt": ["a cat"]}).status == 422
