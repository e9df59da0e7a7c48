"""A page in a browser, and what should be in it."""

import json
from pathlib import Path

import numpy as np
from image_files import picture

from inference.web_check import embed_in_python


HOSTILE = '<img src=x onerror="document.title=`harmed`">'
PICTURES = 30


class Page:
    """A page in a headless Chromium."""

    def __init__(self, driver):
        self.driver = driver

    def open(self, address: str, width: int = 1280, height: int = 900) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.get(address)
        self.wait(lambda: self.run("return document.body.dataset.ready"))

    def run(self, code: str, *arguments):
        return self.driver.execute_script(code, *arguments)

    def run_async(self, code: str, *arguments):
        """What the code returns, in which `await` may stand; an error is its text."""
        self.driver.set_script_timeout(120)
        body = (
            f"const done = [...arguments].pop(); (async () => {{{code}}})().then(done, (error) => done(`${{error}}`))"
        )
        return self.driver.execute_async_script(body, *arguments)

    def wait(self, condition):
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.driver, 60).until(lambda _: condition())

    def find(self, css: str):
        from selenium.webdriver.common.by import By

        return self.driver.find_element(By.CSS_SELECTOR, css)

    def text(self, css: str) -> str:
        return self.run("return document.querySelector(arguments[0]).textContent", css)

    def labels(self) -> list[str]:
        return self.run("return [...document.querySelectorAll('#results .label')].map(({textContent}) => textContent)")

    def search(self, query: str) -> list[str]:
        self.find("#text").clear()
        self.find("#text").send_keys(query + "\n")
        self.wait(lambda: query in self.text("#status"))
        return self.labels()


def python_order(site: Path, texts=(), pictures=()) -> list[str]:
    """The labels of all pictures, best first, by Python from the site's own files."""
    about = json.loads((site / "data/site.json").read_text())
    labels = json.loads((site / "data/labels.json").read_text())
    rows, dim = about["index"]["rows"], about["index"]["dim"]
    data = (site / "data/index.bin").read_bytes()
    scales = np.frombuffer(data, "<f4", rows)
    index = np.frombuffer(data, np.int8, offset=4 * rows).reshape(rows, dim) * scales[:, None]
    embeds = embed_in_python(site, list(texts) or ["a"], list(pictures) or [picture(1)])
    query = embeds["texts" if texts else "pictures"][0]
    return [labels[i] for i in np.argsort(-(index @ query), kind="stable")]
