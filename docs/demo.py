"""Takes the README's pictures of the demo, with the shipped model: docs/demo.webp, demo-dark.webp and demo-phone.webp.

python docs/demo.py     needs Chromium on the PATH, or its place in CONVMIXER_CHROMIUM
"""

import io
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parents[1]
PORT = 7959
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
SHOTS = {
    "demo.webp": {"viewport": {"width": 1280, "height": 720}},
    "demo-dark.webp": {"viewport": {"width": 1280, "height": 720}, "color_scheme": "dark"},
    "demo-phone.webp": {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True},
}


def main() -> None:
    chromium = os.environ.get("CONVMIXER_CHROMIUM") or shutil.which("chromium")
    if not chromium:
        sys.exit("docs/demo.py: no Chromium; install it, or name it in CONVMIXER_CHROMIUM")
    model = ["--model", "convmixer_256_8_cifar10", "--port", str(PORT)]
    server = subprocess.Popen([sys.executable, "demo/app.py", *model], cwd=ROOT)
    try:
        address = f"http://127.0.0.1:{PORT}/"
        wait_for(address)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
            for name, options in SHOTS.items():
                page = browser.new_context(**options).new_page()
                page.goto(address)
                page.wait_for_selector("#stage .heat:not([hidden])")
                page.wait_for_timeout(1500)  # the fonts, and what loads last
                Image.open(io.BytesIO(page.screenshot())).convert("RGB").save(ROOT / "docs" / name, quality=90)
            browser.close()
    finally:
        server.terminate()
        server.wait()


def wait_for(address: str, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            return urllib.request.urlopen(address, timeout=5).close()
        except OSError:
            time.sleep(0.2)
    sys.exit("docs/demo.py: the demo did not start")


if __name__ == "__main__":
    main()
