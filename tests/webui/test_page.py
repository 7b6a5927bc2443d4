"""The accordion in a real browser: open, tick, set, generate, read the infotext back."""

from __future__ import annotations

import os
import re
import shutil

import pytest

from .conftest import PLAIN

playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright of the extra 'test-webui'")

ID = "#script_xadapter_"
PATIENCE = 180_000
"""Milliseconds for a picture on a slow machine."""
LOOK = 30_000
"""Milliseconds for what the page does by itself."""


@pytest.fixture(scope="module")
def browser():
    executable = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if executable is None:
        pytest.skip("needs Chromium: install it, or set CHROMIUM to its program")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with playwright.sync_playwright() as running:
        opened = running.chromium.launch(executable_path=executable, args=flags)
        yield opened
        opened.close()


@pytest.fixture
def page(browser, webui):
    opened = browser.new_page(viewport={"width": 1400, "height": 1600})
    open_page(opened, webui)
    yield opened
    opened.close()


def open_page(page, server) -> None:
    page.set_default_timeout(LOOK)
    page.goto(server.url, timeout=PATIENCE)
    page.wait_for_selector("#txt2img_generate")
    page.wait_for_function("typeof uiCurrentTab !== 'undefined' && uiCurrentTab !== null")


def fill(page, selector: str, value: object) -> None:
    field = page.locator(f"{selector} input[type=number], {selector} textarea").first
    field.fill(str(value))
    field.dispatch_event("change")
    field.blur()


def ask_for(page) -> None:
    """The request of the other tests, on the page."""
    fill(page, "#txt2img_prompt", PLAIN["prompt"])
    for name in ("width", "height", "steps"):
        fill(page, f"#txt2img_{name}", PLAIN[name])
    fill(page, "#txt2img_seed", PLAIN["seed"])


def enable(page) -> None:
    page.locator(f"{ID}enabled .label-wrap").first.click()
    page.wait_for_selector(f"{ID}switch_point", state="visible")


def generate(page) -> str:
    """The infotext under the finished picture, or the error."""
    page.locator("#txt2img_generate").click()
    page.wait_for_selector("#html_log_txt2img .time, #html_log_txt2img .error", timeout=PATIENCE)
    return "".join(page.locator(f"#html_{part}_txt2img").first.inner_text() for part in ("info", "log"))


def value(page, name: str) -> str:
    return page.locator(f"{ID}{name} input, {ID}{name} textarea").first.input_value()


def test_open_tick_set_generate_and_read_back(page, tmp_path):
    ask_for(page)
    enable(page)
    assert "SD1.5 paints 128×128 in 6 steps; then SDXL paints 256×256" in page.locator(f"{ID}explanation").inner_text()
    fill(page, f"{ID}switch_point", 0.6)
    fill(page, f"{ID}weight", 1.25)
    page.locator(f"{ID}more .label-wrap").first.click()
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


def open_tab(page, name: str) -> None:
    page.locator("#txt2img_extra_tabs > .tab-nav button", has_text=re.compile(f"^\\s*{name}\\s*$")).click()


def lora_card(page, name: str):
    return page.locator(f"#txt2img_lora_cards .card[data-name='{name}']")


def mark(page, name: str) -> str:
    """What style.css writes onto a card."""
    return lora_card(page, name).evaluate("card => getComputedStyle(card, '::before').content")


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
    assert page.locator("#img2img_lora_cards .card[data-name='style15']").count() == 0


def test_the_page_says_where_each_plugin_will_go_and_where_it_went(page):
    ask_for(page)
    enable(page)
    fill(page, "#txt2img_prompt", "a base15 cat <lora:style15:1> <lora:stylexl:0.5> <lora:<b>bold</b>:1>")
    split = "LoRA style15 to SD1.5; LoRA stylexl to SDXL"
    page.wait_for_function(f"document.querySelector('{ID}plugins').textContent.includes('{split}')")
    assert "LoRA <b to neither model" in page.locator(f"{ID}plugins").inner_text()
    assert page.locator(f"{ID}plugins b").count() == 0
    fill(page, "#txt2img_prompt", "a base15 cat <lora:style15:1> <lora:stylexl:0.5>")
    log = generate(page)
    assert f"X-Adapter plugins: {split}; textual inversion base15 to SD1.5" in log
    assert f"X-Adapter: {split}; textual inversion base15 to SD1.5." in log


def test_the_line_needs_the_pages_login_and_no_api_password(browser, start_webui):
    flags = ["--gradio-auth", "me:mine"]
    with start_webui("page-login", credentials="user:secret", flags=flags) as server, browser.new_context() as context:
        login = context.request.post(server.url + "/login", form={"username": "me", "password": "mine"})
        assert login.ok
        page = context.new_page()
        open_page(page, server)
        enable(page)
        fill(page, "#txt2img_prompt", "a cat <lora:style15:1>")
        line = "Plugins: LoRA style15 to SD1.5."
        page.wait_for_function(f"document.querySelector('{ID}plugins').textContent === '{line}'")
