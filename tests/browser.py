"""Headless Chromium, driven by selenium, for the test of the page and the script of its picture."""

import contextlib
import shutil
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
CHROMEDRIVER = shutil.which("chromedriver")
OPTIONS = """
    --headless --no-sandbox --disable-gpu --disable-quic --no-first-run
    --disable-background-networking --disable-component-update --disable-sync
"""


@contextlib.contextmanager
def open_browser(profile_dir):
    """Start Chromium with an empty profile in profile_dir. It logs its console."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for option in [*OPTIONS.split(), f"--user-data-dir={Path(profile_dir) / 'profile'}"]:
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(CHROMEDRIVER))
    try:
        yield browser
    finally:
        browser.quit()


def set_screen(browser, width=1200, height=1000, scheme="light"):
    """Set the size of the screen and whether its user prefers light or dark colours."""
    is_phone = width < 600
    screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": is_phone}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    media = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})


def open_page(browser, path, fragment=""):
    """Open a page of examples/look.py from the disk, and wait until it is drawn."""
    from selenium.webdriver.support.ui import WebDriverWait

    browser.get("about:blank")  # a new fragment alone would not load the page again
    browser.get(Path(path).as_uri() + fragment)
    WebDriverWait(browser, 20, 0.02).until(
        lambda _: browser.execute_script("return document.documentElement.dataset.ready")
    )
