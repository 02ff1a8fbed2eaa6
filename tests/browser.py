"""Headless Chromium, driven by selenium: what the test of the page and the script of its picture need."""

import contextlib
import shutil
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
CHROMEDRIVER = shutil.which("chromedriver")
OPTIONS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
             --disable-component-update --disable-sync --hide-scrollbars"""


@contextlib.contextmanager
def open_browser(profile_dir, width=1280, height=1000):
    """Start Chromium with an empty profile in profile_dir. It logs its console and its requests."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for option in [*OPTIONS.split(), f"--user-data-dir={Path(profile_dir) / 'profile'}"]:
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(CHROMEDRIVER))
    try:
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        yield browser
    finally:
        browser.quit()


def open_page(browser, path):
    """Open a page of examples/look.py from the disk, and wait until it is drawn."""
    from selenium.webdriver.support.ui import WebDriverWait

    browser.get(Path(path).as_uri())
    WebDriverWait(browser, 20, 0.02).until(
        lambda _: browser.execute_script("return document.documentElement.dataset.ready")
    )
