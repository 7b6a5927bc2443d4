"""Other people's extensions beside X-Adapter, all of them in one WebUI.

`OTHER_EXTENSIONS_DIR` is a folder with clones of their repositories, `WEBUI_PYTHON` a Python that has what they need
beside the WebUI's requirements; a test whose extension is not there is skipped.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.pictures import grey_levels_apart

from .asking import HALF, TITLE, USE_BASE, made, with_xadapter
from .conftest import PLAIN, same_bytes
from .server import Answer, WebUIServer

DYNAMIC_PROMPTS_OPTIONS = {
    "dp_ignore_whitespace": False,
    "dp_write_raw_template": False,
    "dp_write_prompts_to_file": False,
    "dp_parser_variant_start": "{",
    "dp_parser_variant_end": "}",
    "dp_parser_wildcard_wrap": "__",
    "dp_limit_jinja_prompts": False,
    "dp_auto_purge_cache": False,
    "dp_magicprompt_batch_size": 1,
    "dp_wildcard_manager_no_dedupe": False,
    "dp_wildcard_manager_no_sort": False,
    "dp_wildcard_manager_shuffle": False,
}
"""It looks for its settings and, in a WebUI that has just been set up, does not find them."""
FREEU = "sd-webui-freeu"
LOCKSTEP, RECORDED = {"memory": "lockstep"}, {"memory": "recorded"}
SHOWN = {"weight": 0, "return_base_image": True}


def installed() -> list[Path]:
    folder = os.environ.get("OTHER_EXTENSIONS_DIR")
    return sorted(path for path in Path(folder).iterdir() if path.is_dir()) if folder else []


def needs(name: str) -> pytest.MarkDecorator:
    """Skips a test where an extension is not there."""
    is_there = name in {path.name for path in installed()}
    return pytest.mark.skipif(not is_there, reason=f"needs {name} in the folder OTHER_EXTENSIONS_DIR")


@pytest.fixture(scope="module")
def server(start_webui, tmp_path_factory):
    """A WebUI with X-Adapter and all of them."""
    folder, more = tmp_path_factory.mktemp("others"), []
    for source in installed():
        shutil.copytree(source, folder / source.name, ignore=shutil.ignore_patterns(".git"))
        more.append(folder / source.name)
        if source.name == FREEU:
            with_widths_of_the_small_models(folder / source.name)
    server = start_webui("beside-others", more_extensions=more, options=DYNAMIC_PROMPTS_OPTIONS)
    try:
        # some of them try to download for a while
        yield server.start(timeout=1200)
    finally:
        server.close()


class Both:
    """A server's pictures with another extension at work.

    Args:
        server: has both extensions.
        title: of the other's script.
        args: its arguments, as REST takes them.
    """

    def __init__(self, server: WebUIServer, title: str, args: list[Any]) -> None:
        self._server = server
        self._other = {title: {"args": args}}

    def xadapter(self, given: dict[str, Any] | None = None, **request: Any) -> Answer:
        scripts = {TITLE: {"args": [given or {}]}, **self._other}
        return made(self.txt2img(alwayson_scripts=scripts, **request))

    def base_alone(self, **request: Any):
        return made(self.txt2img(alwayson_scripts=self._other, **{**HALF, **request}, **USE_BASE)).image

    def sdedit(self, start, **request: Any):
        asked = {**PLAIN, **request, "denoising_strength": 0.8, "alwayson_scripts": self._other}
        return made(self._server.img2img(start, **asked)).image

    def plain(self, **request: Any):
        return made(self.txt2img(alwayson_scripts=self._other, **request)).image

    def txt2img(self, **request: Any) -> Answer:
        return self._server.txt2img(**{**PLAIN, **request})


@needs("sd-dynamic-prompts")
def test_dynamic_prompts(server):
    """The base gets the prompt that was drawn."""
    title = title_that_begins(server, "dynamic prompts")
    both = Both(server, title, [True])
    answer = both.xadapter(prompt="a {red|blue|green} {cat|dog} <lora:style15:{0.5|1}>", n_iter=2, seed=3)
    first = answer.info["index_of_first_image"]
    for place, prompt in enumerate(answer.info["all_prompts"]):
        assert "{" not in prompt
        alone = with_xadapter(server, prompt=prompt, seed=answer.info["all_seeds"][place]).image
        assert grey_levels_apart(answer.images[first + place], alone) <= 1


def with_widths_of_the_small_models(folder: Path) -> None:
    """FreeU knows a decoder's blocks by their channels, of which the small models have a tenth."""
    code = folder / "lib_free_u/unet.py"
    text = code.read_text()
    assert "[1280, 640, 320]" in text
    code.write_text(text.replace("[1280, 640, 320]", "[128, 64, 32]"))


@pytest.fixture
def freeu(server):
    stages = [{"backbone_factor": 1.4, "skip_factor": 0.7}, {"backbone_factor": 1.6, "skip_factor": 0.4}]
    return Both(server, "FreeU", [{"enable": True, "version": "1", "stage_infos": stages}])


@needs(FREEU)
class TestFreeU:
    """Base and SDXL are each what FreeU makes of them alone."""

    def test_stage_1_is_the_webuis_own_with_freeu(self, freeu):
        ours, start = freeu.xadapter(SHOWN).images
        alone = freeu.base_alone()
        without = made(freeu.txt2img(**HALF, **USE_BASE)).image
        assert grey_levels_apart(alone, without) > 1
        assert grey_levels_apart(start, alone) <= 1
        assert grey_levels_apart(ours, freeu.sdedit(start)) <= 1

    def test_the_joint_stage_is_the_same_in_either_memory_mode(self, freeu):
        lockstep, recorded = freeu.xadapter(LOCKSTEP).image, freeu.xadapter(RECORDED).image
        assert same_bytes(lockstep, recorded)

    def test_without_freeu_the_next_picture_has_none(self, freeu):
        def without() -> Any:
            return made(freeu.txt2img(alwayson_scripts={TITLE: {"args": [LOCKSTEP]}})).image

        before = without()
        assert grey_levels_apart(freeu.xadapter(LOCKSTEP).image, before) > 1
        assert same_bytes(without(), before)


@needs("sd-webui-neutral-prompt")
class TestNeutralPrompt:
    """Each model composes its own prompt."""

    PROMPT = "a cat AND_PERP a red dog :0.8"

    @pytest.fixture
    def neutral(self, server):
        return Both(server, "Neutral Prompt", [])

    def test_stage_1_and_the_baseline_are_the_webuis_own(self, neutral):
        ours, start = neutral.xadapter(SHOWN, prompt=self.PROMPT).images
        assert grey_levels_apart(start, neutral.base_alone(prompt=self.PROMPT)) <= 1
        assert grey_levels_apart(ours, neutral.sdedit(start, prompt=self.PROMPT)) <= 1

    @pytest.mark.parametrize("base_prompt", ["a boat", "a boat AND_SALT the sea :0.5 AND_PERP a red sun"])
    def test_a_base_prompt_of_its_own_is_composed_by_itself(self, neutral, base_prompt):
        ours, start = neutral.xadapter({**SHOWN, "base_prompt": base_prompt}, prompt=self.PROMPT).images
        assert grey_levels_apart(start, neutral.base_alone(prompt=base_prompt)) <= 1
        assert grey_levels_apart(ours, neutral.sdedit(start, prompt=self.PROMPT)) <= 1

    @pytest.mark.parametrize("base_prompt", ["", "a boat"])
    def test_both_memory_modes_agree(self, neutral, base_prompt):
        one, other = (
            neutral.xadapter({**memory, "base_prompt": base_prompt}, prompt=self.PROMPT).image
            for memory in (LOCKSTEP, RECORDED)
        )
        assert same_bytes(one, other)


@needs("multidiffusion-upscaler-for-automatic1111")
class TestTiles:
    def test_tiled_vae_works_on_sdxls_side(self, server):
        tiled = Both(server, "Tiled VAE", [True, 256, 32, False, True, True, False])
        ours, start = tiled.xadapter(SHOWN, width=512, height=512).images
        assert same_bytes(start, with_xadapter(server, SHOWN, width=512, height=512).images[1])
        assert grey_levels_apart(ours, tiled.sdedit(start, width=512, height=512)) <= 1

    def test_tiled_diffusion_is_refused_with_a_message(self, server):
        before = made(server.txt2img(**PLAIN)).image
        args = [True, "MultiDiffusion", False, True, 1024, 1024, 16, 16, 8, 4]
        answer = server.txt2img(**PLAIN, alwayson_scripts={TITLE: {"args": [{}]}, "Tiled Diffusion": {"args": args}})
        assert answer.status == 422
        assert "Tiled Diffusion" in answer.error
        assert same_bytes(made(server.txt2img(**PLAIN)).image, before)

    def test_tiled_diffusion_that_has_nothing_to_do_is_none(self, server):
        args = [True, "MultiDiffusion", False, True, 1024, 1024, 96, 96, 48, 4]
        one = Both(server, "Tiled Diffusion", args).xadapter(LOCKSTEP).image
        assert same_bytes(one, with_xadapter(server, LOCKSTEP).image)


@needs("adetailer")
class TestADetailer:
    """Its inner pictures are plain; probe/scripts/fixed_box.py is its detector."""

    @pytest.mark.parametrize("memory", [LOCKSTEP, RECORDED], ids=lambda memory: memory["memory"])
    def test_the_box_is_painted_over_and_the_rest_is_the_jobs(self, server, memory):
        detailing = Both(server, "ADetailer", [True, False, {"ad_model": "mediapipe_face_full"}])
        usual = [with_xadapter(server, memory, seed=seed).image for seed in (7, 8)]
        answer = detailing.xadapter(memory, n_iter=2, do_not_save_grid=True)
        first = answer.info["index_of_first_image"]
        for detailed, plain in zip(answer.images[first:], usual, strict=True):
            assert grey_levels_apart(detailed, plain) > 1
            corner = (0, 0, 40, 40)
            assert same_bytes(detailed.crop(corner), plain.crop(corner))
            inner = made(server.img2img(plain, **PLAIN, denoising_strength=0.4)).image
            assert inner.size == plain.size
        assert "ADetailer model" in answer.infotexts[first]
        assert server.state()["hooks"] == []


@needs("sd-webui-regional-prompter")
def test_regional_prompter(server):
    """SDXL has its regions; the base has their prompts one after the other."""
    args = [
        True,
        False,
        "Matrix",
        "Columns",
        "Mask",
        "Prompt",
        "1,1",
        "0.2",
        False,
        False,
        False,
        "Attention",
        [],
        "0",
        "0",
        "0",
        None,
        "0",
        "0",
        False,
    ]
    both, prompt = Both(server, "Regional Prompter", args), "a red cat BREAK a blue dog"
    before = made(server.txt2img(**PLAIN)).image
    ours, start = both.xadapter(SHOWN, prompt=prompt).images
    assert grey_levels_apart(start, made(server.txt2img(**{**PLAIN, **HALF, "prompt": prompt}, **USE_BASE)).image) <= 1
    assert grey_levels_apart(ours, both.sdedit(start, prompt=prompt)) <= 1
    one, other = (both.xadapter(memory, prompt=prompt).image for memory in (LOCKSTEP, RECORDED))
    assert same_bytes(one, other)
    assert grey_levels_apart(one, with_xadapter(server, LOCKSTEP, prompt=prompt).image) > 1
    assert same_bytes(made(server.txt2img(**PLAIN)).image, before)


@needs("sd-dynamic-thresholding")
def test_dynamic_thresholding(server):
    """SDXL's guidance is thresholded, the base's is its own."""
    both = Both(server, "Dynamic Thresholding (CFG Scale Fix)", [True, 3])
    high = {"cfg_scale": 15}
    ours, start = both.xadapter(SHOWN, **high).images
    assert same_bytes(start, with_xadapter(server, SHOWN, **high).images[1])
    assert grey_levels_apart(ours, both.sdedit(start, **high)) <= 1
    one, other = (both.xadapter(memory, **high).image for memory in (LOCKSTEP, RECORDED))
    assert same_bytes(one, other)
    assert grey_levels_apart(one, with_xadapter(server, LOCKSTEP, **high).image) > 1


@needs("sd-webui-detail-daemon")
def test_detail_daemon(server):
    """Stage 1 and SDXL each have it as alone; in the joint stage the base runs at the sampler's own noise levels."""
    both = Both(server, "Detail Daemon", [True, True, False, "both", 0.0, 1.0, 0.5, 0.3])
    ours, start = both.xadapter(SHOWN).images
    assert grey_levels_apart(start, both.base_alone()) <= 1
    assert grey_levels_apart(ours, both.sdedit(start)) <= 1
    one, other = (both.xadapter(memory).image for memory in (LOCKSTEP, RECORDED))
    assert same_bytes(one, other)
    assert grey_levels_apart(one, with_xadapter(server, LOCKSTEP).image) > 1


def title_that_begins(server: WebUIServer, beginning: str) -> str:
    titles = server.get("/sdapi/v1/scripts").content["txt2img"]
    return next(title for title in titles if title.startswith(beginning))
