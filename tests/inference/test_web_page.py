"""The page that inference.web writes, as a person meets it in a browser: searched, offline, narrow, hostile names."""

import base64
import json
import shutil
import socket

import pytest
from browser_page import HOSTILE, PICTURES, python_order
from conftest import WORDS
from image_files import encoded, picture
from PIL import Image


pytestmark = pytest.mark.browser  # Chromium and npm are there only for `make browser_test`


def test_a_person_searches_and_nothing_is_asked_of_other_hosts(page, serve, site, site_images):
    address = serve(site)
    page.open(address)
    assert page.search("arrow left") == python_order(site, texts=["arrow left"])[:24]
    assert page.run("return document.querySelectorAll('#results canvas').length") == 24
    assert "ms to read it" in page.text("#times")
    page.find("#more").click()
    assert len(page.labels()) == PICTURES

    name = f"{WORDS[7]} 07.png"
    page.find("#file").send_keys(str(site_images / name))
    page.wait(lambda: "this picture" in page.text("#status"))
    assert page.labels() == python_order(site, pictures=[Image.open(site_images / name)])[:24]
    assert page.labels()[0] == name and page.find("#asked").is_displayed()

    page.find("#results li:nth-child(3) button").click()
    page.wait(lambda: "like" in page.text("#status"))
    assert page.run("return document.querySelector('#results .score').textContent") == "1.000"
    page.search("house " * 50)
    assert "the student reads its first 24 tokens" in page.text("#status")

    messages = [json.loads(entry["message"])["message"] for entry in page.driver.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert len(asked) > 10 and all(url.startswith((address, "data:", "blob:")) for url in asked)
    assert not [entry for entry in page.driver.get_log("browser") if entry["level"] == "SEVERE"]


def test_a_picture_is_dropped_and_one_is_pasted(page, serve, site, site_images):
    page.open(serve(site))
    for event, row in (("drop", 5), ("paste", 9)):
        name = f"{WORDS[row]} {row:02}.png"
        data = base64.b64encode((site_images / name).read_bytes()).decode()
        page.run(
            """const transfer = new DataTransfer();
            const bytes = Uint8Array.from(atob(arguments[0]), (letter) => letter.charCodeAt(0));
            transfer.items.add(new File([bytes], "any.png", { type: "image/png" }));
            document.dispatchEvent(arguments[1] === "drop"
              ? new DragEvent("drop", { dataTransfer: transfer, bubbles: true, cancelable: true })
              : new ClipboardEvent("paste", { clipboardData: transfer, bubbles: true, cancelable: true }));""",
            data, event,
        )  # fmt: skip
        page.wait(lambda name=name: page.labels()[0] == name)


def test_names_and_titles_are_text(page, serve, site):
    page.open(serve(site))
    page.find("#more").click()
    assert f"{HOSTILE}.png" in page.labels()
    assert page.run("return document.title") == HOSTILE == page.text("#title")
    page.search(HOSTILE)
    assert page.run("return document.querySelectorAll('img, iframe, script:not([src])').length") == 0


def test_a_page_that_would_reach_elsewhere_is_stopped(page, serve, site, tmp_path):
    """The policy of the page and not only the goodwill of its code: for code, for what it fetches and for pictures."""
    elsewhere = serve(tmp_path)
    (tmp_path / "evil.js").write_text("document.title = 'reached'")
    page.open(serve(site))
    stopped = page.run_async(
        """const stopped = [];
        document.addEventListener("securitypolicyviolation", (event) => stopped.push(event.effectiveDirective));
        await fetch(arguments[0] + "evil.js").then(() => stopped.push("fetched"), () => null);
        document.body.append(Object.assign(document.createElement("script"), { src: arguments[0] + "evil.js" }));
        document.body.append(Object.assign(new Image(), { src: arguments[0] + "x.png" }));
        document.body.append(Object.assign(document.createElement("script"), { textContent: "document.title = 1" }));
        await new Promise((resolve) => setTimeout(resolve, 500));
        return stopped;""",
        elsewhere,
    )
    assert sorted(stopped) == ["connect-src", "img-src", "script-src-elem", "script-src-elem"]
    assert page.run("return document.title") == HOSTILE


def test_it_works_offline_once_it_is_loaded(page, serve, site, site_images):
    address = serve(site)
    page.open(address)
    page.run_async("await navigator.serviceWorker.ready; return 1")
    expected = page.search("red house")
    serve.stop()
    page.open(address)
    assert page.search("red house") == expected
    page.find("#file").send_keys(str(site_images / f"{WORDS[3]} 03.png"))  # its tower was never loaded by the page
    page.wait(lambda: "this picture" in page.text("#status"))
    drawn = "return document.querySelector('#results canvas').getContext('2d').getImageData(32, 32, 1, 1).data[3]"
    page.wait(lambda: page.run(drawn) == 255)


@pytest.mark.parametrize("width", [390, 1280])
def test_no_width_cuts_anything_off(page, serve, site, width):
    page.open(serve(site), width)
    page.search("arrow")
    assert page.run("return document.documentElement.scrollWidth") <= width
    beyond = """return [...document.querySelectorAll("button, input, canvas, p")].filter((element) => {
      const { left, right, width } = element.getBoundingClientRect();
      return width && (left < 0 || right > innerWidth);
    }).length"""
    assert page.run(beyond) == 0
    small = """return [...document.querySelectorAll("button:not([hidden])")].filter((button) => {
      const { height } = button.getBoundingClientRect();
      return height && height < 44;
    }).length"""
    assert page.run(small) == 0  # a finger's width


def test_the_keyboard_alone_and_names_for_a_screen_reader(page, serve, site):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    page.open(serve(site))
    press = lambda *keys: ActionChains(page.driver).send_keys(*keys).perform()  # noqa: E731
    press(Keys.TAB)
    assert page.run("return document.activeElement.id") == "text"
    press("blue tree", Keys.ENTER)
    page.wait(lambda: "blue tree" in page.text("#status"))
    while not page.run("return document.activeElement.dataset.row"):
        press(Keys.TAB)
    outline = "return getComputedStyle(document.activeElement).outlineStyle"
    assert page.run(outline) == "solid"
    press(Keys.ENTER)
    page.wait(lambda: "a picture like" in page.text("#status"))
    tree = page.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    roles = [(node.get("role", {}).get("value"), node.get("name", {}).get("value")) for node in tree]
    assert ("searchbox", "What to look for") in roles and ("heading", HOSTILE) in roles
    buttons = [name for role, name in roles if role == "button"]
    assert all(buttons) and sum("search for pictures like this one" in name for name in buttons) == 24
    assert any(role == "status" for role, _ in roles)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_letters_stand_out_from_their_ground(page, serve, site, scheme):
    page.open(serve(site))
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    page.search("arrow")
    colours = page.run(
        """const style = getComputedStyle(document.documentElement);
        const names = ["ink", "quiet", "ground", "raised", "mark", "on-mark"];
        return names.map((name) => style.getPropertyValue(`--${name}`));"""
    )

    def luminance(colour: str) -> float:
        parts = [int(colour.strip()[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        parts = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    def contrast(*pair: str) -> float:  # WCAG 2's
        dark, light = sorted(map(luminance, pair))
        return (light + 0.05) / (dark + 0.05)

    ink, quiet, ground, raised, mark, on_mark = colours
    assert (luminance(ground) < 0.1) == (scheme == "dark")
    for pair in ((ink, ground), (ink, raised), (quiet, ground), (quiet, raised), (mark, on_mark)):
        assert contrast(*pair) >= 4.5, pair


@pytest.mark.parametrize("data", [b"", b"\x89PNG no picture", encoded(picture(1), "PNG")[:200]])
def test_a_file_that_is_no_picture_is_told(page, serve, site, tmp_path, data):
    (tmp_path / "a.png").write_bytes(data)
    page.open(serve(site))
    page.find("#file").send_keys(str(tmp_path / "a.png"))
    page.wait(lambda: "no picture that this browser can read" in page.text("#status"))
    assert page.search("arrow")  # and the page goes on


def test_a_missing_runtime_and_a_missing_server_are_sentences(page, serve, site, tmp_path):
    without = tmp_path / "without"
    shutil.copytree(site, without, ignore=shutil.ignore_patterns("runtime"))
    page.open(serve(without))
    assert "python -m inference.web_open" in page.text("#status")
    with socket.create_connection(("127.0.0.1", int(serve(site).split(":")[2].strip("/")))) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n")
        assert b" 403 " in connection.recv(100)
