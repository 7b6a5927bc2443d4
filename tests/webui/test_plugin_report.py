"""Which plugin went to which model, under each picture: of its own batch, and of either pass of Hires. fix."""

from __future__ import annotations

from .asking import made, with_xadapter
from .plotting import scripted

HIRES = {"enable_hr": True, "hr_scale": 1.5, "hr_upscaler": "Lanczos", "denoising_strength": 0.6, "steps": 2}
FIRST, SECOND = "X-Adapter plugins: ", "X-Adapter hires plugins: "


def told(infotext: str) -> dict[str, str]:
    """What is told of each pass."""
    found = {key: infotext.partition(key)[2].partition(",")[0] for key in (FIRST, SECOND)}
    return {key: text for key, text in found.items() if text}


class TestHiresFix:
    def test_each_pass_tells_its_own(self, webui):
        prompts = {"prompt": "a cat <lora:stylexl:1>", "hr_prompt": "a base15 cat <lora:style15:1>"}
        answer = with_xadapter(webui, **HIRES, **prompts)
        second = "LoRA style15 to SD1.5; textual inversion base15 to SD1.5"
        assert told(answer.infotexts[0]) == {FIRST: "LoRA stylexl to SDXL", SECOND: second}

    def test_sdxls_of_the_second_are_told_of_the_second(self, webui):
        prompts = {"prompt": "a cat", "hr_prompt": "an upgradedxl cat <lora:stylexl:1>"}
        answer = with_xadapter(webui, **HIRES, **prompts)
        assert told(answer.infotexts[0]) == {SECOND: "LoRA stylexl to SDXL; textual inversion upgradedxl to SDXL"}

    def test_a_second_without_any_says_so(self, webui):
        prompts = {"prompt": "a cat <lora:style15:1>", "hr_prompt": "a cat"}
        answer = with_xadapter(webui, **HIRES, **prompts)
        assert told(answer.infotexts[0]) == {FIRST: "LoRA style15 to SD1.5", SECOND: "none"}

    def test_where_both_are_alike_it_is_told_once(self, webui):
        answer = with_xadapter(webui, **HIRES, prompt="a cat <lora:style15:1>")
        assert told(answer.infotexts[0]) == {FIRST: "LoRA style15 to SD1.5"}


def test_a_batch_without_plugins_tells_nothing_of_those_before_it(webui):
    prompt = "a cat|<lora:style15:1>|in a boat"
    answer = made(scripted(webui, "prompt matrix", [False, False, "positive", "comma", 0], {}, prompt=prompt, steps=2))
    first = answer.info["index_of_first_image"]
    with_lora = {FIRST: "LoRA style15 to SD1.5"}
    assert list(map(told, answer.infotexts[first : first + 4])) == [{}, with_lora, {}, with_lora]
