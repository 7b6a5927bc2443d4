"""What goes wrong ends the job with its message, and leaves the WebUI as it was."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import struct

import numpy
import pytest
from PIL import Image
from safetensors.numpy import save_file

from tests.pictures import grey_levels_apart

from .asking import BASE, TITLE, UPGRADED, arguments, plain, with_xadapter
from .conftest import PLAIN, same_bytes
from .server import BASE_CHECKPOINT, EXTENSION_NAME, UPGRADED_CHECKPOINT, WebUIServer
from .spoilt_files import SPOILT_FILES, SpoiltFile, copied

BAD_REQUEST, SERVER_ERROR = 422, 500


@pytest.fixture(autouse=True)
def the_webui_is_as_it_was(webui: WebUIServer):
    """After whatever a test does: the next plain picture, SDXL, its embeddings, no hook, and X-Adapter still works."""
    usual = with_xadapter(webui, steps=2).image
    before, state = plain(webui, prompt="an upgradedxl cat"), webui.state()
    yield
    assert same_bytes(plain(webui, prompt="an upgradedxl cat"), before)
    after = webui.state()
    assert after["hooks"] == []
    assert {**after, "live_models": None} == {**state, "live_models": None}
    assert same_bytes(with_xadapter(webui, steps=2).image, usual)


def refused(server: WebUIServer, status: int, given: dict | list, **request) -> str:
    """The message of a request that must not work."""
    args = given if isinstance(given, list) else [given]
    answer = server.txt2img(**{**PLAIN, **request}, alwayson_scripts={TITLE: {"args": args}})
    assert answer.status == status, answer.error
    assert answer.images == ()
    return answer.error


HIRES = {"enable_hr": True, "hr_scale": 1.5, "hr_upscaler": "Latent", "denoising_strength": 0.6}


def refused_everywhere(server: WebUIServer, status: int, given: dict | list, **request) -> str:
    """The message of a request that must not work in txt2img, with Hires. fix or over a picture."""
    message = refused(server, status, given, **request)
    assert refused(server, status, given, **request, **HIRES) == message
    args = given if isinstance(given, list) else [given]
    asked = {**PLAIN, **request, "alwayson_scripts": {TITLE: {"args": args}}}
    over = server.img2img(Image.new("RGB", (PLAIN["width"], PLAIN["height"]), "navy"), **asked)
    assert (over.status, over.error) == (status, message)
    return message


class TestBadRequests:
    """Status 422, and one sentence that names what is wrong."""

    @pytest.mark.parametrize(
        ("given", "sentence"),
        [
            ({"swich_point": 1}, "'swich_point' is no argument of X-Adapter"),
            ({"switch_point": 2}, "'switch_point' is 2, expected a number from 0 to 1"),
            ({"switch_point": "0.5"}, "'switch_point' is '0.5', expected a number"),
            ({"enabled": "yes"}, "'enabled' is 'yes', expected true or false"),
            ({"weight": [1, 2]}, "'weight' is [1, 2]"),
            ({"base_width": 100}, "'base_width' is 100, expected 0 or a multiple of 8"),
            ({"base_checkpoint": "nobody"}, "'base_checkpoint' is 'nobody', which is not among tiny15"),
            ({"base_checkpoint": "tinyxl"}, "a checkpoint of SDXL, expected SD1.5 or SD2"),
            ({"adapter": "nobody"}, "'adapter' is 'nobody', which is not among tiny.bin"),
            ({"guidance_start": 0.9, "guidance_end": 0.1}, "'guidance_start' is 0.9, after"),
            ({"base_prompt": "a cat <lora:stylexl:1>"}, "'stylexl' in the SD1.5 prompt was made for SDXL"),
            ({"base_prompt": "a cat <lora:nobody:1>"}, "There is no LoRA named 'nobody'"),
            ([True, "nobody"], "'base_checkpoint' is 'nobody'"),
            ([True, "tiny15", "tiny", 3], "'switch_point' is 3"),
        ],
        ids=str,
    )
    def test_the_argument_is_named(self, webui, given, sentence):
        assert sentence in refused_everywhere(webui, BAD_REQUEST, given)

    def test_a_lora_that_is_nowhere_is_named(self, webui):
        assert "There is no LoRA named 'nobody'" in refused_everywhere(
            webui, BAD_REQUEST, {}, prompt="a cat <lora:nobody:1>"
        )

    def test_sdxl_must_be_selected(self, webui):
        message = refused_everywhere(webui, BAD_REQUEST, {}, override_settings={"sd_model_checkpoint": BASE_CHECKPOINT})
        assert "select an SDXL checkpoint; tiny15 is none" in message


@pytest.fixture
def file(webui):
    """Gives a path below the WebUI's models and takes the file away afterwards."""
    made = []

    def name(*parts: str):
        made.append(webui.data.joinpath("models", *parts))
        made[-1].parent.mkdir(parents=True, exist_ok=True)
        return made[-1]

    yield name
    for path in made:
        path.unlink(missing_ok=True)
    webui.post("/sdapi/v1/refresh-checkpoints")


class TestWrongFiles:
    """Status 422, and the file and key that are wrong."""

    @pytest.fixture
    def adapter_weights(self, models):
        from safetensors.numpy import load_file

        return load_file(models / "models/X-Adapter/tiny.safetensors")

    @pytest.mark.parametrize(
        ("change", "sentence"),
        [
            (lambda weights: weights.pop("body.4.block2.weight"), "misses 'body.4.block2.weight'"),
            (lambda weights: weights["zero_out.0.bias"].fill(numpy.nan), "'zero_out.0.bias' holds NaN"),
            (lambda weights: weights.clear(), "is not an X-Adapter file"),
        ],
    )
    def test_an_adapter_with_a_fault_is_told(self, webui, file, adapter_weights, change, sentence):
        change(adapter_weights)
        save_file(adapter_weights, file("X-Adapter", "faulty.safetensors"))
        assert sentence in refused_everywhere(webui, BAD_REQUEST, {"adapter": "faulty"})

    def test_an_adapter_that_is_cut_off_is_told(self, webui, file, models):
        whole = (models / "models/X-Adapter/tiny.bin").read_bytes()
        file("X-Adapter", "short.bin").write_bytes(whole[: len(whole) // 2])
        assert "short.bin is cut off" in refused_everywhere(webui, BAD_REQUEST, {"adapter": "short"})

    def test_an_adapter_for_other_models_is_told(self, webui, file, adapter_weights):
        wider = numpy.concatenate([adapter_weights["body.3.in_conv.weight"]] * 2, axis=1)
        adapter_weights["body.3.in_conv.weight"] = wider
        save_file(adapter_weights, file("X-Adapter", "other.safetensors"))
        message = refused_everywhere(webui, BAD_REQUEST, {"adapter": "other"})
        assert "level 1 ('body.3') takes features of 128 channels, the base gives 64" in message

    def test_a_base_checkpoint_that_cannot_be_read_is_told(self, webui, file, models):
        whole = (models / "models/Stable-diffusion/tiny15.safetensors").read_bytes()
        header = struct.unpack("<Q", whole[:8])[0]
        file("Stable-diffusion", "broken.safetensors").write_bytes(whole[: 8 + header + 1000])
        webui.post("/sdapi/v1/refresh-checkpoints")
        assert "broken.safetensors" in refused_everywhere(webui, SERVER_ERROR, {"base_checkpoint": "broken"})

    def test_a_lora_of_other_shapes_is_told(self, webui, file):
        name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
        wrong = {
            f"{name}.lora_down.weight": numpy.ones((2, 768), dtype=numpy.float32),
            f"{name}.lora_up.weight": numpy.ones((320, 2), dtype=numpy.float32),
        }
        save_file(wrong, file("Lora", "bigger.safetensors"))
        message = refused_everywhere(webui, BAD_REQUEST, {}, prompt="a cat <lora:bigger:1>")
        assert "'bigger' (1 layers)" in message

    def test_a_lora_that_is_no_lora_is_told(self, webui, file):
        header = json.dumps({"x": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}).encode()
        file("Lora", "rotten.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
        assert "rotten.safetensors" in refused_everywhere(webui, BAD_REQUEST, {}, prompt="a cat <lora:rotten:1>")


class TestVanishedFiles:
    """Files that were there when they were listed."""

    @pytest.fixture(params=SPOILT_FILES)
    def kind(self, request) -> SpoiltFile:
        return SPOILT_FILES[request.param]

    @pytest.fixture
    def listed(self, webui, models, kind):
        """A copy that the WebUI knows."""
        with copied(webui, models, kind) as path:
            yield path

    def message(self, server, kind: SpoiltFile) -> str:
        answer = server.txt2img(**{**PLAIN, **kind.request}, **arguments(**kind.arguments))
        assert answer.status in (BAD_REQUEST, SERVER_ERROR), answer.status
        return answer.error

    def test_one_that_is_gone_is_named(self, webui, listed, kind):
        listed.unlink()
        assert "spoilt" in self.message(webui, kind)

    def test_one_that_is_another_after_it_was_used_is_read_again(self, webui, listed, kind):
        usual = with_xadapter(webui, kind.arguments, **kind.request, steps=2).image
        whole = listed.read_bytes()
        listed.write_bytes(whole[: len(whole) // 2])
        assert "spoilt" in self.message(webui, kind)
        listed.write_bytes(whole + b"\0" * 4096)
        assert "spoilt" in self.message(webui, kind)
        listed.write_bytes(whole)
        assert same_bytes(with_xadapter(webui, kind.arguments, **kind.request, steps=2).image, usual)


class TestFaults:
    """Status 500 for what nobody asked for, wherever it happens."""

    @pytest.mark.parametrize(
        ("where", "after", "error"),
        [
            ("base_unet", 0, "RuntimeError"),
            ("base_unet", 2, "OutOfMemoryError"),
            ("base_unet", 9, "OutOfMemoryError"),
            ("upgraded_unet", 1, "RuntimeError"),
            ("upgraded_unet", 1, "OutOfMemoryError"),
            # SDXL's is run dry twice before either model samples
            ("sampler", 2, "RuntimeError"),
            ("sampler", 3, "RuntimeError"),
            ("vae_decode", 0, "RuntimeError"),
            ("vae_encode", 0, "RuntimeError"),
            ("vae_decode", 1, "RuntimeError"),
        ],
    )
    def test_a_model_that_raises_ends_the_job_with_its_message(self, webui, where, after, error):
        with webui.fault(where, after, error):
            # "auto" would go on one model after the other where memory lacks
            assert "armed by the probe" in refused(webui, SERVER_ERROR, {"memory": "lockstep"})

    @pytest.mark.parametrize("error", ["RuntimeError", "OutOfMemoryError"])
    def test_a_base_that_fails_to_load_does_not_take_sdxl_with_it(self, start_webui, error):
        with start_webui("loading") as fresh:
            before = plain(fresh)
            with fresh.fault("load_model", 0, error):
                answer = fresh.txt2img(**PLAIN, **arguments())
            assert answer.status == SERVER_ERROR
            assert "armed by the probe" in answer.error
            assert fresh.state()["checkpoint"] == UPGRADED_CHECKPOINT
            assert same_bytes(plain(fresh), before)
            assert with_xadapter(fresh).status == 200


class TestStopping:
    """Interrupt and skip return what there is, in both stages."""

    @pytest.mark.parametrize("how", ["interrupt", "skip"])
    @pytest.mark.parametrize(("where", "after"), [("base_unet", 2), ("upgraded_unet", 2), ("base_unet", 8)])
    def test_the_picture_so_far_comes_back_at_its_size(self, webui, how, where, after):
        with webui.fault(where, after, how):
            answer = with_xadapter(webui)
        assert answer.image.size == (PLAIN["width"], PLAIN["height"])

    @pytest.mark.parametrize("memory", ["lockstep", "recorded"])
    @pytest.mark.parametrize("how", ["interrupt", "skip", "stop"])
    def test_at_every_step_of_every_stage(self, webui, how, memory):
        """To stop is what the button does where the user's settings let the picture at work be finished."""
        small = {"width": 128, "height": 128, "steps": 3}
        given = {"memory": memory}
        usual = with_xadapter(webui, given, **small, seed=41).image
        with webui.recorded() as calls:
            with_xadapter(webui, given, **small, seed=42)
        models = [call["model"] for call in calls]
        for place, (where, model) in enumerate((("base_unet", BASE), ("upgraded_unet", UPGRADED))):
            for after in range(models.count(model)):
                with webui.fault(where, after, how):
                    # seeds of its own, so that nothing is found that an earlier job recorded
                    answer = with_xadapter(
                        webui, given, **small, seed=100 * place + after, n_iter=2, do_not_save_grid=True
                    )
                assert [image.size for image in answer.images] == [(128, 128)] * (2 if how == "skip" else 1)
                assert webui.state()["hooks"] == []
                assert same_bytes(with_xadapter(webui, given, **small, seed=41).image, usual)

    def test_a_skipped_picture_is_followed_by_the_next_one(self, webui):
        alone = with_xadapter(webui, seed=PLAIN["seed"] + 1).image
        with webui.fault("base_unet", 2, "skip"):
            answer = with_xadapter(webui, n_iter=2, do_not_save_grid=True)
        assert grey_levels_apart(answer.images[-1], alone) <= 1

    def test_an_interrupted_job_makes_no_further_pictures(self, webui):
        with webui.fault("upgraded_unet", 1, "interrupt"):
            assert len(with_xadapter(webui, n_iter=3).images) == 1


class TestConnection:
    """The client or the server is gone in the middle of a job."""

    def begun(self, server: WebUIServer) -> socket.socket:
        """The connection of a request whose job is under way."""
        body = json.dumps({**PLAIN, "steps": 40, **arguments()}).encode()
        connection = socket.create_connection(("127.0.0.1", server.port))
        head = ["POST /sdapi/v1/txt2img HTTP/1.1", "Host: x", "Content-Type: application/json"]
        connection.sendall("\r\n".join([*head, f"Content-Length: {len(body)}", "", ""]).encode() + body)
        server.wait_until(lambda: self.step(server) > 2, timeout=120)
        return connection

    def step(self, server: WebUIServer) -> int:
        return server.get("/sdapi/v1/progress?skip_current_image=true").content["state"]["sampling_step"]

    def test_a_client_that_hangs_up_leaves_nothing_behind(self, webui):
        self.begun(webui).close()
        assert self.step(webui) > 0

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
    def test_a_server_that_is_ended_leaves_every_file_whole(self, start_webui, number):
        with start_webui("ended") as server:
            with_xadapter(server, steps=2)
            before = files_of(server)
            with self.begun(server):
                os.killpg(server.process.pid, number)
                server.process.wait()
            assert files_of(server) == before
            json.loads((server.data / "config.json").read_text())


def files_of(server: WebUIServer) -> dict[str, bytes]:
    """What each file is, of the settings, the models and the extension."""
    folders = [server.data / "models", server.data / "embeddings", server.data / "extensions" / EXTENSION_NAME]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    settings = [server.data / "config.json", server.data / "styles.csv"]
    return {
        str(path.relative_to(server.data)): hashlib.sha256(path.read_bytes()).digest()
        for path in [*files, *settings]
        if "__pycache__" not in path.parts
    }
