"""Screenshots of the page of `ldm-web` for the documentation.

    python benchmarks/web_pictures.py http://127.0.0.1:7860/ docs/pictures --prompt "a pig"

The server runs already; Chromium and its driver are installed, and selenium.
"""

import argparse
import io
import pathlib
import shutil
import time

from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

VIEWS = {"web": (1280, 1000, "light"), "web_phone": (390, 1500, "dark")}
"""{name: (width, height, colours)}."""


def opened(address: str, width: int, height: int) -> webdriver.Chrome:
    """A browser with the page."""
    options = webdriver.ChromeOptions()
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    driver.get(address)
    until(lambda: driver.find_elements(By.CSS_SELECTOR, "body[data-keys] #generate"))
    return driver


def until(holds):
    """What `holds` gives when it is something."""
    for _ in range(600):
        found = holds()
        if found:
            return found
        time.sleep(0.1)
    raise TimeoutError


def draw(driver: webdriver.Chrome, prompt: str, count: int) -> None:
    """Draw some pictures."""
    for css, text in (
        ("#batch input[type=number]", str(count)),
        ("#seed input", "2"),
        ("#guidance input[type=number]", "3"),
        ("#prompt textarea", prompt),
    ):
        (field,) = driver.find_elements(By.CSS_SELECTOR, css)
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(text)
    driver.find_element(By.ID, "generate").click()
    until(lambda: len(driver.find_elements(By.CSS_SELECTOR, "#gallery img")) >= count)
    time.sleep(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address")
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--prompt", default="a pig left of a car")
    parser.add_argument("--count", type=int, default=4)
    asked = parser.parse_args()
    for name, (width, height, colours) in VIEWS.items():
        driver = opened(f"{asked.address}?__theme={colours}", width, height)
        draw(driver, asked.prompt, asked.count)
        shot = Image.open(io.BytesIO(driver.get_screenshot_as_png())).convert("RGB")
        shot.quantize(128, dither=Image.Dither.NONE).save(asked.out / f"{name}.png", optimize=True)
        driver.quit()


if __name__ == "__main__":
    main()
