"""A disk that is full and files that may not be read: told where they matter, and nothing is left behind."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from .asking import arguments, with_xadapter
from .conftest import PLAIN, same_bytes
from .server import WebUIServer
from .spoilt_files import SPOILT_FILES, SpoiltFile, copied

SMALL = {"width": 128, "height": 128, "steps": 2}
# root may read everything, unless it is told that it may not
READS_WHAT_IT_MAY = ("setpriv", "--bounding-set=-dac_override,-dac_read_search") if os.getuid() == 0 else ()


@pytest.fixture(params=SPOILT_FILES)
def kind(request) -> SpoiltFile:
    return SPOILT_FILES[request.param]


@pytest.fixture
def own(server: WebUIServer, models: Path, kind: SpoiltFile) -> Iterator[Path]:
    """A copy of a file of that kind, which the WebUI has listed."""
    with copied(server, models, kind) as path:
        yield path


class TestFullDisk:
    """The WebUI's cache and its pictures lie on a disk without room."""

    @pytest.fixture(scope="class")
    @staticmethod
    def disk(tmp_path_factory) -> Iterator[Path]:
        """A disk of its own, of 64 MB."""
        folder = tmp_path_factory.mktemp("disk")
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder], capture_output=True)
        if mounted.returncode != 0:
            pytest.skip("needs the right to mount a small disk")
        yield folder
        subprocess.run(["umount", "--lazy", folder], check=True)

    @pytest.fixture(scope="class")
    @staticmethod
    def server(start_webui: Callable[..., WebUIServer], disk: Path) -> Iterator[WebUIServer]:
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("SD_WEBUI_CACHE_DIR", str(disk / "cache"))
            with start_webui("full-disk", options={"outdir_txt2img_samples": str(disk / "pictures")}) as server:
                yield server

    @pytest.fixture
    def fill(self, disk: Path) -> Iterator[Callable[[], Callable[[], None]]]:
        """Leaves no room; what it gives back makes room again."""
        filler = disk / "filler"

        def fill() -> Callable[[], None]:
            with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
                while True:
                    file.write(bytes(1024))
            return filler.unlink

        yield fill
        filler.unlink(missing_ok=True)

    def test_a_new_file_is_used_or_named_and_used_once_there_is_room(self, server, own, kind, fill):
        """The WebUI and its Lora extension keep something of each file that they load, and may fail to."""
        usual = with_xadapter(server, **SMALL, **kind.usual_request).image
        make_room = fill()
        answer = server.txt2img(**{**PLAIN, **SMALL, **kind.request}, **arguments(**kind.arguments))
        assert same_bytes(answer.image, usual) if answer.status == 200 else "spoilt" in answer.error
        make_room()
        assert same_bytes(with_xadapter(server, kind.arguments, **SMALL, **kind.request).image, usual)

    def test_a_picture_that_cannot_be_saved_ends_the_job_with_the_reason(self, server, fill):
        usual = with_xadapter(server, **SMALL)
        fill()
        answer = server.txt2img(**{**PLAIN, **SMALL}, **arguments(), save_images=True)
        assert answer.status == 500
        assert "No space left on device" in answer.error
        assert server.state()["hooks"] == []
        assert same_bytes(with_xadapter(server, **SMALL).image, usual.image)


class TestWithoutPermission:
    """Files and folders that the WebUI's user may not read."""

    @pytest.fixture(scope="class")
    @staticmethod
    def server(start_webui: Callable[..., WebUIServer]) -> Iterator[WebUIServer]:
        with start_webui("without-permission", run_by=READS_WHAT_IT_MAY) as server:
            yield server

    def test_a_file_that_may_not_be_read_is_named_and_used_once_it_may(self, server, own, kind):
        # the WebUI has listed it: that would list no checkpoint at all beside one that it may not read
        own.chmod(0)
        answer = server.txt2img(**{**PLAIN, **SMALL, **kind.request}, **arguments(**kind.arguments))
        assert answer.status in (422, 500)
        assert "spoilt.safetensors cannot be read: Permission denied" in answer.error
        own.chmod(0o600)
        assert with_xadapter(server, kind.arguments, **SMALL, **kind.request).status == 200

    @pytest.mark.parametrize("kind", ["adapter"], indirect=True)
    def test_what_lies_in_a_folder_that_may_not_be_entered_is_as_if_it_were_not_there(self, server, own):
        closed = own.parent / "closed"
        closed.mkdir()
        shutil.move(own, closed)
        closed.chmod(0)
        try:
            answer = server.txt2img(**{**PLAIN, **SMALL}, **arguments(adapter="closed/spoilt"))
            assert answer.status == 422
            assert "'adapter' is 'closed/spoilt', which is not among" in answer.error
            assert with_xadapter(server, **SMALL).status == 200
        finally:
            closed.chmod(0o700)
            shutil.rmtree(closed)
