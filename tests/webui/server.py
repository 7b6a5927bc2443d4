"""A real AUTOMATIC1111 WebUI for the tests: set up in a folder of its own, started, asked over REST, stopped."""

import base64
import contextlib
import fcntl
import hashlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

REPOSITORY = Path(__file__).parents[2]
PROBE = Path(__file__).parent / "probe"
SMALL_MODELS = Path(__file__).parent / "small_models.py"

EXTENSION_NAME = "sd-webui-xadapter"
UPGRADED_CHECKPOINT = "tinyxl.safetensors"
BASE_CHECKPOINT = "tiny15.safetensors"

FLAGS = (
    "--skip-prepare-environment",
    "--skip-torch-cuda-test",
    "--skip-version-check",
    "--use-cpu",
    "all",
    "--no-half",
    "--precision",
    "full",
    "--disable-nan-check",
    "--no-hashing",
    "--do-not-download-clip",
    "--no-download-sd-model",
    "--disable-console-progressbars",
    "--opt-sdp-attention",  # a third of the time on a CPU
    "--api",
    "--api-server-stop",
)
OFFLINE = {
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_OFFLINE": "1",
    "GRADIO_ANALYTICS_ENABLED": "False",
    "no_proxy": "127.0.0.1,localhost",
}
# Threads that spin while they wait make each other wait where the machine has more servers than cores.
PATIENT = {"OMP_WAIT_POLICY": "PASSIVE"}
# What belongs to the process that runs the tests, and would mislead the WebUI's own Python.
NOT_INHERITED = ("COMMANDLINE_ARGS", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
OPTIONS = {
    "sd_model_checkpoint": UPGRADED_CHECKPOINT,
    "show_progress_type": "Approx cheap",  # the default preview downloads a model
    "auto_launch_browser": "Disable",
    # A setting that is not in config.json is not put back after a request that overrides it.
    "CLIP_stop_at_last_layers": 1,
    "batch_cond_uncond": True,
    "pad_cond_uncond": False,
    "s_min_uncond": 0.0,
    "s_min_uncond_all": False,
}
STYLES = 'name,prompt,negative_prompt\nboat,"{prompt}, base15 in a boat",\n'
SAYS_IT_IS_UP = "\nStartup time: "
# Large, private or not part of what a user installs.
NOT_INSTALLED = shutil.ignore_patterns(".*", "__pycache__", "tests", "*.safetensors", "*.bin", "*.pt", "*.ckpt")


class WebUIError(Exception):
    """The WebUI could not be set up or started; the message ends with what it wrote last."""


@dataclass(frozen=True)
class Installation:
    """A WebUI on this machine: its folder, and the Python that has its requirements."""

    folder: Path
    python: Path

    @classmethod
    def from_environment(cls) -> "Installation | None":
        """The WebUI at `WEBUI_DIR`, run by `WEBUI_PYTHON`, its own venv or this Python; None where there is none."""
        if not os.environ.get("WEBUI_DIR"):
            return None
        folder = Path(os.environ["WEBUI_DIR"]).resolve()
        own = folder / "venv/bin/python"
        return cls(folder, Path(os.environ.get("WEBUI_PYTHON") or (own if own.exists() else sys.executable)))


@dataclass(frozen=True)
class Reply:
    """What a route answered: the HTTP status and the parsed JSON, or the text if it was not JSON."""

    status: int
    content: Any


@dataclass(frozen=True)
class Answer:
    """What txt2img or img2img answered: pictures with their infotexts, or an error."""

    status: int
    images: tuple[Image.Image, ...] = ()
    infotexts: tuple[str, ...] = ()
    info: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    """What the WebUI said was wrong, in its own words; empty where nothing was."""

    @property
    def image(self) -> Image.Image:
        """The only picture."""
        if len(self.images) != 1:
            raise AssertionError(f"expected one picture, got {len(self.images)} (status {self.status}): {self.error}")
        return self.images[0]

    @classmethod
    def from_reply(cls, reply: Reply) -> "Answer":
        if reply.status != 200:
            return cls(reply.status, error=error_text(reply.content))
        info = json.loads(reply.content["info"])
        images = tuple(decode_image(image) for image in reply.content["images"])
        return cls(reply.status, images, tuple(info["infotexts"]), info)


def error_text(content: Any) -> str:
    """The message in an error reply: FastAPI's `detail`, the text of the exception, or both."""
    if not isinstance(content, dict):
        return str(content)
    parts = (content.get("detail"), content.get("errors"))
    return "\n".join(part if isinstance(part, str) else json.dumps(part) for part in parts if part)


def encode_image(image: Image.Image) -> str:
    png = io.BytesIO()
    image.save(png, format="PNG")
    return base64.b64encode(png.getvalue()).decode()


def decode_image(text: str) -> Image.Image:
    image = Image.open(io.BytesIO(base64.b64decode(text)))
    image.load()
    return image


def small_models(installation: Installation, full_width_base: bool = False) -> Path:
    """The folder of the small checkpoints, made on first use and kept between sessions until small_models.py changes.

    Raises `WebUIError` if they cannot be made.
    """
    version = hashlib.sha256(SMALL_MODELS.read_bytes()).hexdigest()[:12]
    kept = Path(tempfile.gettempdir()) / f"{EXTENSION_NAME}-tests-{os.getuid()}"
    folder = kept / f"{'full-width-base' if full_width_base else 'small'}-{version}"
    complete = folder / "complete"
    kept.mkdir(mode=0o700, exist_ok=True)
    with locked(kept / "lock"):
        if not complete.exists():
            flags = ["--full-width-base"] if full_width_base else []
            made = subprocess.run(
                # Isolated (-I), so that no module beside the script is taken for an installed one.
                [installation.python, "-I", SMALL_MODELS, installation.folder, folder, *flags],
                env=environment(),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            if made.returncode != 0:
                raise WebUIError(f"{SMALL_MODELS.name} ended with status {made.returncode}:\n{tail(made.stdout)}")
            complete.touch()
    return folder


@contextlib.contextmanager
def locked(file: Path) -> Iterator[None]:
    with file.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def environment() -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name not in NOT_INHERITED}
    return inherited | OFFLINE | PATIENT | {"PYTHONUNBUFFERED": "1"}


def tail(text: str, lines: int = 40) -> str:
    return "\n".join(line.rsplit("\r", 1)[-1] for line in text.split("\n")[-lines:])


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@dataclass
class WebUIServer:
    """A WebUI process with its own data folder (`--data-dir`), and the client that asks it.

    Used as a context manager, or through `start` and `close`. The installation's folder is only read.
    """

    installation: Installation
    data: Path
    """Its data folder: new, filled by `start`, left behind by `close` with the log."""
    models: Sequence[Path]
    """Folders as small_models.py writes them; their files are linked into the data folder."""
    extension: bool = True
    """Whether X-Adapter is installed in it."""
    more_extensions: Sequence[Path] = ()
    flags: Sequence[str] = ()
    """Command line flags beside the ones every server gets, such as `--medvram`."""
    options: dict[str, Any] = field(default_factory=dict)
    """Settings beside the ones every server gets."""
    run_by: Sequence[str] = ()
    """A command that runs the WebUI's."""
    credentials: str | None = None
    """`user:password`: the API asks for it, and the client sends it."""
    port: int = field(init=False, default_factory=free_port)
    process: subprocess.Popen | None = field(init=False, default=None)

    def __enter__(self) -> "WebUIServer":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- starting and stopping ---

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log_file(self) -> Path:
        return self.data / "webui.log"

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    def start(self, timeout: float = 300) -> "WebUIServer":
        """Start and wait until its extensions and its checkpoint are there.

        Raises `WebUIError` with the log's tail if the process ends before, or needs longer than the timeout (seconds).
        """
        self.set_up()
        with self.log_file.open("wb") as log:
            self.process = subprocess.Popen(
                self.command(),
                cwd=self.installation.folder,
                env=environment(),
                stdin=subprocess.PIPE,  # held open: the probe ends the server when it closes
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self.wait_until(self.is_up, timeout)
        except BaseException:
            self.close()
            raise
        return self

    def set_up(self) -> None:
        self.data.mkdir(parents=True)
        for models in self.models:
            for folder in ("models", "embeddings"):
                link_files(models / folder, self.data / folder)
        extensions = {PROBE: "xadapter-probe"} | {folder: folder.name for folder in self.more_extensions}
        if self.extension:
            extensions[REPOSITORY] = EXTENSION_NAME
        for source, name in extensions.items():
            # Copied, because the WebUI finds the extension that a callback belongs to by the file's real path.
            shutil.copytree(source, self.data / "extensions" / name, ignore=NOT_INSTALLED)
        (self.data / "styles.csv").write_text(STYLES)
        (self.data / "config.json").write_text(json.dumps(OPTIONS | self.options))

    def command(self) -> list[str]:
        asked_for = ["--api-auth", self.credentials] if self.credentials else []
        place = ["--data-dir", str(self.data), "--port", str(self.port)]
        return [*self.run_by, str(self.installation.python), "launch.py", *FLAGS, *place, *asked_for, *self.flags]

    def wait_until(self, is_so: Callable[[], bool], timeout: float) -> None:
        latest = time.monotonic() + timeout
        while not is_so():
            if self.process.poll() is not None:
                raise WebUIError(f"the WebUI ended with status {self.process.returncode}:\n{tail(self.log)}")
            if time.monotonic() > latest:
                raise WebUIError(f"the WebUI was not up after {timeout:g} s:\n{tail(self.log)}")
            time.sleep(0.2)

    def is_up(self) -> bool:
        # Not asked before it says so itself: a request between gradio's start and the API's ends the WebUI, with
        # "Cannot add middleware after an application has started".
        if SAYS_IT_IS_UP not in self.log:
            return False
        try:
            return self.state()["checkpoint"] is not None
        except urllib.error.URLError:
            # with --nowebui it says so before it listens
            return False

    def reload_ui(self, timeout: float = 300) -> None:
        """As the button does: extensions are loaded anew, the process and its models stay."""
        started = self.log.count(SAYS_IT_IS_UP)
        self.probed(self.post("/probe/reload"))
        self.wait_until(lambda: self.log.count(SAYS_IT_IS_UP) > started and self.is_up(), timeout)

    def close(self) -> None:
        """End the process and what it started; a server that is closed already stays closed."""
        process, self.process = self.process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdin.close()

    # --- asking ---

    def get(self, route: str, timeout: float = 600) -> Reply:
        return self.ask(urllib.request.Request(self.url + route), timeout)

    def post(self, route: str, content: Any = None, timeout: float = 600) -> Reply:
        headers = {"Content-Type": "application/json"}
        return self.ask(urllib.request.Request(self.url + route, json.dumps(content).encode(), headers), timeout)

    def ask(self, request: urllib.request.Request, timeout: float) -> Reply:
        """Raises `OSError` if nobody listens or the answer takes longer than the timeout (seconds)."""
        if self.credentials:
            request.add_header("Authorization", "Basic " + base64.b64encode(self.credentials.encode()).decode())
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with direct.open(request, timeout=timeout) as response:
                return Reply(response.status, parse_json(response.read()))
        except urllib.error.HTTPError as error:
            with error:
                return Reply(error.code, parse_json(error.read()))

    def txt2img(self, **payload: Any) -> Answer:
        return Answer.from_reply(self.post("/sdapi/v1/txt2img", payload))

    def img2img(self, *init_images: Image.Image, **payload: Any) -> Answer:
        """The pictures to start from are given first; a `mask` may be a picture too."""
        payload["init_images"] = [encode_image(image) for image in init_images]
        if isinstance(payload.get("mask"), Image.Image):
            payload["mask"] = encode_image(payload["mask"])
        return Answer.from_reply(self.post("/sdapi/v1/img2img", payload))

    # --- looking inside, through the probe ---

    def state(self) -> dict[str, Any]:
        """What is loaded, hooked and selected: see probe/scripts/probe.py."""
        return self.probed(self.get("/probe/state"))

    def memory(self) -> int:
        """Bytes that its process fills, without what is free in them."""
        return self.probed(self.get("/probe/memory"))

    def recordings(self) -> int:
        """Bytes that recordings of the base fill."""
        return self.probed(self.get("/probe/recordings"))

    def kept_jobs(self) -> int:
        """How many of X-Adapter's jobs are kept."""
        return self.probed(self.get("/probe/jobs"))

    def changed_tensors(self) -> list[str]:
        """Names of the base's tensors that are not, to the bit, those of its checkpoint's file."""
        return self.probed(self.get("/probe/changed"))

    def imported(self) -> set[str]:
        """The rooms of X-Adapter that the WebUI has imported so far."""
        return {name.removeprefix("lib_xadapter.") for name in self.probed(self.get("/probe/imported"))}

    def recorded(self, progress: bool = False) -> contextlib.AbstractContextManager[list[dict[str, Any]]]:
        """The UNet calls made inside, oldest first, there once the context is left.

        With `progress`, each has under "said" what the progress route says at that moment.
        """
        return self.recording("/probe/calls", progress)

    def recorded_samplings(self) -> contextlib.AbstractContextManager[list[dict[str, Any]]]:
        """The samplings inside, oldest first, there once the context is left: see Sampling in probe.py."""
        return self.recording("/probe/samplings")

    @contextlib.contextmanager
    def recording(self, route: str, progress: bool = False) -> Iterator[list[dict[str, Any]]]:
        records: list[dict[str, Any]] = []
        self.probed(self.post("/probe/reset", {"progress": progress}))
        try:
            yield records
        finally:
            self.probed(self.post("/probe/stop"))
            records += self.probed(self.get(route))

    @contextlib.contextmanager
    def fault(self, where: str, after: int = 0, error: str = "RuntimeError") -> Iterator[None]:
        """Inside, the call of the place that follows `after` others fails, once; it must have failed at the end."""
        self.probed(self.post("/probe/arm", {"where": where, "after": after, "error": error}))
        still_armed = True
        try:
            yield
        finally:
            still_armed = self.probed(self.post("/probe/disarm"))
        if still_armed:
            raise AssertionError(f"the fault at {where} after {after} calls never fired")

    @contextlib.contextmanager
    def pretending(self, what: str) -> Iterator[None]:
        """Inside, something is otherwise than it is: see `pretences` in probe/scripts/probe.py."""
        self.probed(self.post("/probe/pretend", {"what": what}))
        try:
            yield
        finally:
            self.probed(self.post("/probe/pretend", {"what": None}))

    @staticmethod
    def probed(reply: Reply) -> Any:
        if reply.status != 200:
            raise AssertionError(f"the probe answered {reply.status}: {error_text(reply.content)}")
        return reply.content


def link_files(source: Path, target: Path) -> None:
    """Links to every file below the source, in folders of the target's own, so that tests may add files to them."""
    for file in source.rglob("*"):
        if file.is_file():
            link = target / file.relative_to(source)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file)


def parse_json(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        return content.decode(errors="replace")
