"""Screenshots of the page of `ldm-web` for the documentation.

    python benchmarks/web_pictures.py http://127.0.0.1:7860/ docs/pictures --prompt "a pig"

The server runs already; Chromium and its driver are installed, and selenium.
"""

import argparse
import io
import pathlib
import shutil
import tempfile
import time

from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

VIEWS = {
    "web": (1280, 1000, "light", "text"),
    "web_inpaint": (1280, 1000, "dark", "inpaint"),
    "web_phone": (390, 844, "dark", "text"),
}
"""{name: (width, height, colours, tab)}."""


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


def write(driver: webdriver.Chrome, css: str, text: str) -> None:
    """Put a text into a field."""
    (field,) = driver.find_elements(By.CSS_SELECTOR, css)
    field.send_keys(Keys.CONTROL, "a")
    field.send_keys(text)


def draw(driver: webdriver.Chrome, prompt: str, count: int) -> None:
    """Draw some pictures."""
    for css, text in (
        ("#batch input[type=number]", str(count)),
        ("#seed input", "2"),
        ("#guidance input[type=number]", "3"),
        ("#prompt textarea", prompt),
    ):
        write(driver, css, text)
    driver.find_element(By.ID, "generate").click()
    until(lambda: len(driver.find_elements(By.CSS_SELECTOR, "#gallery img")) >= count)
    time.sleep(1)


def paint(driver: webdriver.Chrome) -> None:
    """Draw a part of the picture anew, under a brush."""
    source = driver.find_element(By.CSS_SELECTOR, "#gallery img").get_attribute("src")
    script = "return fetch(arguments[0]).then(r => r.bytes()).then(b => Array.from(b))"
    with tempfile.NamedTemporaryFile(suffix=".png") as file:
        file.write(bytes(driver.execute_script(script, source)))
        file.flush()
        driver.find_element(By.CSS_SELECTOR, "button[role=tab]:nth-of-type(3)").click()
        until(lambda: driver.find_elements(By.CSS_SELECTOR, "#canvas canvas"))
        time.sleep(2)
        driver.find_element(By.CSS_SELECTOR, "#canvas input[type=file]").send_keys(file.name)
        time.sleep(3)
    for css, text in (("#blur", "0"), ("#strength", "1")):
        write(driver, f"{css} input[type=number]", text)
    canvas = driver.find_element(By.CSS_SELECTOR, "#canvas canvas")
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
    mouse = ActionChains(driver).move_to_element_with_offset(canvas, 15, -12).click_and_hold()
    for _ in range(3):
        mouse.move_by_offset(110, 14).move_by_offset(-110, 14)
    mouse.release().perform()
    time.sleep(1)
    driver.find_element(By.ID, "generate").click()
    told = driver.find_element(By.CSS_SELECTOR, "#text textarea")
    until(lambda: "Denoising" in told.get_property("value"))
    time.sleep(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address")
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--prompt", default="a pig left of a car")
    parser.add_argument("--instead", default="a pig left of a cat", help="of what is painted over")
    parser.add_argument("--count", type=int, default=4)
    asked = parser.parse_args()
    for name, (width, height, colours, tab) in VIEWS.items():
        driver = opened(f"{asked.address}?__theme={colours}", width, height)
        draw(driver, asked.prompt, asked.count if tab == "text" else 1)
        if tab == "inpaint":
            write(driver, "#prompt textarea", asked.instead)
            write(driver, "#guidance input[type=number]", "5")
            paint(driver)
            driver.execute_script("window.scrollTo(0, 0)")
        shot = Image.open(io.BytesIO(driver.get_screenshot_as_png())).convert("RGB")
        shot.quantize(128, dither=Image.Dither.NONE).save(asked.out / f"{name}.png", optimize=True)
        driver.quit()


if __name__ == "__main__":
    main()
