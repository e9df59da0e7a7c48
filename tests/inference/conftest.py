"""Two dual encoders and a folder of images to embed; a site, served, and a browser to see it in."""

import shutil
import threading
from pathlib import Path

import pytest
from browser_page import HOSTILE, PICTURES, Page
from conftest import WORDS, make_student
from image_files import encoded, picture
from teacher_families import make_clip, save
from tiny_towers import scatter
from vector_folders import COUNT

from inference import web
from inference.web_open import make_server


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    model, processor = make_student()
    for part in (scatter(model), processor):
        part.save_pretrained(folder / "student")
    save(make_clip, folder / "clip_alone", None)
    return folder


@pytest.fixture
def images(tmp_path):
    for i in range(COUNT):
        path = tmp_path / "images" / ("", "a")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(picture(i), "PNG"))
    return tmp_path / "images"


@pytest.fixture(scope="session")
def site_student(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "student"
    model, processor = make_student()
    processor.tokenizer.model_max_length = 24
    scatter(model).eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def site_images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for i in range(PICTURES - 1):
        picture(i, size=(96 + 3 * i, 64 + 2 * i)).save(folder / f"{WORDS[i % len(WORDS)]} {i:02}.png")
    picture(99).save(folder / f"{HOSTILE}.png")
    (folder / "broken.png").write_bytes(b"\x89PNG")
    return folder


@pytest.fixture(scope="session")
def site(site_student, site_images, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sites") / "site"
    names = ["--model_name_or_path", site_student, "--images", site_images, "--output_dir", folder]
    web.main([*map(str, names), "--title", HOSTILE])
    return folder


@pytest.fixture
def serve():
    """Serves a folder on this machine; gives its address."""
    servers = []

    def start(folder: Path) -> str:
        servers.append(make_server(folder, 0))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}/"

    start.stop = lambda: [(server.shutdown(), server.server_close()) for server in servers]
    yield start
    start.stop()


@pytest.fixture
def page():
    programs = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in programs:
        pytest.fail("This test needs Chromium: apt-get install -y --no-install-recommends chromium chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    for flag in (
        "headless", "no-sandbox", "disable-gpu", "no-first-run", "disable-background-networking",
        "disable-component-update", "disable-sync", "no-proxy-server",
    ):  # fmt: skip
        options.add_argument(f"--{flag}")
    driver = webdriver.Chrome(options, webdriver.ChromeService(programs[1]))
    yield Page(driver)
    driver.quit()
