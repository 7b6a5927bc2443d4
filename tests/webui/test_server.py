"""The harness itself is right: the server makes the pictures it should, and the probe sees and breaks what it says."""

import socket

import pytest

from tests.pictures import grey_levels_apart

from .conftest import PLAIN, same_bytes
from .server import BASE_CHECKPOINT, EXTENSION_NAME, UPGRADED_CHECKPOINT, WebUIError, WebUIServer

USE_BASE = {"override_settings": {"sd_model_checkpoint": BASE_CHECKPOINT}}


@pytest.fixture(scope="module")
def server(plain_webui) -> WebUIServer:
    """Without X-Adapter, so that nothing but the harness is tried."""
    return plain_webui


def test_it_makes_an_sdxl_picture(server):
    answer = server.txt2img(**PLAIN)
    assert answer.status == 200, answer.error
    assert answer.image.size == (PLAIN["width"], PLAIN["height"])
    assert "Model: tinyxl" in answer.infotexts[0]
    assert answer.info["seed"] == 7
    assert all(darkest < brightest for darkest, brightest in answer.image.getextrema())


def test_the_same_seed_gives_the_same_picture_and_another_seed_another(server):
    first, again = server.txt2img(**PLAIN).image, server.txt2img(**PLAIN).image
    other = server.txt2img(**PLAIN | {"seed": 8}).image
    assert same_bytes(first, again)
    assert grey_levels_apart(first, other) > 1


def test_img2img_starts_from_the_given_picture(server):
    start = server.txt2img(**PLAIN).image
    near = server.img2img(start, **PLAIN, denoising_strength=0.1)
    far = server.img2img(start, **PLAIN, denoising_strength=0.9)
    assert (near.status, far.status) == (200, 200)
    assert not same_bytes(near.image, far.image)


def test_the_base_checkpoint_can_be_selected_for_one_picture(server):
    upgraded = server.txt2img(**PLAIN).image
    base = server.txt2img(**PLAIN, **USE_BASE)
    assert base.status == 200, base.error
    assert "Model: tiny15" in base.infotexts[0]
    assert not same_bytes(base.image, upgraded)
    assert grey_levels_apart(server.txt2img(**PLAIN).image, upgraded) <= 1


def test_the_extension_is_listed_only_where_it_is_installed(webui, plain_webui):
    with_it, without_it = (set(server.state()["extensions"]) for server in (webui, plain_webui))
    assert with_it - without_it == {EXTENSION_NAME}
    assert without_it <= with_it


def test_it_serves_its_page(server):
    assert server.get("/").status == 200
    assert server.get("/no-such-page").status == 404


def test_a_refused_request_gives_its_status_and_reason(server):
    answer = server.txt2img(**PLAIN, alwayson_scripts={"no such script": {"args": []}})
    assert (answer.status, answer.images) == (422, ())
    assert "'no such script' not found" in answer.error


def test_an_idle_server_has_sdxl_loaded_and_no_hooks(server):
    state = server.state()
    assert state["checkpoint"] == UPGRADED_CHECKPOINT
    assert state["model"] == "DiffusionEngine"
    assert (state["hooks"], state["medvram_hooks"]) == ([], [])
    assert state["loaded_networks"] == []
    assert state["embeddings"] == ["upgradedxl"]
    assert state["skipped_embeddings"] == ["base15"]
    assert state["hijack_has_current_text_encoder"]
    assert state["hijack_has_current_layers"]


def test_the_probe_records_every_unet_call(server):
    with server.recorded() as calls:
        server.txt2img(**PLAIN | {"height": 384})
    assert len(calls) == PLAIN["steps"]
    assert {(call["model"], call["rows"], call["height"], call["width"]) for call in calls} == {
        ("DiffusionEngine", 2, 48, 32)
    }
    timesteps = [call["timestep"] for call in calls]
    assert timesteps == sorted(timesteps, reverse=True)
    assert timesteps[0] == 999


def test_the_probe_changes_no_picture(server):
    before = server.txt2img(**PLAIN).image
    with server.recorded():
        during = server.txt2img(**PLAIN).image
    after = server.txt2img(**PLAIN).image
    assert same_bytes(before, during)
    assert same_bytes(before, after)


@pytest.mark.parametrize(
    ("where", "after", "error", "message"),
    [
        ("upgraded_unet", 3, "RuntimeError", "armed by the probe"),
        ("upgraded_unet", 0, "OutOfMemoryError", "CUDA out of memory"),
        ("sampler", 0, "RuntimeError", "armed by the probe"),
        ("vae_decode", 0, "RuntimeError", "armed by the probe"),
    ],
)
def test_a_fault_ends_the_job_once(server, where, after, error, message):
    before = server.txt2img(**PLAIN).image
    with server.fault(where, after, error):
        failed = server.txt2img(**PLAIN)
    assert failed.status == 500
    assert message in failed.error
    assert same_bytes(before, server.txt2img(**PLAIN).image)


def test_a_fault_while_a_picture_is_encoded_ends_the_job(server):
    start = server.txt2img(**PLAIN).image
    with server.fault("vae_encode"):
        assert server.img2img(start, **PLAIN).status == 500
    assert server.img2img(start, **PLAIN).status == 200


def test_a_fault_in_the_base_spares_sdxl(server):
    with server.fault("base_unet", after=2):
        assert server.txt2img(**PLAIN | {"steps": 1}).status == 200
        assert server.txt2img(**PLAIN, **USE_BASE).status == 500


@pytest.mark.parametrize("how", ["interrupt", "skip"])
def test_a_job_that_is_cut_short_makes_fewer_unet_calls(server, how):
    with server.recorded() as calls, server.fault("upgraded_unet", after=3, error=how):
        assert server.txt2img(**PLAIN).status == 200
    assert len(calls) == 4


def test_a_fault_that_never_fires_is_reported(server):
    with pytest.raises(AssertionError, match="never fired"), server.fault("base_unet"):
        server.txt2img(**PLAIN)


def test_other_extensions_and_flags_can_be_added(start_webui, tmp_path):
    another = tmp_path / "another-extension"
    another.mkdir()
    with start_webui("more", extension=False, more_extensions=[another], flags=["--medvram"]) as server:
        assert "another-extension" in server.state()["extensions"]
        assert server.get("/sdapi/v1/cmd-flags").content["medvram"]
        assert server.txt2img(**PLAIN).status == 200
        assert server.state()["hooks"] == []
        assert server.state()["medvram_hooks"] != []


def test_a_server_with_credentials_asks_for_them(start_webui):
    with start_webui("with-credentials", extension=False, credentials="user:secret") as server:
        assert server.get("/sdapi/v1/samplers").status == 200
        server.credentials = "user:wrong"
        assert server.get("/sdapi/v1/samplers").status == 401
        server.credentials = None
        assert server.get("/sdapi/v1/samplers").status == 401


def test_a_server_that_cannot_start_says_what_it_wrote(start_webui):
    server = start_webui("wrong-flag", flags=["--no-such-flag"])
    with pytest.raises(WebUIError, match="no-such-flag"):
        server.start()
    assert server.process is None


def test_a_closed_server_is_gone(start_webui):
    with start_webui("closed", extension=False) as server:
        process = server.process
    assert process.poll() is not None
    with socket.socket() as client:
        assert client.connect_ex(("127.0.0.1", server.port)) != 0


def test_a_server_ends_when_the_tests_end(start_webui):
    with start_webui("orphan", extension=False) as server:
        server.process.stdin.close()
        assert server.process.wait(timeout=60) == 0
