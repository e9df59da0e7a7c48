"""The demo and the search under strangers: only the index's images, bounded requests, a thousand at once."""

import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import make_student
from hostile.fuzzing import at_most
from hostile.test_images import BOMBS
from image_files import picture

from inference.search import index_folder
from teachers import load_teacher


SPACE = Path(__file__).parents[2] / "inference" / "space"
AT_ONCE = 1000


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    folder = tmp_path_factory.mktemp("student") / "student"
    for part in make_student():
        part.save_pretrained(folder)
    return folder


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(6):
        picture(i).save(folder / f"{i}.png")
    picture(9).save(tmp_path / "private.png")
    (folder / "link.png").symlink_to(tmp_path / "private.png")
    return folder


def test_a_thousand_searches_at_once(student, images, tmp_path):
    index = index_folder(load_teacher(str(student)), images, tmp_path / "cache")
    assert sorted(index.ids) == [f"{i}.png" for i in range(6)]  # the link is none of them
    queries = [f"red house {i % 7} " + "x" * 100_000 * (i % 50 == 0) for i in range(AT_ONCE)]
    expected = {query: index.search_text(query) for query in set(queries)}
    with at_most(60), ThreadPoolExecutor(AT_ONCE) as pool:
        assert list(pool.map(index.search_text, queries)) == [expected[query] for query in queries]


class TestDemo:
    """Needs gradio: `make browser_test`."""

    pytestmark = pytest.mark.browser

    @pytest.fixture
    def app(self, student, images, monkeypatch):
        for name, value in (("MODEL_ID", str(student)), ("IMAGES", str(images))):
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("TEACHER_ID", raising=False)
        spec = importlib.util.spec_from_file_location("space_app", SPACE / "app.py")
        app = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(app)
        return app

    def test_its_functions(self, app, tmp_path):
        import gradio

        assert len(app.load_images()) == 6
        functions = {function.name: function.fn for function in app.make_demo().fns.values()}
        search, search_image = functions["search"], functions["search_image"]
        with at_most(60), ThreadPoolExecutor(AT_ONCE) as pool:
            found = list(pool.map(search, ["red house"] * AT_ONCE))
        assert len(found) == AT_ONCE and len({tuple(score for _, score in results) for results, _ in found}) == 1
        with at_most(10):
            cut, _ = search("x" * 10_000_000)
        assert [score for _, score in cut] == [score for _, score in search("x" * app.LONGEST_QUERY)[0]]
        for name in ("png", "strip", "webp", "tiff"):
            (tmp_path / "upload.png").write_bytes(BOMBS[name])
            with at_most(10), pytest.raises(gradio.Error, match="cannot be read"):
                search_image(str(tmp_path / "upload.png"))
        (tmp_path / "upload.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
        with pytest.raises(gradio.Error, match="cannot be read"):
            search_image(str(tmp_path / "upload.png"))

    def test_the_server(self, student, images, tmp_path):
        """As a Space runs it, on the address it chooses by itself."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        variables = {"MODEL_ID": str(student), "IMAGES": str(images), "GRADIO_SERVER_PORT": str(port)}
        environment = {name: value for name, value in os.environ.items() if name != "GRADIO_SERVER_NAME"}
        log = tmp_path / "log.txt"
        with open(log, "w") as output:
            process = subprocess.Popen(
                [sys.executable, SPACE / "app.py"], env={**environment, **variables}, cwd=tmp_path,
                stdout=output, stderr=subprocess.STDOUT,
            )  # fmt: skip
        try:
            deadline = time.monotonic() + 180
            while "Running on local URL" not in log.read_text():
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)
            self.attack(f"http://127.0.0.1:{port}", tmp_path, images)
            assert process.poll() is None
            listening = subprocess.run(["cat", f"/proc/{process.pid}/net/tcp"], capture_output=True, text=True).stdout
            bound = re.findall(rf"(\w+):{port:04X} 00000000:0000 0A", listening)
            assert bound == ["0100007F"]  # 127.0.0.1
        finally:
            process.kill()
            process.wait()

    def attack(self, url: str, folder: Path, images: Path) -> None:
        def ask(path: str, body: bytes | None = None, kind: str = "application/json") -> tuple[int, bytes]:
            request = urllib.request.Request(url + path, body, {"Content-Type": kind})
            try:
                with urllib.request.urlopen(request, timeout=120) as answer:
                    return answer.status, answer.read()
            except urllib.error.HTTPError as error:
                return error.code, error.read()
            except (urllib.error.URLError, ConnectionError):  # it has hung up in the middle of too large a body
                return 413, b""

        def search(query: str) -> bytes:
            status, body = ask("/gradio_api/call/search", json.dumps({"data": [query]}).encode())
            assert status == 200, body
            return ask(f"/gradio_api/call/search/{json.loads(body)['event_id']}")[1]

        assert b"event: complete" in search("red house")
        for path in (folder / "private.png", images / "link.png", "/etc/passwd", images / ".." / "private.png"):
            for place in (f"/gradio_api/file={path}", f"/file={path}", f"/gradio_api/file=..{path}"):
                assert ask(place)[0] in (403, 404), place
        big = json.dumps({"data": ["x" * (30 << 20)]}).encode()
        assert ask("/gradio_api/call/search", big)[0] == 413
        form = b'--b\r\nContent-Disposition: form-data; name="files"; filename="x.png"\r\n\r\n' + bytes(30 << 20)
        status, body = ask("/gradio_api/upload", form + b"\r\n--b--\r\n", "multipart/form-data; boundary=b")
        assert status >= 400, body
        with ThreadPoolExecutor(100) as pool:
            answers = list(pool.map(search, ["red house"] * AT_ONCE))
        assert sum(b"event: complete" in answer for answer in answers) == AT_ONCE
        assert b"event: complete" in search("red house")
