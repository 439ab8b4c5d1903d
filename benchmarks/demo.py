"""The demo's page in a real browser: how soon it can be used, and how soon a click is answered.

    python benchmarks/demo.py [--only page clicks camera] [--rounds 5] [--json FILE]

Starts `python demo/app.py` with the shipped model as a process of its own. Needs playwright and Chromium
(CONVMIXER_CHROMIUM, or on the PATH).
"""

import os
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, so that the rest is found

from benchmarks import harness
from benchmarks.harness import MODEL, ROOT, Failure, Server, photograph

CHROMIUM = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
CHROMIUM += ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
CAMERA_SECONDS = 10

# Clicks the last example until that sends something, and notes when: a listener that is not there yet hears nothing.
UNTIL_USABLE = """(() => {
    const send = window.fetch;
    window.fetch = (...given) => {
        const is_choice = String(given[1]?.body).includes('"event_data":{"name"');
        if (is_choice) window.usable ??= performance.now();
        return send(...given);
    };
    const look = () => {
        if (document.querySelector(".bar")?.checkVisibility())
            [...document.querySelectorAll("#examples button[data-name]")].at(-1)?.click();
        if (!window.usable) setTimeout(look, 20);
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
    await shown(name)[0].decode();
    await painted();
    return (performance.now() - start) / 1000;
};
"""
CLICK = """async (name) => {
    const start = performance.now();
    document.querySelector(`#examples button[data-name="${name}"]`).click();
    return await seen(name, start);
}"""
HEAR_UPLOAD = """(name) => {
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


def open_page(context, server: Server):
    """A tab with the page, ready for use."""
    page = context.new_page()
    page.add_init_script(SEEN + UNTIL_USABLE)
    page.goto(f"{server.url}/", wait_until="commit")
    page.wait_for_function("window.usable", timeout=60_000)
    return page


def open_answered(context, server: Server):
    """The same with an answer, and the names of its examples: while a question is open, the page takes no other."""
    page = open_page(context, server)
    names = page.eval_on_selector_all("#examples button", "buttons => buttons.map(one => one.dataset.name)")
    page.evaluate("name => seen(name, 0)", names[-1])
    return page, names


def run_page(browser, server: Server, rounds: int) -> dict[str, list[float]]:
    """From asking for the page until it can be used, each time with an empty cache."""
    found = []
    for _ in range(rounds):
        with browser.new_context() as context:
            found.append(open_page(context, server).evaluate("window.usable") / 1000)
    return {"fresh page: examples react": found}


def run_clicks(browser, server: Server, rounds: int) -> dict[str, list[float]]:
    """From a click, or from a chosen file, until the answer is painted."""
    content, uploads = photograph(4000, 3000), []
    with browser.new_context() as context:
        page, names = open_answered(context, server)
        clicks = [page.evaluate(CLICK, name) for name in 3 * names]
        bars = [page.evaluate(BAR, position) for position in 4 * [1, 2, 3, 4, 0]]
        for number in range(rounds):
            name = f"12 MP {number}.jpg"
            page.evaluate(HEAR_UPLOAD, name)
            file = {"name": name, "mimeType": "image/jpeg", "buffer": content + bytes([number % 256])}  # another file
            page.set_input_files('#source input[type="file"]', file)
            page.wait_for_function("window.answer")
            uploads.append(page.evaluate("window.answer"))
            page.evaluate("window.answer = null")
    found = {"click on an example: answer visible": clicks, "upload of 12 megapixels: answer visible": uploads}
    return found | {"click on a bar: heat map visible": bars}


def run_camera(browser, server: Server, rounds: int) -> dict[str, list[float]]:
    """Answers a second while the browser's own camera, which shows a clock, runs."""
    with browser.new_context(permissions=["camera"]) as context:
        page, _ = open_answered(context, server)  # an answer that comes later would end the camera
        answered = []
        page.on("requestfinished", lambda request: answered.append(request) if "/live?" in request.url else None)
        page.get_by_role("button", name="Use the camera").click()
        page.wait_for_function("document.querySelector('#stage video')?.videoWidth > 0")
        page.wait_for_timeout(2000)
        answered.clear()
        page.wait_for_timeout(1000 * CAMERA_SECONDS)
        return {"camera: answers a second": [len(answered) / CAMERA_SECONDS]}


PARTS = {"page": run_page, "clicks": run_clicks, "camera": run_camera}


def main() -> None:
    parser = harness.Parser(__doc__, rounds=5)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="some of the parts")
    options, found = parser.parse_args(), {}
    program = os.environ.get("CONVMIXER_CHROMIUM") or shutil.which("chromium")
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError:
        program = None
    if not program:
        raise Failure("needs playwright and Chromium (CONVMIXER_CHROMIUM=FILE)")
    harness.print_machine()
    with tempfile.TemporaryDirectory() as folder:
        words = ["demo/app.py", "--model", MODEL, "--port", "{port}"]
        environment = {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False"}
        server = Server("demo", words, Path(folder, "log"), "/", cwd=ROOT, env=environment)
        try:
            with sync_playwright() as playwright:
                browser = playwright.chromium.launch(executable_path=program, args=CHROMIUM)
                for part in options.only:
                    found |= PARTS[part](browser, server, options.rounds)
        except Error as error:
            raise Failure(f"in the browser: {str(error).splitlines()[0]}") from error
        finally:
            server.close()
        print(f"tracebacks that the server printed: {server.log.read_text().count('Traceback')}\n")
    rows = [[name, statistics.median(values), max(values), len(values)] for name, values in found.items()]
    print(harness.table(["seconds, in Chromium", "median", "worst", "times"], rows))
    harness.write_json(options.json, found)


if __name__ == "__main__":
    harness.run(main)
