"""The demo as a person meets it: the Space's folder alone, a student on the Hub, a real browser."""

import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml
from conftest import make_rows, make_student
from image_files import picture
from PIL import Image
from tiny_towers import clip, make_processor

from rows.images import to_rgb


pytestmark = pytest.mark.browser  # gradio and selenium are there only for `make browser_test`
SPACE = Path(__file__).parents[2] / "inference" / "space"
# The packages of this project are installed here, and are not in a Space.
ALONE = """
import runpy, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("inference", "modeling_dsmd", "trainers", "teachers", "datasets_scripts"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
runpy.run_path("app.py", run_name="__main__")
"""
THUMBNAILS = ".grid-container .thumbnail-item"


@pytest.fixture
def student(hub):
    """The student, its processor, and both on the Hub as user/student."""
    model, processor = make_student()
    model.push_to_hub("user/student")
    processor.push_to_hub("user/student")
    return model, processor


@pytest.fixture
def outside(monkeypatch):
    """Counts the connections that leave this machine: they go to this proxy, which hangs up."""
    attempts = []
    server = socket.create_server(("127.0.0.1", 0))

    def hang_up() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            attempts.append(connection.recv(200))
            connection.close()

    threading.Thread(target=hang_up, daemon=True).start()
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{server.getsockname()[1]}")
    yield attempts
    server.shutdown(socket.SHUT_RDWR)
    server.close()


@pytest.fixture
def browser():
    programs = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in programs:
        pytest.fail("This test needs Chromium: apt-get install -y --no-install-recommends chromium chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    for flag in (
        "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
        "disable-component-update", "disable-sync", "no-proxy-server", "window-size=1100,760",
    ):  # fmt: skip
        options.add_argument(f"--{flag}")
    driver = webdriver.Chrome(options, webdriver.ChromeService(programs[1]))
    yield driver
    driver.quit()


@pytest.fixture
def run_space(tmp_path):
    """Starts a copy of the Space with some variables; gives its address."""
    processes = []

    def run(**variables: str) -> str:
        shutil.copytree(SPACE, tmp_path / "space")
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        environment = os.environ | variables | {"GRADIO_SERVER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        environment.pop("PYTHONPATH", None)
        log = (tmp_path / "log.txt").open("w+")
        process = subprocess.Popen(
            [sys.executable, "-c", ALONE],
            cwd=tmp_path / "space", env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
        processes.append((process, log))
        deadline = time.monotonic() + 180
        while not re.search("Running on local URL", (tmp_path / "log.txt").read_text()):
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log.txt").read_text()
            time.sleep(0.1)
        return f"http://127.0.0.1:{port}"

    yield run
    for process, log in processes:
        process.kill()
        process.wait()
        log.close()


def load_app(monkeypatch, **variables: str):
    """The Space's module, read with these variables."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    spec = importlib.util.spec_from_file_location("space_app", SPACE / "app.py")
    app = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(app)
    return app


def best_scores(student, searched, **query) -> list[str]:
    """The 12 highest scores of the images searched, by the model's own forward, as they are shown."""
    model, processor = student
    with torch.no_grad():
        index = model(**processor(images=searched, return_tensors="pt")).image_embeds
        output = model(**processor(**query, return_tensors="pt"))
    embeds = output.text_embeds if "text" in query else output.image_embeds
    return [f"{score:.3f}" for score in (index @ embeds[0]).topk(12).values.tolist()]


def test_a_person_searches(student, outside, browser, run_space, tmp_path):
    """Typed and dropped queries, their results and both times, and nothing asked of other hosts."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    clip().save_pretrained(tmp_path / "teacher")
    make_processor().save_pretrained(tmp_path / "teacher")
    images = [picture(i) for i in range(20)]
    (tmp_path / "images").mkdir()
    for i, image in enumerate(images):
        image.save(tmp_path / "images" / f"{i:02}.png")
    address = run_space(MODEL_ID="user/student", IMAGES=str(tmp_path / "images"), TEACHER_ID=str(tmp_path / "teacher"))
    browser.get(address)

    def wait(condition):
        return WebDriverWait(browser, 30).until(lambda _: condition())

    def find(css: str) -> list[str]:
        return [element.text.strip() for element in browser.find_elements(By.CSS_SELECTOR, css)]

    expected = best_scores(student, images, text=["arrow left"])
    wait(lambda: browser.find_elements(By.TAG_NAME, "textarea"))
    browser.find_element(By.TAG_NAME, "textarea").send_keys("arrow left\n")
    assert wait(lambda: find(THUMBNAILS)) == expected
    # The pictures themselves have arrived.
    loaded = "return [...document.querySelectorAll('.grid-container img')].map(image => image.naturalWidth)"
    assert wait(lambda: all(widths := browser.execute_script(loaded)) and widths) == [96] * 12
    times = re.search(
        r"Student, .* search 20 images\): ([\d.]+) ms\s+Teacher .*teacher, .*: ([\d.]+) ms", find("body")[0]
    )
    assert times and all(0 < float(value) < 30_000 for value in times.groups())
    assert browser.save_screenshot(tmp_path / "demo.png")
    assert len(np.unique(np.asarray(Image.open(tmp_path / "demo.png").convert("L")))) > 50

    browser.find_element(By.CSS_SELECTOR, "input[type=file]").send_keys(str(tmp_path / "images/07.png"))
    expected = best_scores(student, images, images=[images[7]])
    assert expected[0] == "1.000"
    wait(lambda: find(THUMBNAILS) == expected)
    wait(lambda: browser.find_element(By.TAG_NAME, "textarea").get_attribute("value") == "")

    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [
        message["params"]["request"]["url"] for message in messages if message["method"] == "Network.requestWillBeSent"
    ]
    assert asked and all(url.startswith((address, "data:", "blob:")) for url in asked)
    assert outside == []


def test_the_proxy_sees_what_leaves(outside):
    """Else the test above would see nothing."""
    with pytest.raises(OSError):
        urllib.request.build_opener().open("http://example.invalid", timeout=5)
    assert len(outside) == 1


def test_without_a_teacher_no_time_of_one(student, monkeypatch):
    """Images of a dataset of the Hub; only the student's time is shown."""
    rows = make_rows(30)
    datasets.DatasetDict({"train": rows.select(range(10)), "test": rows.select(range(10, 30))}).push_to_hub(
        "user/data"
    )
    monkeypatch.delenv("TEACHER_ID", raising=False)
    app = load_app(monkeypatch, MODEL_ID="user/student", IMAGES="user/data", SPLIT="test", MOST_IMAGES="15")
    search = next(function.fn for function in app.make_demo().fns.values() if function.name == "search")
    results, times = search("arrow left")
    assert "Student" in times and "search 15 images" in times and "Teacher" not in times and times.count(" ms<") == 1
    images = rows.select(range(10, 25))["image"]
    assert [score for _, score in results] == best_scores(student, list(images), text=["arrow left"])
    assert search("  ") == search(None) == ([], "")


def test_images_of_a_folder(tmp_path, monkeypatch):
    """Names such as train.png and test/ are names and no splits; the image is what the student was trained on."""
    for name in ("train.png", "test/1.png", "b/validation-1.JPG"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        picture(1).save(tmp_path / name)
    app = load_app(monkeypatch, IMAGES=str(tmp_path))
    assert len(app.load_images()) == 3
    for mode in ("RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16"):
        sixteen = Image.fromarray(np.arange(6000, dtype=np.uint16).reshape(60, 100) * 10)
        image = sixteen if mode == "I;16" else picture(3, mode)
        if mode in ("RGBA", "LA"):
            image.putalpha(Image.linear_gradient("L").resize(image.size))
        np.testing.assert_array_equal(np.asarray(app.to_rgb(image)), np.asarray(to_rgb(image)), err_msg=mode)
    monkeypatch.setattr(app, "IMAGES", str(tmp_path / "test"))
    (tmp_path / "test/1.png").unlink()
    with pytest.raises(ValueError, match="no images there"):
        app.load_images()


def test_what_cannot_be_read_is_left_out_and_named(tmp_path, monkeypatch, capsys):
    for name in ("a.png", "b.gif", ".hidden.png", ".git/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        picture(1).save(tmp_path / name)
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:300])
    app = load_app(monkeypatch, IMAGES=str(tmp_path))

    class Counting:
        def encode(self, images):
            return torch.ones(len(images), 4)

    kept, index = app.index_images(Counting(), app.load_images())
    assert [Path(row["image"]["path"]).name for row in kept] == ["a.png", "b.gif"] and index.shape == (2, 4)
    assert re.findall(r"'.*/(.*)' is left out", capsys.readouterr().out) == ["cut.png"]
    for name in ("a.png", "b.gif"):
        (tmp_path / name).unlink()
    with pytest.raises(ValueError, match="none of the 1 images there can be read"):
        app.index_images(Counting(), app.load_images())


def test_a_space_without_a_student_ends_in_a_sentence(tmp_path):
    environment = os.environ | {"MODEL_ID": str(tmp_path / "none"), "IMAGES": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, SPACE / "app.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 1 and result.stderr.splitlines()[-1].startswith("error: ")


def test_suffixes_and_limits_are_those_of_the_project():
    """Each of the two programs that stand alone names them again."""
    from inference import onnx_search, search
    from rows import images

    space = (SPACE / "app.py").read_text()
    for name, value in (("SUFFIXES", search.SUFFIXES), ("FORMATS", onnx_search.FORMATS)):
        assert f"{name} = {json.dumps(value)[1:-1].join('()')}" in space
    assert f"LONGEST_SIDES = {images.LONGEST_SIDES} " in space
    assert onnx_search.SUFFIXES == search.SUFFIXES and set(onnx_search.FORMATS) <= set(images.FORMATS)


def test_bars(monkeypatch):
    bars = load_app(monkeypatch).time_bars({"student <i>": 5.04, "teacher": 20.0})
    assert "student &lt;i&gt;" in bars and "<b>5.0 ms</b>" in bars and "<b>20.0 ms</b>" in bars
    assert [float(width) for width in re.findall(r"width:([\d.]+)%", bars)] == pytest.approx([25.2, 100])


def test_front_matter_and_requirements_are_of_what_is_tested():
    import gradio

    front = yaml.safe_load((SPACE / "README.md").read_text().split("---")[1])
    assert front["sdk"] == "gradio" and (SPACE / front["app_file"]).is_file() and front["models"]
    assert len(front["title"]) <= 60 and len(front["short_description"]) <= 60  # the Hub's limit
    assert front["sdk_version"] == gradio.__version__
    project = (SPACE.parents[1] / "pyproject.toml").read_text()
    for requirement in (SPACE / "requirements.txt").read_text().split():
        assert f'"{requirement}"' in project
