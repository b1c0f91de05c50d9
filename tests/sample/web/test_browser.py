"""A real browser, Chromium, walks through the page of a real server."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
from urllib.parse import urlsplit

import numpy as np
import pytest
import web
from PIL import Image
from selenium import webdriver
from selenium.common import exceptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from ldm_jax.runtime import images

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    BROWSER is None or DRIVER is None,
    reason="no browser: apt-get install chromium chromium-driver",
)
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking"),
    *("--disable-dev-shm-usage", "--window-size=1280,1400"),
)


@pytest.fixture(scope="module")
def address(tmp_path_factory, ldm_run):
    """Of `ldm-web` with a model of text and one of classes."""
    folder = tmp_path_factory.mktemp("browser")
    command = [sys.executable, "-m", "ldm_jax.sample.web.main", "--port", "0", "--model"]
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    with subprocess.Popen(
        [*command, str(web.text_run(folder)), str(ldm_run)],
        stderr=subprocess.PIPE,
        text=True,
        env=env,
    ) as process:
        for line in process.stderr:
            found = re.search(r"http://127\.0\.0\.1:\d+/", line)
            if found:
                break
        else:
            pytest.fail("the server ended")
        threading.Thread(target=process.stderr.read, daemon=True).start()
        yield found[0]
        process.kill()


@pytest.fixture
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


class Page:
    """The page in the browser."""

    def __init__(self, driver):
        self.driver = driver

    def find(self, css, seconds=30):
        """The first element that is shown, when it is."""
        return self.until(
            lambda: next((e for e in self.all(css) if e.is_displayed()), None), css, seconds
        )

    def all(self, css):
        return self.driver.find_elements(By.CSS_SELECTOR, css)

    def until(self, holds, what, seconds=30):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                found = holds()
            except exceptions.StaleElementReferenceException:
                found = None
            if found:
                return found
            time.sleep(0.1)
        raise AssertionError(f"{what} is not there after {seconds} s")

    def tells(self, css, text, seconds=60):
        """Wait until an element holds a text, or a field does."""

        def told():
            shown = self.find(css)
            return text in (shown.get_attribute("value") or shown.text)

        self.until(told, f"{text!r} in {css}", seconds)

    def give(self, css, path):
        """Choose a file."""
        self.until(lambda: self.all(f"{css} input[type=file]"), css)[0].send_keys(str(path))

    def tab(self, number):
        self.find(f"button[role=tab]:nth-of-type({number})").click()

    def write(self, css, text):
        field = self.find(css)
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(text)
        return field

    def picture(self, css, path):
        """The file of the first picture as the browser has it."""
        source = self.until(lambda: self.all(f"{css} img"), css)[0].get_attribute("src")
        script = "return fetch(arguments[0]).then(r => r.bytes()).then(b => Array.from(b))"
        path.write_bytes(bytes(self.driver.execute_script(script, source)))
        return path

    def generate(self):
        """Click, and wait for other pictures."""
        before = self.sources()
        self.find("#generate").click()
        self.until(lambda: self.sources() and self.sources() != before, "another picture", 120)

    def at_tab(self, label):
        """Wait until a tab is the one that is shown."""
        self.tells("button[role=tab][aria-selected=true]", label)

    def sources(self):
        return [image.get_attribute("src") for image in self.all("#gallery img")]


def progress(address):
    """How far the job of the server is, 0..1; None without one."""
    with urllib.request.urlopen(f"{address}sdapi/v1/progress?skip_current_image=true") as answer:
        told = json.load(answer)
    return told["progress"] if told["state"]["job_count"] else None


def test_a_walk(address, browser, tmp_path):
    page = Page(browser)
    browser.get(address)
    page.find("body[data-keys] #generate")

    # a prompt, by the keyboard
    page.write("#steps input[type=number]", "4")
    page.write("#prompt textarea", "a red (square:1.2)").send_keys(Keys.CONTROL, Keys.ENTER)
    page.tells("#status", "1 picture", 120)
    page.until(page.sources, "a picture")
    page.tells("#text textarea", "a red (square:1.2)\nSteps: 4, Sampler: DPM++ 2M")
    made = page.picture("#gallery", tmp_path / "made.png")
    seed = images.read_settings(made)["seed"]
    page.find("#last").click()
    page.tells("#seed input", str(seed))
    page.find("#any").click()
    page.tells("#seed input", "-1")

    # the text in the file, and the picture itself, for other tabs
    page.write("#prompt textarea", "something else")
    page.tab(5)
    page.give("#file", made)
    page.tells("#info textarea", "Seed: ")
    page.find("#to_text").click()
    page.at_tab("Text to image")
    page.tells("#prompt textarea", "a red (square:1.2)")
    page.tells("#seed input", str(seed))
    page.tab(5)
    page.write("#info textarea", "a fox\nSteps: 3, Sampler: DPM++ 2M, Seed: 5, Eta: 1")
    page.find("#to_image").click()
    page.at_tab("Image to image")
    page.tells(".toast-body", "not followed: Eta: 1")
    page.find("#image img")
    page.generate()
    page.tells("#text textarea", "a fox\nSteps: 3, Sampler: DPM++ 2M, CFG scale: 7, Seed: 5")
    page.tells("#text textarea", "Denoising strength: 0.75")

    # a mask, by the mouse
    start = web.noise(size=128)
    Image.fromarray(np.uint8(start)).save(tmp_path / "start.png")
    page.tab(3)
    canvas = page.find("#canvas canvas")
    time.sleep(1)  # it takes no file while it is set up
    page.give("#canvas", tmp_path / "start.png")
    page.until(lambda: "Upload" not in page.find("#canvas").text, "the picture on the canvas")
    time.sleep(1)  # it grows to its size
    mouse = ActionChains(browser).move_to_element(canvas).click_and_hold()
    mouse.move_by_offset(15, 5).move_by_offset(10, -10).release().perform()
    time.sleep(1)
    page.find("#only input").click()
    page.generate()
    drawn = np.asarray(Image.open(page.picture("#gallery", tmp_path / "drawn.png")))
    changed = np.any(drawn != start, axis=-1)
    assert changed[64, 64]  # under the brush
    assert not changed[:8].any()

    # what is missing, in a sentence
    page.tab(4)
    page.find("#generate").click()
    page.tells(".toast-wrap", "give a picture to enlarge")

    # a class of another model
    page.find("#model input").click()
    page.find("[role=option]:nth-of-type(2)").click()
    page.tells("button[role=tab]", "Class to image")
    page.tells("#width input", "16")
    assert not any(field.is_displayed() for field in page.all("#prompt textarea"))
    page.tab(1)
    page.find("#class input").click()
    page.find("[role=option][aria-label=square]").click()
    page.generate()
    page.tells("#text textarea", "square\nSteps: 3, Sampler: DPM++ 2M, CFG scale: 1.5, Seed: 5")

    # a long run, cancelled
    page.write("#steps input[type=number]", "150")
    page.write("#times input[type=number]", "64")
    page.find("#generate").click()
    page.tells("#status", "step ")
    page.find("#cancel").click()
    page.tells("#status", "Cancelled")

    assert [e for e in browser.get_log("browser") if e["level"] == "SEVERE"] == []
    events = [json.loads(e["message"])["message"] for e in browser.get_log("performance")]
    sent = [e["params"] for e in events if e["method"] == "Network.requestWillBeSent"]
    hosts = {urlsplit(one["request"]["url"]).netloc for one in sent}
    assert hosts - {""} == {urlsplit(address).netloc}

    # another is left alone by its browser
    page.find("#generate").click()
    page.tells("#status", "step ")
    far = [progress(address)]
    browser.get("about:blank")
    page.until(lambda: far.append(progress(address)) or far[-1] is None, "the end of the job", 60)
    assert max(far[:-1]) < 0.9  # it did not end by itself
