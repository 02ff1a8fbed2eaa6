"""Make the README's first picture, tests/look.png: the page of examples/look.py, for a text and models/tiny.

python -m pip install selenium          (Chromium and its driver: apt install chromium chromium-driver)
python tests/make_screenshot.py
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from browser import open_browser, open_page

ROOT = Path(__file__).parent.parent
TEXT = """\
GREMIO:
Nay, I dare not swear it.

TRANIO:
Then thou wert best say that I am not Lucentio.

GREMIO:
Yes, I know thee to be Signior Lucentio.

BAPTISTA:
Away with the dotard! to the gaol with him!
"""  # from the tenth of its data that the tiny model was not trained on
HEAD = "Layer 4, head 1"  # looks at the name of who speaks
TOKEN = "␣be"


def main(folder):
    html = Path(folder) / "look.html"
    command = [
        sys.executable,
        "-m",
        "examples.look",
        "-",
        "--model_size",
        "tiny",
        "--html",
        str(html),
    ]
    subprocess.run(command, cwd=ROOT, input=TEXT, text=True, check=True)
    with open_browser(folder, width=1280, height=1230) as browser:
        open_page(browser, html)
        browser.find_element("css selector", f"[aria-label='{HEAD}']").click()
        browser.find_elements("css selector", f"[aria-label^='{TOKEN},']")[-1].click()
        browser.save_screenshot(str(ROOT / "tests" / "look.png"))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(folder)
