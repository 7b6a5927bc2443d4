"""The accordion in a real browser: open, tick, set, generate, read the infotext back."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
from PIL import Image

from lib_xadapter.settings import arguments as arguments_of_the_table
from tests.browsers import chromium
from tests.pictures import grey_levels_apart

from .asking import BASE, UPGRADED, over, plain, with_xadapter
from .conftest import PLAIN

ID = "#script_txt2img_xadapter_"
IMG2IMG = "#script_img2img_xadapter_"
PATIENCE = 180_000
"""Milliseconds for a picture on a slow machine."""
ONLY_IN_TXT2IMG = ("base_start", "single_stage", "hires")
LOOK = 90_000
"""Milliseconds for what the page does by itself."""


@pytest.fixture(scope="module")
def browser():
    with chromium("--disable-background-networking", "--disable-component-update") as opened:
        yield opened


@pytest.fixture
def page(browser, webui):
    opened = browser.new_page(viewport={"width": 1400, "height": 1600})
    open_page(opened, webui)
    yield opened
    opened.close()


def open_page(page, server) -> None:
    page.set_default_timeout(LOOK)
    load(page, server.url)


def load(page, address: str) -> None:
    page.goto(address, timeout=PATIENCE)
    page.wait_for_selector("#txt2img_generate", timeout=PATIENCE)
    page.wait_for_function("typeof uiCurrentTab !== 'undefined' && uiCurrentTab !== null", timeout=PATIENCE)


def fill(page, selector: str, value: object) -> None:
    field = page.locator(f"{selector} input[type=number], {selector} textarea").first
    field.fill(str(value))
    field.dispatch_event("change")
    field.blur()


def ask_for(page, tab: str = "txt2img") -> None:
    """The request of the other tests, on the page."""
    fill(page, f"#{tab}_prompt", PLAIN["prompt"])
    for name in ("width", "height", "steps"):
        fill(page, f"#{tab}_{name}", PLAIN[name])
    fill(page, f"#{tab}_seed", PLAIN["seed"])


def enable(page, prefix: str = ID) -> None:
    page.locator(f"{prefix}enabled .label-wrap").first.click()
    page.wait_for_selector(f"{prefix}switch_point", state="visible")


def open_more(page, prefix: str = ID) -> None:
    page.locator(f"{prefix}more .label-wrap").first.click()
    page.wait_for_selector(f"{prefix}base_prompt", state="visible")


def wait_for_line(page, text: str, line: str = f"{ID}forecast") -> None:
    """Until the server has answered, and the page shows it."""
    page.wait_for_function("([id, text]) => document.querySelector(id).textContent.includes(text)", arg=[line, text])


def open_img2img(page) -> None:
    page.locator("#tabs > .tab-nav button", has_text=re.compile(r"^\s*img2img\s*$")).click()
    page.wait_for_selector(f"{IMG2IMG}enabled", state="visible")


def choose(page, dropdown: str, name: str) -> None:
    page.locator(f"{dropdown} input").click()
    page.locator(f"{dropdown} ul.options li", has_text=re.compile(rf"^\W*{re.escape(name)}( \[|\s*$)")).click()


def tick(page, checkbox: str) -> None:
    page.locator(f"{checkbox} input[type=checkbox]").click()


def generate(page) -> str:
    """The infotext under the finished picture, or the error."""
    page.locator("#txt2img_generate").click()
    page.wait_for_selector("#html_log_txt2img .time, #html_log_txt2img .error", timeout=PATIENCE)
    return "".join(page.locator(f"#html_{part}_txt2img").first.inner_text() for part in ("info", "log"))


def value(page, name: str, prefix: str = ID) -> str:
    return page.locator(f"{prefix}{name} input, {prefix}{name} textarea").first.input_value()


def test_open_tick_set_generate_and_read_back(page, tmp_path):
    ask_for(page)
    enable(page)
    wait_for_line(page, "SD1.5 (128×128) samples 6 steps from noise. Then SD1.5 (128×128) and SDXL (256×256)")
    fill(page, f"{ID}switch_point", 0.6)
    fill(page, f"{ID}weight", 1.25)
    open_more(page)
    fill(page, f"{ID}base_prompt", "a dog, (soft:1.2)")
    fill(page, f"{ID}base_steps", 5)
    infotext = generate(page)
    for part in (
        "X-Adapter switch point: 0.6",
        "X-Adapter weight: 1.25",
        "X-Adapter base steps: 5",
        "a dog, (soft:1.2)",
    ):
        assert part in infotext
    for name, other in (("switch_point", 0.1), ("weight", 0), ("base_steps", 0), ("base_prompt", "")):
        fill(page, f"{ID}{name}", other)
    page.locator(f"{ID}enabled .label-wrap").first.click()
    fill(page, "#txt2img_prompt", re.search(r"a cat.*", infotext, re.DOTALL).group(0).split("Time taken")[0])
    page.locator("#txt2img_tools #paste").click()
    page.wait_for_function(f"document.querySelector('{ID}base_prompt textarea').value !== ''")
    assert page.locator(f"{ID}enabled-checkbox input").is_checked()
    read_back = {name: value(page, name) for name in ("switch_point", "weight", "base_steps", "base_prompt")}
    assert read_back == {
        "switch_point": "0.6",
        "weight": "1.25",
        "base_steps": "5",
        "base_prompt": "a dog, (soft:1.2)",
    }


def test_a_preset_moves_the_two_sliders(page):
    enable(page)
    page.locator(f"{ID}preset input").click()
    page.locator("ul.options li", has_text="LoRA").click()
    page.wait_for_function(f"document.querySelector('{ID}weight input').value == 1.5")
    assert value(page, "switch_point") == "0.95"


def test_what_is_wrong_stands_in_red(page):
    ask_for(page)
    fill(page, "#txt2img_prompt", "a cat <lora:nobody:1>")
    enable(page)
    assert "There is no LoRA named 'nobody'" in generate(page)
    assert page.locator("#html_log_txt2img .error").is_visible()


def test_tooltips_say_what_the_switch_point_does(page):
    enable(page)
    titled = page.locator(f"{ID}switch_point [title], {ID}switch_point[title]").first
    assert "denoising strength" in titled.get_attribute("title")


def open_tab(page, name: str, tab: str = "txt2img") -> None:
    page.locator(f"#{tab}_extra_tabs > .tab-nav button", has_text=re.compile(f"^\\s*{name}\\s*$")).click()


def lora_card(page, name: str, tab: str = "txt2img"):
    return page.locator(f"#{tab}_lora_cards .card[data-name='{name}']")


def mark(page, name: str, tab: str = "txt2img") -> str:
    """What style.css writes onto a card."""
    return lora_card(page, name, tab).evaluate("card => getComputedStyle(card, '::before').content")


def test_loras_of_the_base_have_cards_while_it_is_ticked(page):
    open_tab(page, "Lora")
    lora_card(page, "stylexl").wait_for(state="visible")
    assert lora_card(page, "style15").is_hidden()
    open_tab(page, "Generation")
    enable(page)
    open_tab(page, "Lora")
    lora_card(page, "style15").wait_for(state="visible")
    assert [mark(page, name) for name in ("style15", "stylexl")] == ['"SD1.5"', '"SDXL"']
    # what a click writes depends on settings that the page asks the server for
    page.wait_for_function("() => opts.extra_networks_default_multiplier !== undefined")
    lora_card(page, "style15").click()
    assert "<lora:style15:1>" in page.locator("#txt2img_prompt textarea").input_value()


def test_each_tab_shows_them_by_its_own_tick(page):
    enable(page)
    open_img2img(page)
    open_tab(page, "Lora", "img2img")
    lora_card(page, "stylexl", "img2img").wait_for(state="visible")
    assert lora_card(page, "style15", "img2img").is_hidden()
    assert mark(page, "stylexl", "img2img") == "none"
    open_tab(page, "Generation", "img2img")
    enable(page, IMG2IMG)
    open_tab(page, "Lora", "img2img")
    lora_card(page, "style15", "img2img").wait_for(state="visible")
    assert mark(page, "style15", "img2img") == '"SD1.5"'


def test_the_page_says_where_each_plugin_will_go_and_where_it_went(page):
    ask_for(page)
    enable(page)
    fill(page, "#txt2img_prompt", "a base15 cat <lora:style15:1> <lora:stylexl:0.5> <lora:<b>bold</b>:1>")
    split = "LoRA style15 to SD1.5; LoRA stylexl to SDXL"
    wait_for_line(page, split, f"{ID}plugins")
    assert "LoRA <b to neither model" in page.locator(f"{ID}plugins").inner_text()
    assert page.locator(f"{ID}plugins b").count() == 0
    fill(page, "#txt2img_prompt", "a base15 cat <lora:style15:1> <lora:stylexl:0.5>")
    log = generate(page)
    assert f"X-Adapter plugins: {split}; textual inversion base15 to SD1.5" in log
    assert f"X-Adapter: {split}; textual inversion base15 to SD1.5." in log


def test_plugins_of_styles_and_of_the_hires_prompt_are_among_them(browser, start_webui):
    with start_webui("hires-prompt", options={"hires_fix_show_prompts": True}) as server:
        page = browser.new_page(viewport={"width": 1400, "height": 1600})
        open_page(page, server)
        enable(page)
        choose(page, "#txt2img_styles", "boat")
        wait_for_line(page, "Plugins: textual inversion base15 to SD1.5.", f"{ID}plugins")
        page.locator("#txt2img_hr .label-wrap").first.click()
        page.wait_for_selector("#hires_prompt", state="visible")
        fill(page, "#hires_prompt", "a cat <lora:style15:1>")
        wait_for_line(page, "LoRA style15 to SD1.5", f"{ID}plugins")
        page.close()


def test_the_line_needs_the_pages_login_and_no_api_password(browser, start_webui):
    flags = ["--gradio-auth", "me:mine"]
    with start_webui("page-login", credentials="user:secret", flags=flags) as server, browser.new_context() as context:
        login = context.request.post(server.url + "/login", form={"username": "me", "password": "mine"})
        assert login.ok
        page = context.new_page()
        open_page(page, server)
        enable(page)
        fill(page, "#txt2img_prompt", "a cat <lora:style15:1>")
        wait_for_line(page, "Plugins: LoRA style15 to SD1.5.", f"{ID}plugins")


class TestTheLine:
    """What it says is the server's matter (test_forecast.py); here, that it follows the page."""

    def test_it_follows_every_control_of_txt2img(self, page):
        ask_for(page)
        enable(page)
        wait_for_line(page, "sample the last 5 of 6 steps together over that picture (switch point 0.8).")
        fill(page, f"{ID}switch_point", 0.5)
        wait_for_line(page, "the last 4 of 6 steps together over that picture (switch point 0.5).")
        open_more(page)
        fill(page, f"{ID}base_width", 192)
        wait_for_line(page, "SD1.5 (192×128)")
        page.locator(f"{ID}memory label", has_text="recorded").click()
        wait_for_line(page, "Memory: recorded.")
        choose(page, f"{ID}adapter", "None")
        wait_for_line(page, "Then SDXL (256×256) samples")
        tick(page, f"{ID}single_stage")
        wait_for_line(page, "SDXL (256×256) samples 6 steps from noise.")
        fill(page, f"{ID}guidance_start", 0.6)
        fill(page, f"{ID}guidance_end", 0.5)
        wait_for_line(page, "'guidance_start' is 0.6, after 'guidance_end' at 0.5.")
        assert "xadapter-problem" in page.locator(f"{ID}forecast").get_attribute("class")

    def test_it_follows_hires_fix(self, page):
        ask_for(page)
        enable(page)
        page.locator("#txt2img_hr .label-wrap").first.click()
        page.wait_for_selector("#txt2img_hr_scale", state="visible")
        fill(page, "#txt2img_hr_scale", 1.5)
        fill(page, "#txt2img_hires_steps", 4)
        wait_for_line(page, "Hires. fix: SD1.5 (192×192) and SDXL (384×384) sample 4 steps together")
        open_more(page)
        tick(page, f"{ID}hires")
        wait_for_line(page, "Hires. fix: SDXL (384×384) samples 4 steps")

    def test_it_follows_img2img(self, page):
        open_img2img(page)
        ask_for(page, "img2img")
        enable(page, IMG2IMG)
        line = f"{IMG2IMG}forecast"
        wait_for_line(page, "SD1.5 (128×128) and SDXL (256×256) sample the last 5 of 6 steps together", line)
        fill(page, "#img2img_denoising_strength", 0.5)
        wait_for_line(page, "the last 4 of 6 steps together over the given picture (denoising strength 0.5).", line)
        page.locator(f"{IMG2IMG}img2img_start label", has_text="base").click()
        wait_for_line(page, "SD1.5 (128×128) samples the last 4 of 6 steps over the given picture", line)
        give_picture(page, 400, 320)
        page.locator("#img2img_tabs_resize > .tab-nav button", has_text="Resize by").click()
        fill(page, "#img2img_scale", 2)
        wait_for_line(page, "SD1.5 (400×320) and SDXL (800×640)", line)

    def test_where_the_server_has_no_answer_nothing_is_said_and_it_is_asked_again(self, page):
        ask_for(page)
        fill(page, "#txt2img_prompt", "a cat <lora:style15:1>")
        enable(page)
        wait_for_line(page, "LoRA style15 to SD1.5", f"{ID}plugins")
        for answer in (lambda route: route.fulfill(status=500), lambda route: route.abort()):
            page.route("**/xadapter/v1/plan", answer)
            fill(page, f"{ID}switch_point", 0.5)
            for line in ("forecast", "plugins"):
                page.wait_for_function(f"document.querySelector('{ID}{line}').textContent === ''")
            page.unroute("**/xadapter/v1/plan")
            # what the page asks for is the same as before
            page.locator(f"{ID}more .label-wrap").first.click()
            wait_for_line(page, "(switch point 0.5)")
            fill(page, f"{ID}switch_point", 0.8)
            wait_for_line(page, "(switch point 0.8)")

    def test_it_says_when_the_accordion_is_open_and_not_ticked(self, page):
        enable(page)
        page.locator(f"{ID}enabled-visible-checkbox").click()
        wait_for_line(page, "not ticked")
        assert page.locator(f"{ID}forecast").is_visible()


def give_picture(page, width: int, height: int) -> None:
    upload(page, "#img2img_image", Image.new("RGB", (width, height), "teal"))
    page.wait_for_function(f"document.querySelector('#img2img_image img')?.naturalWidth === {width}")


class TestBothTabs:
    def test_each_shows_the_controls_that_are_of_use_in_it(self, page):
        enable(page)
        open_more(page)
        assert page.locator(f"{ID}img2img_start").is_hidden()
        assert all(page.locator(f"{ID}{name}").is_visible() for name in ONLY_IN_TXT2IMG)
        open_img2img(page)
        enable(page, IMG2IMG)
        open_more(page, IMG2IMG)
        assert page.locator(f"{IMG2IMG}img2img_start").is_visible()
        assert all(page.locator(f"{IMG2IMG}{name}").is_hidden() for name in ONLY_IN_TXT2IMG)

    def test_send_to_img2img_carries_it_along(self, page):
        ask_for(page)
        enable(page)
        open_more(page)
        fill(page, f"{ID}switch_point", 0.6)
        fill(page, f"{ID}base_prompt", "a dog, (soft:1.2)")
        fill(page, f"{ID}weight_1", 0.5)
        generate(page)
        page.locator("#txt2img_send_to_img2img").click()
        page.wait_for_selector(f"{IMG2IMG}switch_point", state="visible")
        assert page.locator(f"{IMG2IMG}enabled-checkbox input").is_checked()
        page.wait_for_function(f"document.querySelector('{IMG2IMG}base_prompt textarea').value !== ''")
        carried = {name: value(page, name, IMG2IMG) for name in ("switch_point", "base_prompt", "weight", "weight_1")}
        assert carried == {"switch_point": "0.6", "base_prompt": "a dog, (soft:1.2)", "weight": "1", "weight_1": "0.5"}

    def test_an_infotext_pastes_into_img2img(self, page, webui):
        given = {"switch_point": 0.6, "weight": 0.5, "base_prompt": "a dog"}
        infotext = with_xadapter(webui, given, steps=1).infotexts[0]
        open_img2img(page)
        fill(page, "#img2img_prompt", infotext)
        page.locator("#img2img_tools #paste").click()
        page.wait_for_selector(f"{IMG2IMG}switch_point", state="visible")
        page.wait_for_function(f"document.querySelector('{IMG2IMG}base_prompt textarea').value !== ''")
        assert {name: value(page, name, IMG2IMG) for name in given} == {
            "switch_point": "0.6",
            "weight": "0.5",
            "base_prompt": "a dog",
        }
        assert value(page, "base_checkpoint", IMG2IMG) == "tiny15.safetensors"


def painted(page) -> Image.Image:
    """What the img2img tab makes."""
    shown = page.locator("#img2img_gallery img")
    before = shown.first.get_attribute("src") if shown.count() else ""
    page.locator("#img2img_generate").click()
    page.wait_for_function(
        "before => (document.querySelector('#img2img_gallery img')?.src ?? before) !== before"
        " || document.querySelector('#html_log_img2img .error') !== null",
        arg=before,
        timeout=PATIENCE,
    )
    assert page.locator("#html_log_img2img .error").count() == 0
    address = page.locator("#img2img_gallery img").first.get_attribute("src")
    return Image.open(io.BytesIO(page.request.get(address).body())).convert("RGB")


def open_mode(page, name: str) -> None:
    page.locator("#mode_img2img > .tab-nav button", has_text=re.compile(rf"^\s*{name}\s*$")).click()


def draw(page, place: str) -> None:
    """A stroke across the picture, which the editor follows from frame to frame."""
    page.locator(place).get_by_text("Start drawing").wait_for(state="visible")
    box = page.locator(f"{place} canvas").last.bounding_box()

    def move(across: float) -> None:
        page.mouse.move(box["x"] + box["width"] * across, box["y"] + box["height"] * across)
        page.evaluate("() => new Promise(requestAnimationFrame)")

    move(0.3)
    page.mouse.down()
    for percent in range(30, 71, 2):
        move(percent / 100)
    page.mouse.up()


def upload(page, place: str, picture: Image.Image) -> None:
    png = io.BytesIO()
    picture.save(png, format="PNG")
    page.locator(f"{place} input[type=file]").set_input_files(
        {"name": "given.png", "mimeType": "image/png", "buffer": png.getvalue()}
    )
    page.wait_for_selector(f"{place} img, {place} canvas", state="attached")


def draw_on(mode: str, place: str):
    """Gives a picture in one of the tab's modes, and draws on it."""

    def prepare(page, picture: Image.Image) -> None:
        open_mode(page, mode)
        upload(page, place, picture)
        draw(page, place)

    return prepare


def inpaint_upload(page, picture: Image.Image) -> None:
    open_mode(page, "Inpaint upload")
    upload(page, "#img_inpaint_base", picture)
    mask = Image.new("RGB", picture.size)
    mask.paste("white", (80, 80, 200, 200))
    upload(page, "#img_inpaint_mask", mask)


WAYS = {
    "sketch": draw_on("Sketch", "#img2img_sketch"),
    "inpaint": draw_on("Inpaint", "#img2maskimg"),
    "inpaint_sketch": draw_on("Inpaint sketch", "#inpaint_sketch"),
    "inpaint_upload": inpaint_upload,
}
USUAL_ON_THE_PAGE = {"sampler_name": "DPM++ 2M", "denoising_strength": 0.75}
INPAINTING_ON_THE_PAGE = {"mask_blur": 4, "inpainting_fill": 1, "inpaint_full_res": False}
"""What the img2img tab begins with, where the REST API begins with something else."""
FOLDERS = {"input": "in", "output": "output", "inpaint_mask": "masks"}


def write_pictures(folder: Path, pictures: Mapping[str, Image.Image]) -> None:
    folder.mkdir()
    for name, picture in pictures.items():
        picture.save(folder / f"{name}.png")


def open_batch(page, beside: Path, *folders: str) -> None:
    """The Batch sub-tab with its folders filled in."""
    (beside / FOLDERS["output"]).mkdir()
    open_img2img(page)
    ask_for(page, "img2img")
    open_mode(page, "Batch")
    page.locator("#img2img_batch_source > .tab-nav button", has_text="From directory").click()
    for folder in folders:
        fill(page, f"#img2img_batch_{folder}_dir", beside / FOLDERS[folder])


def from_folder(folder: Path, name: str) -> Image.Image:
    """A picture that X-Adapter made, as the Batch sub-tab names it."""
    [file] = folder.glob(f"*-{name}.png")
    with Image.open(file) as saved:
        assert "X-Adapter version" in saved.info["parameters"]
        return saved.convert("RGB")


@pytest.fixture(scope="module")
def given(webui) -> Image.Image:
    """A picture to paint over."""
    return plain(webui, seed=70)


class TestWaysToGiveAPicture:
    @pytest.mark.parametrize("prepare", WAYS.values(), ids=WAYS)
    def test_at_weight_0_each_gives_the_webuis_own_picture_and_the_adapter_changes_it(self, page, given, prepare):
        open_img2img(page)
        prepare(page, given)
        ask_for(page, "img2img")
        alone = painted(page)
        enable(page, IMG2IMG)
        fill(page, f"{IMG2IMG}weight", 0)
        at_weight_0 = painted(page)
        fill(page, f"{IMG2IMG}weight", 1)
        guided = painted(page)
        assert grey_levels_apart(alone, given) > 1
        assert grey_levels_apart(at_weight_0, alone) <= 1
        assert grey_levels_apart(guided, alone) > 1

    @pytest.mark.parametrize("start", ["picture", "base"])
    def test_each_picture_of_a_folder_is_painted_over(self, page, webui, given, start, tmp_path):
        pictures = {"one": given, "two": plain(webui, seed=71)}
        write_pictures(tmp_path / "in", pictures)
        open_batch(page, tmp_path, "input", "output")
        enable(page, IMG2IMG)
        page.locator(f"{IMG2IMG}img2img_start label", has_text=start).click()
        painted(page)
        for name, picture in pictures.items():
            alone = over(webui, picture, {"img2img_start": start}, **USUAL_ON_THE_PAGE).image
            assert grey_levels_apart(from_folder(tmp_path / "output", name), alone) <= 1
        assert webui.state()["hooks"] == []

    def test_each_picture_of_a_folder_has_its_own_mask(self, page, webui, given, tmp_path):
        masks = {name: Image.new("RGB", given.size) for name in ("one", "two")}
        masks["one"].paste("white", (80, 80, 200, 200))
        masks["two"].paste("white", (0, 128, 256, 256))
        write_pictures(tmp_path / "in", dict.fromkeys(masks, given))
        write_pictures(tmp_path / "masks", masks)
        open_batch(page, tmp_path, "input", "output", "inpaint_mask")
        enable(page, IMG2IMG)
        painted(page)
        for name, mask in masks.items():
            alone = over(webui, given, {}, mask=mask, **USUAL_ON_THE_PAGE, **INPAINTING_ON_THE_PAGE).image
            assert grey_levels_apart(from_folder(tmp_path / "output", name), alone) <= 1


def test_each_tab_has_its_own_saved_defaults(browser, start_webui, tmp_path):
    saved = {"txt2img": 0.3, "img2img": 0.9}
    config = {f"customscript/xadapter.py/{tab}/Switch point/value": value for tab, value in saved.items()}
    (tmp_path / "ui-config.json").write_text(json.dumps(config))
    with start_webui("defaults", flags=["--ui-config-file", str(tmp_path / "ui-config.json")]) as server:
        page = browser.new_page()
        open_page(page, server)
        assert {tab: float(value(page, "switch_point", f"#script_{tab}_xadapter_")) for tab in saved} == saved


def test_labels_and_tooltips_name_the_bases_family(page):
    family = "SD2"

    def answer(route) -> None:
        route.fulfill(json={"line": f"{family} samples.", "base": family, "summary": ""})

    page.route("**/xadapter/v1/plan", answer)
    enable(page)
    wait_for_line(page, "SD2 samples.")
    open_more(page)
    accordion = page.locator(f"{ID}enabled")
    for label in ("SD2 checkpoint", "SD2 prompt", "SD2 width", "SD2 starts from", "Show the SD2 picture"):
        assert label in accordion.inner_text()
    assert "SD1.5" not in accordion.inner_text()
    told = accordion.locator("[title], [placeholder]").evaluate_all(
        "all => all.map(one => one.title + one.placeholder)"
    )
    assert any("SD2" in text for text in told)
    assert not any("SD1.5" in text for text in told)
    family = "SD1.5"
    fill(page, f"{ID}switch_point", 0.5)
    wait_for_line(page, "SD1.5 samples.")
    assert "SD1.5 prompt" in accordion.inner_text()
    assert "SD2" not in accordion.inner_text()


def test_stage_ones_picture_shows_its_own_text(page):
    ask_for(page)
    enable(page)
    open_more(page)
    tick(page, f"{ID}return_base_image")
    assert "X-Adapter version" in generate(page)
    page.locator("#txt2img_gallery .thumbnail-item").nth(1).click()
    page.wait_for_function("document.querySelector('#html_info_txt2img').textContent.includes('Model: tiny15')")
    assert "X-Adapter" not in page.locator("#html_info_txt2img").first.inner_text()


REACHED = """() => {
    const reached = document.activeElement.closest("[id^='script_']");
    return [document.activeElement.tagName, reached === null ? "" : reached.id];
}"""


@pytest.mark.parametrize("prefix", [ID, IMG2IMG], ids=["txt2img", "img2img"])
def test_every_control_is_reached_by_keyboard(page, prefix):
    if prefix == IMG2IMG:
        open_img2img(page)
    page.locator(f"{prefix}enabled .label-wrap").first.focus()
    page.keyboard.press("Enter")
    page.wait_for_selector(f"{prefix}switch_point", state="visible")
    assert page.locator(f"{prefix}enabled-checkbox input").is_checked()
    page.locator(f"{prefix}more .label-wrap").first.focus()
    page.keyboard.press("Space")
    page.wait_for_selector(f"{prefix}base_prompt", state="visible")
    page.locator(f"{prefix}enabled .label-wrap").first.focus()
    reached = set()
    for _ in range(80):
        page.keyboard.press("Tab")
        reached.add(page.evaluate(REACHED)[1])
    hidden = ONLY_IN_TXT2IMG if prefix == IMG2IMG else ("img2img_start",)
    levels = {f"weight_{level}" for level in range(3)}
    names = {"preset", *levels, *arguments_of_the_table()} - {"enabled", *hidden}
    missed = {name for name in names if f"{prefix[1:]}{name}" not in reached}
    assert not missed


CONTRAST = """line => {
    const channels = colour => colour.match(/[\\d.]+/g).map(Number);
    const linear = part => part <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
    const luminance = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
    let behind = line;
    while (behind.parentElement && (channels(getComputedStyle(behind).backgroundColor)[3] ?? 1) === 0) {
        behind = behind.parentElement;
    }
    const pair = [getComputedStyle(line).color, getComputedStyle(behind).backgroundColor].map(channels).map(luminance);
    return (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
}"""


@pytest.mark.parametrize("theme", ["dark", "light"])
def test_the_lines_can_be_read_in_both_themes(page, webui, theme):
    """4.5 to 1 is what WCAG asks of text."""
    load(page, f"{webui.url}/?__theme={theme}")
    enable(page)
    wait_for_line(page, "samples")
    assert page.locator(f"{ID}forecast").evaluate(CONTRAST) >= 4.5
    open_more(page)
    fill(page, f"{ID}guidance_start", 1)
    fill(page, f"{ID}guidance_end", 0.5)
    wait_for_line(page, "'guidance_start' is 1")
    assert page.locator(f"{ID}forecast").evaluate(CONTRAST) >= 4.5


class TestUpscaleButton:
    """✨ makes the second pass of Hires. fix of a finished picture, as the picture's own infotext says."""

    def upscaled(self, page, webui) -> list[str]:
        """Models of the second pass' evaluations, once the larger picture is there."""
        with webui.recorded() as calls:
            page.locator("#txt2img_upscale").click()
            page.wait_for_function(
                "() => document.querySelector('#html_info_txt2img')?.innerText.includes('Hires upscale')",
                timeout=PATIENCE,
            )
        return [call["model"] for call in calls]

    def test_a_picture_of_x_adapter_is_enlarged_with_it_whatever_is_ticked_by_then(self, page, webui):
        ask_for(page)
        enable(page)
        assert "X-Adapter version" in generate(page)
        page.locator(f"{ID}enabled-visible-checkbox").click()
        assert BASE in self.upscaled(page, webui)

    def test_the_second_picture_of_a_batch_keeps_its_own_base_seed(self, page, webui):
        ask_for(page)
        fill(page, "#txt2img_batch_size", 2)
        enable(page)
        open_more(page)
        fill(page, f"{ID}base_seed", 40)
        generate(page)
        # behind the grid and the first
        page.locator("#txt2img_gallery .thumbnail-item").nth(2).click()
        page.wait_for_function("document.querySelector('#html_info_txt2img').textContent.includes('Seed: 8,')")
        assert BASE in self.upscaled(page, webui)
        assert "X-Adapter base seed: 41" in page.locator("#html_info_txt2img").first.inner_text()

    def test_a_picture_without_it_is_enlarged_without_it(self, page, webui):
        ask_for(page)
        assert "X-Adapter version" not in generate(page)
        enable(page)
        assert set(self.upscaled(page, webui)) == {UPGRADED}
