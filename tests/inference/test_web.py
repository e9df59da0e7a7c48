"""What a site consists of, what is refused, how its runtime is fetched and how it is served; no browser is needed."""

import base64
import hashlib
import http.client
import io
import json
import re
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import make_student
from image_files import picture
from PIL import Image
from tiny_towers import scatter

from inference import web, web_files, web_open, web_page, web_pictures, web_runtime, web_student
from inference.onnx_graphs import TextTower
from inference.student import push_folder


PAGE = web_page.PAGE


def test_index_rows_have_length_one_and_the_embeddings_direction(tmp_path):
    embeds = np.random.default_rng(0).normal(size=(50, 32))
    embeds[7] = 0
    web_files.write_index(embeds, tmp_path / "index.bin")
    data = (tmp_path / "index.bin").read_bytes()
    assert len(data) == 50 * (4 + 32)
    rows = np.frombuffer(data, np.int8, offset=200).reshape(50, 32) * np.frombuffer(data, "<f4", 50)[:, None]
    kept = np.arange(50) != 7
    np.testing.assert_allclose(np.linalg.norm(rows[kept], axis=1), 1, atol=1e-6)
    cosines = (rows * embeds).sum(1)[kept] / np.linalg.norm(embeds, axis=1)[kept]
    assert cosines.min() > 0.9999 and not rows[7].any()


def test_thumbnails_stand_in_their_order_and_are_not_enlarged(tmp_path):
    thumbnails = web_files.Thumbnails(tmp_path, 128)
    colours = np.random.default_rng(0).integers(0, 200, (18, 3), dtype=np.uint8)
    for i, colour in enumerate(colours):
        thumbnails.add(Image.new("RGB", (40, 20) if i == 0 else (300, 200), tuple(map(int, colour))))
    thumbnails.close()
    assert thumbnails.names == ["sheet-0.webp", "sheet-1.webp"] and thumbnails.columns == 4
    sheets = [np.asarray(Image.open(tmp_path / name).convert("RGB")).astype(int) for name in thumbnails.names]
    assert sheets[0].shape == (512, 512, 3) and sheets[1].shape == (128, 512, 3)
    for i, colour in enumerate(colours):
        row, column = divmod(i % 16, 4)
        centre = sheets[i // 16][row * 128 + 64, column * 128 + 64]
        assert np.abs(centre - colour).max() < 12, i
    assert (sheets[0][64, 20] > 250).all() and (sheets[0][64, 128 + 4] < 215).all()  # the small one, a large one


def test_the_worker_lists_the_files_and_names_their_state(tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("index.html", "README.md", "NOTICE", "data/sheet-0.webp"):
        (tmp_path / name).write_text(name)

    def written() -> tuple[str, list[str]]:
        web_page.write_worker(tmp_path, ["sheet-0.webp"])
        version, files = re.match(r'const VERSION = "(\w+)";\nconst FILES = (.*?);\n', text(), re.DOTALL).groups()
        return version, json.loads(files)

    def text() -> str:
        return (tmp_path / "sw.js").read_text()

    first = written()
    assert first[1] == ["./", "data/sheet-0.webp", "index.html"] and text().endswith((PAGE / "sw.js").read_text())
    assert written() == first
    (tmp_path / "index.html").write_text("another")
    assert written()[0] != first[0]
    (tmp_path / "data/sheet-0.webp").write_bytes(bytes(web_page.OFFLINE + 1))
    assert written()[1] == ["./", "index.html"]


def test_the_page_has_its_policy_and_no_way_to_read_names_as_html():
    html = (PAGE / "index.html").read_text()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)[1]
    assert policy == (
        "default-src 'self'; script-src 'self' 'wasm-unsafe-eval'; object-src 'none'; base-uri 'none'; "
        "form-action 'none'"
    )
    assert html.index("Content-Security-Policy") < html.index("<link") and html.count("<script") == 1
    assert not re.search(r"\son\w+=|\sstyle=|<style", html)
    for path in PAGE.iterdir():
        text = path.read_text()
        assert len(text.splitlines()) < 400
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", text), path
        assert re.findall(r"https?://[^\s\"']+", text) in ([], ["http://www.w3.org/2000/svg"]), path


def test_front_matter_makes_a_static_space():
    readme = web_files.space_readme("A <b> title: " * 9, "user/student")
    front = yaml.safe_load(readme.split("---")[1])
    assert front["sdk"] == "static" and front["app_file"] == "index.html" and front["models"] == ["user/student"]
    assert len(front["title"]) <= 60 and len(front["short_description"]) <= 60  # the Hub's limit
    assert "models" not in yaml.safe_load(web_files.space_readme("A", None).split("---")[1])


def test_a_push_makes_a_static_space(hub, tmp_path):
    (tmp_path / "README.md").write_text(web_files.space_readme("A", None))
    (tmp_path / "data").mkdir()
    (tmp_path / "data/index.bin").write_bytes(b"\0\1")
    push_folder(tmp_path, "user/demo", "Site", repo_type="space")
    assert hub.files("spaces/user/demo") == {
        "README.md": (tmp_path / "README.md").read_bytes(), "data/index.bin": b"\0\1",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--images", "none"], "--images none is not a folder"),
        (["--images", ".", "--labels", "captions"], "a folder has none"),
        (["--images", ".", "--dataset_name", "icons"], "not allowed with"),
        ([], "is required"),
        (["--images", ".", "--thumbnail_size", "9"], "expected 16 to 512"),
        (["--images", ".", "--notice", "none"], "--notice none is not a file"),
        (["--images", "."], "npm is not installed"),
    ],
)
def test_what_is_wrong_with_the_arguments_is_told(tmp_path, monkeypatch, capsys, more, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit):
        web.main(["--model_name_or_path", "none", "--output_dir", str(tmp_path / "site"), *more])
    assert message in capsys.readouterr().err


def test_too_many_pictures_and_too_large_a_student_are_refused():
    with pytest.raises(ValueError, match=r"100,000 pictures, .* 50,000 at most: search them with .*inference.search"):
        web_pictures.check_count(100_000, "here")
    with pytest.raises(ValueError, match="here has no pictures"):
        web_pictures.check_count(0, "here")
    with pytest.raises(ValueError, match="take 300 MB, and a page on a phone holds 200 MB: distil a smaller student"):
        web_student.check_size(300_000_000)
    web_pictures.check_count(50_000, "here")
    web_student.check_size(200_000_000)


def test_pictures_of_a_folder_and_what_stands_below_them(tmp_path):
    for name in ("b.png", "a/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        picture(1).save(tmp_path / name)
    (tmp_path / "a.png").write_bytes(b"\x89PNG")
    pictures = web_pictures.pictures_of_folder(tmp_path, "names", [])
    assert len(list(pictures)) == 2 and list(pictures.left_out) == ["a.png"]
    assert sorted(pictures.labels) == ["a/c.png", "b.png"] and pictures.examples(4) == []
    pictures.label_kind = "none"
    assert pictures.labels is None
    for name in ("b.png", "a/c.png"):
        (tmp_path / name).unlink()
    with pytest.raises(ValueError, match="none of 1 pictures can be read"):
        list(web_pictures.pictures_of_folder(tmp_path, "names", []))


def test_shared_neighbours_by_hand():
    index = np.eye(20)[:, :12]
    queries = np.zeros((1, 12))
    queries[0, :10] = np.arange(10, 0, -1)
    others = queries.copy()
    others[0, :2], others[0, 10:] = -1, 1  # two of the ten fall out for two others
    assert web_student._shared_neighbours(queries, queries, index) == 1
    assert web_student._shared_neighbours(queries, others, index) == pytest.approx(0.8)


class BlindToPadding(TextTower):
    """Right for a caption alone, wrong for one that is padded."""

    def forward(self, input_ids, attention_mask):
        return super().forward(input_ids, torch.ones_like(attention_mask))


def test_towers_are_compared_with_torch_as_other_exports_are(monkeypatch, tmp_path):
    """On batches and padded captions too."""
    model, processor = make_student()
    for part in (scatter(model), processor):
        part.save_pretrained(tmp_path / "student")
    for i in range(3):
        picture(i).save(tmp_path / f"{i}.png")
    student = web_student.load_web_student(str(tmp_path / "student"))
    pictures = web_pictures.pictures_of_folder(tmp_path, "names", [])
    plain = web_student.write_onnx
    monkeypatch.setattr(
        web_student, "write_onnx", lambda tower, *rest: plain(BlindToPadding(tower.student).eval(), *rest)
    )
    with pytest.raises(RuntimeError, match=r"text_model.onnx differs from torch by .* for input_ids \[3, "):
        web_student.export_towers(student, pictures, tmp_path)


class FakeTowers:
    """Embeddings that are right, but for one tower's int8, which is random."""

    def __init__(self, wrong: str | None):
        self.wrong, self.rng = wrong, np.random.default_rng(0)

    def picture(self, image: Image.Image, precision: str) -> np.ndarray:
        return self._embed("vision", precision, image.getpixel((0, 0))[0])

    def text(self, text: str, precision: str) -> np.ndarray:
        return self._embed("text", precision, int(re.sub(r"\D", "", text)))

    def _embed(self, tower: str, precision: str, number: int) -> np.ndarray:
        embed = np.random.default_rng(number).normal(size=32).astype(np.float32)
        if precision == "int8" and tower == self.wrong:
            embed = self.rng.normal(size=32).astype(np.float32)
        return embed / np.linalg.norm(embed)


@pytest.mark.parametrize("captioned", [40, 5, 0])  # a few captions give no recall
@pytest.mark.parametrize("wrong", [None, "vision", "text"])
def test_int8_is_taken_where_recall_holds(captioned, wrong, capsys):
    names = [f"picture {i}" for i in range(40)]
    captions = [[name] if i < captioned else [] for i, name in enumerate(names)]
    pictures = web_pictures.Pictures(
        names, captions, names, lambda i: Image.new("RGB", (4, 4), (i, 0, 0)), "names", []
    )
    chosen = web_student.choose_precisions(FakeTowers(wrong), pictures)
    assert chosen == {tower: "float32" if tower == wrong else "int8" for tower in ("vision", "text")}
    assert ("recalls' sum" in capsys.readouterr().out) == (captioned == 40)


def write_npm(folder: Path, code: str) -> None:
    """A program npm that runs code in place of the real one."""
    (folder / "npm").write_text(f"#!{sys.executable}\n{code}")
    (folder / "npm").chmod(0o755)


def tarball(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(f"package/dist/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


@pytest.fixture
def npm(tmp_path, monkeypatch):
    """A package of two small files under a fake npm; returns the folder that the runtime is to be in."""
    files = {name: name.encode() for name in web_runtime.FILES}
    package = tarball(files)
    (tmp_path / "package.tgz").write_bytes(package)
    write_npm(tmp_path, f"import shutil; shutil.copy({str(tmp_path / 'package.tgz')!r}, 'got.tgz')")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(web_runtime, "SHA512", base64.b64encode(hashlib.sha512(package).digest()).decode())
    monkeypatch.setattr(web_runtime, "FILES", {name: hashlib.sha256(data).hexdigest() for name, data in files.items()})
    return tmp_path


def test_the_runtime_is_fetched_once_and_again_where_it_was_changed(npm):
    folder = web_runtime.runtime_folder()
    assert {path.name for path in folder.iterdir()} == {*web_runtime.FILES, "LICENSE"}
    assert "Microsoft" in (folder / "LICENSE").read_text()
    (npm / "npm").rename(npm / "gone")
    assert web_runtime.runtime_folder() == folder
    name = next(iter(web_runtime.FILES))
    (folder / name).write_bytes(b"changed")
    (npm / "gone").rename(npm / "npm")
    web_runtime.add_runtime(npm)
    assert (npm / "runtime" / name).read_bytes() == (folder / name).read_bytes() == name.encode()


def test_the_demo_is_completed_with_the_page_and_the_runtime(npm):
    for _ in range(2):  # an earlier one is written over
        web_page.main([str(PAGE.parents[1] / "demo"), str(npm / "site")])
        constants = (npm / "site/sw.js").read_text()
        files = json.loads(re.search(r"const FILES = (.*?);\n", constants, re.DOTALL)[1])
        assert {"index.html", "app.js", "data/text_model.onnx", "data/sheet-24.webp"} < set(files)
        assert all((npm / "site" / name).exists() for name in files)
        assert {f"runtime/{name}" for name in web_runtime.FILES} < set(files)
        (npm / "site/app.js").write_text("of an earlier release")
    with pytest.raises(SystemExit, match="has no data/site.json"):
        web_page.main([str(npm), str(npm / "other")])


def test_another_package_than_the_pinned_one_is_refused(npm):
    (npm / "package.tgz").write_bytes(tarball({name: b"evil" for name in web_runtime.FILES}))
    with pytest.raises(ValueError, match="another onnxruntime-web@.* than the one that was checked: its sha512 is"):
        web_runtime.runtime_folder()
    assert not [path for path in (npm / "cache").rglob("*") if path.is_file()]


def test_an_npm_that_fails_or_is_missing_is_told(npm):
    write_npm(npm, "import sys; sys.exit('no network')")
    with pytest.raises(OSError, match="npm cannot fetch onnxruntime-web@.*: no network"):
        web_runtime.runtime_folder()
    (npm / "npm").unlink()
    with pytest.raises(FileNotFoundError, match="npm is not installed"):
        web_runtime.runtime_folder()


def test_pins_name_the_version_that_the_licence_names():
    assert web_runtime.VERSION in web_runtime.LICENSE and len(web_runtime.SHA512) == 88
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in web_runtime.FILES.values())


def test_the_server_is_this_machines_and_says_what_files_are(tmp_path):
    for name in ("a.wasm", "a.mjs", "index.html"):
        (tmp_path / name).write_bytes(b"x")
    with web_open.make_server(tmp_path, 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert server.server_address[0] == "127.0.0.1"

        def get(path: str, host: str) -> tuple[int, str | None]:
            connection = http.client.HTTPConnection(*server.server_address)
            connection.request("GET", path, headers={"Host": host})
            response = connection.getresponse()
            return response.status, response.getheader("Content-Type")

        port = server.server_port
        assert get("/a.wasm", f"127.0.0.1:{port}") == (200, "application/wasm")
        assert get("/a.mjs", f"localhost:{port}") == (200, "text/javascript")
        assert get("/", f"evil.example:{port}")[0] == 403
        assert get("/../../etc/passwd", f"127.0.0.1:{port}")[0] == 404
        with pytest.raises(OSError, match=f"port {port} cannot be opened"):
            web_open.make_server(tmp_path, port)
        server.shutdown()


def test_only_a_site_is_opened(tmp_path):
    with pytest.raises(SystemExit, match="is no site: write one with python -m inference.web"):
        web_open.main([str(tmp_path)])
    demo = PAGE.parents[1] / "demo"
    with pytest.raises(SystemExit, match="holds a site.s data alone: .*web_page .*demo build/demo, and open that"):
        web_open.main([str(demo)])
    assert not (demo / "runtime").exists()


def test_opening_needs_nothing_but_python():
    """The demo is opened on a machine without torch, before anything is installed."""
    code = """
import sys
before = set(sys.modules)
import inference.web_open
outside = {name.split(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)
assert outside <= {"inference", "rows"}, outside
"""
    subprocess.run([sys.executable, "-S", "-c", code], cwd=PAGE.parents[1], check=True)
