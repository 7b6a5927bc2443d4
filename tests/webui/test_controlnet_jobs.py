"""ControlNet units over several jobs, under the WebUI's other ways to run, and with other scripts."""

from __future__ import annotations

import pytest

from tests.pictures import grey_levels_apart

from .asking import made
from .conftest import same_bytes
from .server import WebUIServer
from .small_controls import write_controls
from .units import LINES, LINES_XL, REFERENCE, SMALL, T2I, ask, extension, final, of_sdxl

STEPS = {"steps": 3}


@pytest.fixture(scope="module")
def webui(controlnet_webui: WebUIServer) -> WebUIServer:
    return controlnet_webui


class TestOneProcessingObject:
    """Scripts make several pictures with one; each of them has the units."""

    @pytest.mark.parametrize(
        "units",
        [[], [LINES], [LINES_XL], [LINES, LINES_XL], [REFERENCE, LINES_XL]],
        ids=["none", "the base's", "SDXL's", "both", "reference and SDXL's"],
    )
    def test_twice(self, webui, units):
        once = final(webui, units, SMALL, **STEPS)
        again = final(webui, units, SMALL, **STEPS, script_name="Twice")
        assert same_bytes(again, once)

    def test_the_second_picture_has_the_same_text(self, webui):
        once = made(ask(webui, [LINES, LINES_XL], SMALL, **STEPS))
        again = made(ask(webui, [LINES, LINES_XL], SMALL, **STEPS, script_name="Twice"))
        assert again.infotexts[0] == once.infotexts[0]

    def test_twice_without_xadapter(self, webui):
        """The WebUI and the extension alone do not fail in this, or the tests above would tell nothing."""
        once = final(webui, [LINES_XL], None, **STEPS)
        assert same_bytes(final(webui, [LINES_XL], None, **STEPS, script_name="Twice"), once)


class TestXYZPlot:
    """It copies the processing object for every cell."""

    def plot(self, server: WebUIServer, axis: str, values: str, units: list[dict]):
        axes = [axis.lower() for axis in self.axes(server)]
        nothing = axes.index("nothing")
        arguments = [axes.index(axis.lower()), values, values.split(", "), nothing, "", [], nothing, "", []]
        arguments += [False, True, False, False, False, False, False, 0, False]
        answer = ask(server, units, SMALL, **STEPS, script_name="X/Y/Z plot", script_args=arguments)
        return of_sdxl(made(answer))[-2:]

    def axes(self, server: WebUIServer) -> list[str]:
        scripts = server.get("/sdapi/v1/script-info").content
        (plot,) = (script for script in scripts if script["name"] == "x/y/z plot" and not script["is_img2img"])
        return plot["args"][0]["choices"]

    @pytest.mark.parametrize("units", [[LINES], [LINES, LINES_XL]], ids=["the base's", "both"])
    def test_every_cell_has_the_units(self, webui, units):
        for picture, seed in zip(self.plot(webui, "Seed", "7, 8", units), (7, 8), strict=True):
            assert grey_levels_apart(picture, final(webui, units, SMALL, seed=seed, **STEPS)) <= 1

    def test_an_axis_of_the_extension_reaches_the_bases_units(self, webui):
        cells = self.plot(webui, "[ControlNet] Weight", "0.5, 2", [LINES])
        webui.post("/sdapi/v1/options", {"control_net_allow_script_control": False})
        for picture, weight in zip(cells, (0.5, 2), strict=True):
            assert grey_levels_apart(picture, final(webui, [{**LINES, "weight": weight}], SMALL, **STEPS)) <= 1

    @pytest.mark.parametrize("units", [[LINES], [LINES, LINES_XL]], ids=["the base's", "both"])
    def test_the_axis_that_switches_units_switches_the_bases(self, webui, units):
        """It is about the first unit, which SDXL never gets."""
        on, off = self.plot(webui, "[ControlNet] Enabled", "True, False", units)
        webui.post("/sdapi/v1/options", {"control_net_allow_script_control": False})
        assert grey_levels_apart(on, final(webui, units, SMALL, **STEPS)) <= 1
        assert grey_levels_apart(off, final(webui, units[1:], SMALL, **STEPS)) <= 1


def test_little_video_memory_changes_nothing(webui, models, start_webui, tmp_path_factory):
    pictures = [final(webui, units, SMALL, **STEPS) for units in ([T2I], [REFERENCE, LINES_XL])]
    more = tmp_path_factory.mktemp("controls")
    write_controls(models, more)
    with start_webui("medvram", models=[models, more], more_extensions=[extension()], flags=["--medvram"]) as server:
        for units, picture in zip(([T2I], [REFERENCE, LINES_XL]), pictures, strict=True):
            assert same_bytes(final(server, units, {**SMALL, "memory": "lockstep"}, **STEPS), picture)
            assert grey_levels_apart(final(server, units, SMALL, **STEPS), picture) <= 1
        assert server.state()["medvram_hooks"]
