"""The demo under measurement: its page in a real browser, its API under many clients at once, and a floor for both.

    python benchmarks/demo.py [--clients 50] [--requests 2000] [--only page clicks load queue] [--json FILE]

Starts `python demo/app.py` with the shipped model as a process of its own, and beside it an app of Gradio alone that
takes the same uploads and answers with a constant: what it costs is not ours to save. The clients' rounds alternate
between the two, and the figures are medians over the rounds. Every answer is compared with what the classifier gives
when it is asked directly. The parts page and clicks need playwright and Chromium (CONVMIXER_CHROMIUM, or on the PATH).
"""

import argparse
import contextlib
import io
import itertools
import json
import os
import re
import secrets
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException, HTTPResponse
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # the repository, so that `demo` and `convmixer` are found

PARTS = ("page", "clicks", "load", "queue")
PICTURES = 4  # of each client, its own
TOP_K = 10  # all classes of the shipped model, so that the whole vector of scores is compared
TOLERANCE = 1e-5  # between two scores; the same picture gives the same one, but for the order of a few sums
APART = 1e-3  # at least, the largest difference between two pictures' scores: a mistaken one would be noticed
ROUNDS = 5
UNTIL_UP = 120  # seconds that a server may take to start
CHROMIUM = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
MODEL = "convmixer_256_8_cifar10"


class Failure(Exception):
    """What keeps the measurement from going on, in one line."""


# Servers


class Server:
    """A web server in a process of its own, with a folder of its own for uploads."""

    def __init__(self, *words: object, log: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uploads, self.log = log.with_suffix(".uploads"), log
        environment = os.environ | {"GRADIO_TEMP_DIR": str(self.uploads), "GRADIO_ANALYTICS_ENABLED": "False"}
        command = [sys.executable, *map(str, words), "--port", str(self.port)]
        start = time.perf_counter()
        with open(log, "w") as output:
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)
        while not self._answers():
            if self.process.poll() is not None or time.perf_counter() - start > UNTIL_UP:
                self.close()
                lines = [*filter(None, map(str.strip, log.read_text().splitlines()))]
                raise Failure(f"{words[0]} did not start: {lines[-1] if lines else 'it said nothing'}")
            time.sleep(0.01)
        self.start_seconds = time.perf_counter() - start
        config = Client(self).get("/config")
        self.functions = {event["api_name"]: event["id"] for event in config["dependencies"]}

    def _answers(self) -> bool:
        try:
            Client(self).request("GET", "/").read()
        except (OSError, HTTPException):
            return False
        return True

    def state(self) -> dict[str, float]:
        """What the process holds: resident memory in MB, threads, open files, and files among its uploads."""
        if self.process.poll() is not None:
            raise Failure(f"a server ended with code {self.process.returncode}: {self.log.read_text()[-300:]!r}")
        files = sum(path.is_file() for path in self.uploads.rglob("*"))
        proc = Path(f"/proc/{self.process.pid}")
        if not proc.exists():  # not Linux
            return {"uploads": files}
        said = dict(re.findall(r"^(VmRSS|Threads):\s+(\d+)", (proc / "status").read_text(), re.MULTILINE))
        descriptors = len(list((proc / "fd").iterdir()))
        return {
            "MB": int(said["VmRSS"]) / 1024,
            "threads": int(said["Threads"]),
            "open files": descriptors,
            "uploads": files,
        }

    def complaints(self) -> int:
        """Tracebacks that the server printed."""
        return self.log.read_text().count("Traceback")

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def serve_constant(port: int) -> None:
    """The floor: Gradio alone, with the same inputs, the same queue, and an answer of the same size."""
    import gradio as gr

    from demo.app import QUEUE

    rows = [{"label": "label", "index": index, "score": index / 37} for index in range(TOP_K)]
    answer = {"model": MODEL, "predictions": rows, "seconds": 0.0}
    with gr.Blocks(analytics_enabled=False) as page:
        inputs, output = [gr.File(), gr.Textbox(), gr.Number()], gr.JSON()
        options = {"api_name": "classify", "concurrency_limit": 1, "preprocess": False}  # which would copy the file
        gr.Button().click(lambda file, model, top_k: answer, inputs, output, **options)
    page.queue(max_size=QUEUE).launch(server_name="127.0.0.1", server_port=port, ssr_mode=False, quiet=True)


# Clients of the API


@dataclass(frozen=True)
class Picture:
    """A picture file, and the right answer about it: the score of each class."""

    content: bytes
    scores: list[float]


@dataclass
class Outcome:
    """What one request came to."""

    seconds: float
    rows: list[dict] | None = None  # predictions
    error: str = ""
    refused: bool = False  # because the queue was full
    places: list[int] = field(default_factory=list)  # in the queue, as the client was told them


class Client:
    """Speaks to a server as Gradio's own clients do, with less work: upload, join the queue, read the events."""

    def __init__(self, server: Server):
        self.server, self.session = server, secrets.token_hex(6)
        self.http = HTTPConnection("127.0.0.1", server.port, timeout=120)

    def request(self, method: str, path: str, body: bytes | None = None, kind: str = "") -> HTTPResponse:
        self.http.request(method, path, body, {"Content-Type": kind} if kind else {})
        return self.http.getresponse()

    def get(self, path: str) -> dict:
        return json.loads(self.request("GET", path).read())

    def upload(self, content: bytes) -> str:
        """Gives the path of the upload on the server."""
        head = b'--limit\r\nContent-Disposition: form-data; name="files"; filename="picture.jpg"\r\n'
        body = head + b"Content-Type: image/jpeg\r\n\r\n" + content + b"\r\n--limit--\r\n"
        response = self.request("POST", "/gradio_api/upload", body, "multipart/form-data; boundary=limit")
        return json.loads(response.read())[0]

    def join(self, path: str) -> str:
        """Asks /classify about an upload; gives the server's reason if it refuses."""
        file = {"path": path, "meta": {"_type": "gradio.FileData"}}
        event = {"data": [file, "auto", TOP_K], "fn_index": self.server.functions["classify"]}
        body = json.dumps(event | {"session_hash": self.session}).encode()
        response = self.request("POST", "/gradio_api/queue/join", body, "application/json")
        text = response.read().decode()
        return "" if response.status == 200 else f"{response.status} {text}"

    def events(self) -> Iterator[dict]:
        """What the server says about this client's request, until it closes the stream."""
        response = self.request("GET", f"/gradio_api/queue/data?session_hash={self.session}")
        for line in iter(response.readline, b""):
            if line.startswith(b"data: "):
                yield json.loads(line[6:])

    def ask(self, content: bytes, before: Callable[[], object] = lambda: None) -> Outcome:
        """before: called between the upload and the question."""
        start = time.perf_counter()
        outcome = Outcome(0)
        try:
            path = self.upload(content)
            before()
            if refusal := self.join(path):
                outcome.error, outcome.refused = refusal, refusal.startswith("503")
            for event in () if refusal else self.events():
                if event["msg"] == "estimation":
                    outcome.places.append(event["rank"])
                elif event["msg"] == "process_completed" and event["success"]:
                    outcome.rows = event["output"]["data"][0]["predictions"]
                elif event["msg"] in ("process_completed", "unexpected_error"):
                    outcome.error = str(event.get("output") or event["message"])
            if outcome.rows is None and not outcome.error:
                outcome.error = "no answer"
        except (OSError, HTTPException, ValueError) as error:
            outcome.error = f"{type(error).__name__}: {error}"
            self.http.close()
        outcome.seconds = time.perf_counter() - start
        return outcome


def draw_pictures() -> Iterator[bytes]:
    """JPEG files of 480 x 360 pixels without end: the demo's examples under clouds of colour."""
    import numpy as np
    from PIL import Image

    from demo.drawings import draw_examples

    rng = np.random.default_rng(0)
    for example in itertools.cycle(draw_examples().values()):
        clouds = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
        clouds = clouds.resize(example.size, Image.Resampling.BICUBIC)
        turned = example.rotate(float(rng.uniform(-40, 40)))
        yield jpeg(Image.blend(turned, clouds, float(rng.uniform(0.2, 0.8))))


def jpeg(picture) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=88)
    return stream.getvalue()


def pictures_with_answers(number: int) -> list[Picture]:
    """Pictures that are told apart by their right answers, which the classifier gives without any server."""
    from convmixer import Classifier

    classifier, pictures = Classifier(MODEL), []
    for content in draw_pictures():  # one at a time, as the demo does
        picture = Picture(content, classifier.scores([content])[0].tolist())
        if all(largest_difference(picture.scores, other.scores) > APART for other in pictures):
            pictures.append(picture)
        if len(pictures) == number:
            return pictures


def largest_difference(one: list[float], two: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, two, strict=True))


def is_right(rows: list[dict], picture: Picture) -> bool:
    """Every class once, the best first, each with the score that it should have."""
    given = {row["index"]: row["score"] for row in rows}
    falling = all(one["score"] >= two["score"] for one, two in itertools.pairwise(rows))
    complete = len(rows) == len(given) == len(picture.scores)
    right = [given.get(index, -1) for index in range(len(picture.scores))]
    return falling and complete and largest_difference(right, picture.scores) <= TOLERANCE


# The parts


def run_load(ours: Server, floor: Server, pictures: list[Picture], clients: int, requests: int) -> dict:
    """All clients at once, each asking one question after the other, in rounds that alternate between the servers."""
    servers = {"ours": ours, "floor": floor}
    groups = {name: [Client(server) for _ in range(clients)] for name, server in servers.items()}
    outcomes, rates, before = {"ours": [], "floor": []}, {"ours": [], "floor": []}, {}
    memory, wrong, told = {"ours": [], "floor": []}, 0, set()
    marks = {200, *range(1000, requests, 1000)} - {requests}
    for name, server in servers.items():
        groups[name][0].ask(pictures[0].content)  # whatever is done only once
        before[name] = server.state()
        memory[name].append((0, before[name].get("MB")))
    for number, name in itertools.product(range(ROUNDS), servers):
        shares = split(split(requests, ROUNDS)[number], clients)
        lock = threading.Lock()

        def work(index: int, name: str = name, number: int = number, shares: list[int] = shares, lock=lock) -> None:
            nonlocal wrong
            client = groups[name][index]
            client.http.close()  # the server has closed it, for it was idle
            for step in range(shares[index]):
                picture = pictures[PICTURES * index + (number + step) % PICTURES]
                outcome = client.ask(picture.content)
                with lock:
                    outcomes[name].append(outcome)
                    if name == "ours":
                        wrong += outcome.rows is not None and not is_right(outcome.rows, picture)
                        told.update([index] if any(outcome.places) else [])
                    if len(outcomes[name]) in marks:
                        memory[name].append((len(outcomes[name]), servers[name].state().get("MB")))

        start = time.perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            list(pool.map(work, range(clients)))
        rates[name].append(sum(shares) / (time.perf_counter() - start))
    result = {}
    for name, server in servers.items():
        seconds = sorted(outcome.seconds for outcome in outcomes[name])
        after = server.state()
        memory[name].append((len(seconds), after.get("MB")))
        result[name] = {
            "requests": len(seconds),
            "requests/s": statistics.median(rates[name]),
            "requests/s of each round": rates[name],
            **{f"p{p}": seconds[min(len(seconds) - 1, len(seconds) * p // 100)] for p in (50, 95, 99)},
            "errors": Counter(outcome.error for outcome in outcomes[name] if outcome.error),
            "MB": memory[name],
            "before": before[name],
            "after": after,
        }
    result["ours"] |= {"wrong": wrong, "told": len(told)}
    return result


def split(total: int, parts: int) -> list[int]:
    """A number as a sum of ``parts`` numbers that are as equal as can be."""
    return [total // parts + (index < total % parts) for index in range(parts)]


def run_queue(server: Server, pictures: list[Picture]) -> dict:
    """Twice as many questions at the same moment as may wait, and afterwards those that were refused once more."""
    from demo.app import QUEUE

    number = 2 * QUEUE
    before, start = server.state(), threading.Barrier(number)
    asked = [pictures[index % len(pictures)] for index in range(number)]

    def burst(picture: Picture) -> Outcome:
        return Client(server).ask(picture.content, lambda: start.wait(60))

    with ThreadPoolExecutor(number) as pool:
        first = list(pool.map(burst, asked))
    again = [picture for picture, outcome in zip(asked, first, strict=True) if outcome.error]
    second = [Client(server).ask(picture.content) for picture in again]
    answered = [*zip(asked, first, strict=True), *zip(again, second, strict=True)]
    wrong = sum(outcome.rows is not None and not is_right(outcome.rows, picture) for picture, outcome in answered)
    return {
        "questions": number,
        "limit": QUEUE,
        "answered": sum(outcome.rows is not None for outcome in first),
        "refused": sum(outcome.refused for outcome in first),
        "refusal": next((outcome.error for outcome in first if outcome.refused), ""),
        "errors": Counter(outcome.error for outcome in first if outcome.error and not outcome.refused),
        "answered afterwards": sum(outcome.rows is not None for outcome in second),
        "wrong": wrong,
        "before": before,
        "after": server.state(),
    }


# In the browser

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
    const picture = document.querySelector("#stage .picture"), layer = document.querySelector("#stage .layer.on");
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
    await Promise.all(shown(name).map((image) => image.decode()));
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
    const layer = [...document.querySelectorAll("#stage .layer.on")].find((one) => one.checkVisibility());
    if (layer?.dataset.index !== bar.dataset.index) throw new Error("the bar shows no heat map");
    await layer.decode();
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


def draw_photograph(width: int) -> bytes:
    """A JPEG in the format 4:3 with detail and noise, about as large as a camera's."""
    import numpy as np
    from PIL import Image

    rng, height = np.random.default_rng(0), width * 3 // 4
    coarse = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8))
    picture = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.int16)
    return jpeg(Image.fromarray((picture + rng.integers(-8, 9, (height, width, 1))).clip(0, 255).astype(np.uint8)))


# The table


def row(name: str, *cells: object) -> None:
    print(f"{name:<44} {' '.join(f'{cell:>12}' for cell in cells)}")


def ms(seconds: float) -> str:
    return f"{1000 * seconds:,.0f} ms"


def times_row(name: str, values: list[float]) -> None:
    row(name, ms(statistics.median(values)), ms(max(values)), len(values))


def print_browser(result: dict) -> None:
    if result.keys() & {"page", "clicks"}:
        row("in Chromium", "median", "worst", "times")
    if page := result.get("page"):
        times_row("fresh page: first bar visible", page["bar"])
        times_row("fresh page: examples react", page["usable"])
    if clicks := result.get("clicks"):
        each = clicks["clicks"]
        times_row("click on an example: answer visible", [click["seconds"] for click in each])
        for name, value in parts_of_a_click(each).items():
            print(f"    {name:<40} {value:>12}")
        for name, uploads in clicks["uploads"].items():
            size = f"{uploads[0]['bytes'] / 1e6:.1f} MB"
            times_row(f"upload of {name}, {size}: answer visible", [one["seconds"] for one in uploads])
            inner = ms(statistics.median(one["network"] for one in uploads))
            print(f"    {'of which decoding and network':<40} {inner:>12}")
        times_row("click on a bar: heat map visible", clicks["bars"])


def parts_of_a_click(clicks: list[dict]) -> dict[str, str]:
    """Where the median click's time goes, as far as it can be told from outside."""

    def median(value: Callable[[dict], float]) -> float:
        return statistics.median(map(value, clicks))

    parts = {"of which decoding and network": ms(median(lambda click: click["network"]))}
    if clicks := [click for click in clicks if click["join"] and click["data"]]:
        parts |= {
            "click to request": f"{median(lambda click: click['join'][0]):.0f} ms",
            "request (queue/join)": f"{median(lambda click: click['join'][1] - click['join'][0]):.0f} ms",
            "answer (queue/data)": f"{median(lambda click: click['data'][1] - click['data'][0]):.0f} ms",
            "answer complete to visible": f"{median(lambda click: 1000 * click['seconds'] - click['data'][1]):.0f} ms",
            "size of the answer": f"{median(lambda click: click['data'][2]) / 1000:,.0f} kB",
        }
    return parts


def print_load(load: dict, clients: int) -> None:
    both = [load["ours"], load["floor"]]
    row(f"{clients} clients at once", "demo", "Gradio alone")
    row("requests", *(f"{one['requests']:,}" for one in both))
    row("wrong answers", load["ours"]["wrong"], "")
    row("errors", *(sum(one["errors"].values()) for one in both))
    row(f"requests a second, median of {ROUNDS} rounds", *(f"{one['requests/s']:.1f}" for one in both))
    for name in ("p50", "p95", "p99"):
        row(f"seconds from upload to answer, {name}", *(f"{one[name]:.2f}" for one in both))
    row("clients that were told their place in the queue", load["ours"]["told"], "")
    counts = [count for count, _ in load["ours"]["MB"]]
    for index, count in enumerate(counts):
        memory = [one["MB"][index][1] for one in both]
        row(f"memory after {count:,} requests, MB", *("" if value is None else f"{value:.0f}" for value in memory))
    for what in ("threads", "open files", "uploads"):
        row(f"{what} before and after", *(f"{o['before'].get(what)} {o['after'].get(what)}" for o in both))
    for error, count in (both[0]["errors"] + both[1]["errors"]).most_common(3):
        print(f"{count} x {error[:200]}")


def print_queue(queue: dict) -> None:
    row(f"{queue['questions']} questions at once, {queue['limit']} may wait", "")
    row("answered", queue["answered"])
    row("refused at once", queue["refused"])
    row("other errors", sum(queue["errors"].values()))
    row("refused ones that were answered afterwards", queue["answered afterwards"])
    row("wrong answers", queue["wrong"])
    print(f"A refused client is told: {queue['refusal']}")
    for error, count in queue["errors"].most_common(3):
        print(f"{count} x {error[:200]}")


def measure(options: argparse.Namespace, folder: Path) -> dict:
    """All parts that were asked for."""
    parts, result = options.only or PARTS, {}
    wants_clients = {"load", "queue"} & {*parts}
    pictures = pictures_with_answers(PICTURES * options.clients) if wants_clients else []
    with contextlib.ExitStack() as stack:

        def start(name: str, *words: object) -> Server:
            server = Server(*words, log=folder / f"{name}.log")
            stack.callback(server.close)
            return server

        ours = start("demo", "demo/app.py", "--model", MODEL)
        row("", "seconds")
        row("start of the server until it answers", f"{ours.start_seconds:.1f}")
        result["start"] = ours.start_seconds
        if {"page", "clicks"} & {*parts}:
            with open_browser() as browser:
                if browser is None:
                    print("page and clicks are left out: they need playwright and Chromium (CONVMIXER_CHROMIUM=FILE)")
                if browser and "page" in parts:
                    result["page"] = run_page(browser, ours)
                if browser and "clicks" in parts:
                    result["clicks"] = run_clicks(browser, ours, folder)
            print_browser(result)
        if "load" in parts:
            floor = start("floor", __file__, "--constant")
            result["load"] = run_load(ours, floor, pictures, options.clients, options.requests)
            print_load(result["load"], options.clients)
        if "queue" in parts:
            result["queue"] = run_queue(ours, pictures)
            print_queue(result["queue"])
        result["tracebacks"] = ours.complaints()
        row("tracebacks that the server printed", result["tracebacks"])
    return result


def at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=at_least_one, default=50)
    parser.add_argument("--requests", type=at_least_one, default=2000, help="of all clients together")
    parser.add_argument("--only", nargs="+", choices=PARTS, help="some of the parts")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there, too")
    parser.add_argument("--constant", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.json and not options.json.absolute().parent.is_dir():  # said now, and not after three minutes
        parser.error(f"there is no folder for {options.json}")
    if options.constant:
        serve_constant(options.port)
        return 0
    try:
        with tempfile.TemporaryDirectory() as folder:
            result = measure(options, Path(folder))
        if options.json:
            options.json.write_text(json.dumps(result, indent=1))
    except (Failure, OSError) as error:
        print(f"benchmarks/demo.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
