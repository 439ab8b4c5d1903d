"""The demo's page in a real browser: how soon it can be used, and how soon a click is answered."""

import contextlib
import itertools
import os
import shutil
from pathlib import Path

from benchmarks.demo_load import jpeg
from benchmarks.demo_server import Server
from benchmarks.harness import Failure

ROUNDS = 5
CHROMIUM = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
CHROMIUM += ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
CAMERA_SECONDS = 10

# Clicks the last example until that sends something, and notes when: a listener that is not there yet hears nothing.
UNTIL_USABLE = """(() => {
    const times = window.times = {};
    const send = window.fetch;
    window.fetch = (...given) => {
        const is_choice = String(given[1]?.body).includes('"event_data":{"name"');
        if (is_choice) times.usable ??= performance.now();
        return send(...given);
    };
    const look = () => {
        if (document.querySelector(".bar")?.checkVisibility()) {
            times.bar ??= performance.now();
            [...document.querySelectorAll("#examples button[data-name]")].at(-1)?.click();
        }
        if (!times.usable) setTimeout(look, 20);
    };
    look();
})()"""
# For what follows: seen() waits until the page shows the answer about a picture, and gives the times.
SEEN = """
const shown = (name) => {
    const picture = document.querySelector("#stage .picture");
    const layer = document.querySelector("#stage .heat:not([hidden])");
    const bar = document.querySelector('#answer .bar[aria-pressed="true"]');
    const is_answer = picture?.alt === name && layer && layer.dataset.index === bar?.dataset.index;
    return is_answer && [picture, layer];
};
const painted = () => new Promise((resolve) => requestAnimationFrame(() => setTimeout(resolve)));
window.seen = async (name, start) => {
    while (!shown(name)) {
        if (performance.now() > start + 60000) throw new Error(`no answer about ${name} in a minute`);
        await new Promise((resolve) => setTimeout(resolve, 2));
    }
    const arrived = performance.now();
    await shown(name)[0].decode();
    await painted();
    const end = performance.now();
    const find = (part) => performance.getEntriesByType("resource")
        .find((entry) => entry.name.includes(part) && entry.startTime >= start);
    for (let i = 0; i < 50 && !find("queue/data"); i++) await new Promise((resolve) => setTimeout(resolve, 20));
    const join = find("queue/join"), data = find("queue/data");
    return {
        seconds: (end - start) / 1000,
        network: parseFloat(document.querySelector("#answer .about p").textContent.match(/in (\\d+) ms/)[1]) / 1000,
        join: join && [join.startTime - start, join.responseEnd - start],
        data: data && [data.startTime - start, data.responseEnd - start, data.encodedBodySize],
        arrived: arrived - start,
    };
};
"""
CLICK = """async (name) => {
    performance.clearResourceTimings();
    const start = performance.now();
    document.querySelector(`#examples button[data-name="${name}"]`).click();
    return await seen(name, start);
}"""
HEAR_UPLOAD = """(name) => {
    performance.clearResourceTimings();
    const hear = () => { window.answer = seen(name, performance.now()) };
    window.addEventListener("change", hear, { capture: true, once: true });
}"""
BAR = """async (position) => {
    const bar = document.querySelectorAll("#answer .bar")[position], start = performance.now();
    bar.click();
    const layer = document.querySelector("#stage .heat:not([hidden])");
    if (layer?.dataset.index !== bar.dataset.index) throw new Error("the bar shows no heat map");
    await new Promise((resolve) => requestAnimationFrame(() => setTimeout(resolve)));
    return (performance.now() - start) / 1000;
}"""


@contextlib.contextmanager
def open_browser():
    """A Chromium, or None where there is none."""
    program = os.environ.get("CONVMIXER_CHROMIUM") or shutil.which("chromium")
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError:
        program = None
    if not program:
        yield None
        return
    with sync_playwright() as playwright:
        try:
            yield playwright.chromium.launch(executable_path=program, args=CHROMIUM)
        except Error as error:
            raise Failure(f"in the browser: {str(error).splitlines()[0]}") from error


def open_page(context, server: Server):
    """A tab with the page, ready for use."""
    page = context.new_page()
    page.add_init_script(UNTIL_USABLE)
    page.goto(f"http://127.0.0.1:{server.port}/", wait_until="commit")
    page.wait_for_function("window.times?.usable", timeout=60_000)
    return page


def run_page(browser, server: Server) -> dict:
    """Seconds from asking for the page until it can be used, each time with an empty cache."""
    bar, usable = [], []
    for _ in range(ROUNDS):
        with browser.new_context() as context:
            times = open_page(context, server).evaluate("window.times")
            bar.append(times["bar"] / 1000)
            usable.append(times["usable"] / 1000)
    return {"bar": bar, "usable": usable}


def run_clicks(browser, server: Server, folder: Path) -> dict:
    """Seconds from a click, or from a chosen file, until the answer is painted."""
    photographs = {name: draw_photograph(width) for name, width in (("1 MP", 1200), ("12 MP", 4000))}
    with browser.new_context() as context:
        context.add_init_script(SEEN)
        page = open_page(context, server)
        names = page.eval_on_selector_all("#examples button", "buttons => buttons.map(one => one.dataset.name)")
        page.evaluate("name => seen(name, 0)", names[-1])  # while a question is open, the page takes no other
        clicks = [page.evaluate(CLICK, name) for name in 3 * names]
        bars = [page.evaluate(BAR, position) for position in 4 * [1, 2, 3, 4, 0]]
        uploads = {name: [] for name in photographs}
        for number, (name, content) in itertools.product(range(ROUNDS), photographs.items()):
            path = folder / f"{name} {number}.jpg"
            path.write_bytes(content + bytes([number]))  # an end that no decoder reads: another file for the server
            page.evaluate(HEAR_UPLOAD, path.name)
            page.set_input_files('#source input[type="file"]', path)
            page.wait_for_function("window.answer")
            uploads[name].append(page.evaluate("window.answer") | {"bytes": len(content)})
            page.evaluate("window.answer = null")
    return {"clicks": clicks, "bars": bars, "uploads": uploads}


def run_camera(browser, server: Server) -> dict:
    """Answers a second while the browser's own camera, which shows a clock, runs."""
    with browser.new_context(permissions=["camera"]) as context:
        context.add_init_script(SEEN)
        page, answered = open_page(context, server), []
        names = page.eval_on_selector_all("#examples button", "buttons => buttons.map(one => one.dataset.name)")
        page.evaluate("name => seen(name, 0)", names[-1])  # an answer that comes later would end the camera
        page.on("requestfinished", lambda request: answered.append(request) if "/live?" in request.url else None)
        page.get_by_role("button", name="Use the camera").click()
        page.wait_for_function("document.querySelector('#stage video')?.videoWidth > 0")
        page.wait_for_timeout(2000)
        answered.clear()
        page.wait_for_timeout(1000 * CAMERA_SECONDS)
        return {"answers/s": len(answered) / CAMERA_SECONDS}


def draw_photograph(width: int) -> bytes:
    """A JPEG in the format 4:3 with detail and noise, about as large as a camera's."""
    import numpy as np
    from PIL import Image

    rng, height = np.random.default_rng(0), width * 3 // 4
    coarse = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8))
    picture = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.int16)
    return jpeg(Image.fromarray((picture + rng.integers(-8, 9, (height, width, 1))).clip(0, 255).astype(np.uint8)))
