"""The demo under measurement: its page in a real browser, its API under many clients at once, and a floor for both.

    python benchmarks/demo.py [--clients 50] [--requests 2000] [--only page clicks camera load queue] [--json FILE]

Starts `python demo/app.py` with the shipped model as a process of its own, and beside it an app of Gradio alone that
takes the same uploads and answers with a constant: what it costs is not ours to save. The clients' rounds alternate
between the two, and the figures are medians over the rounds. Every answer is compared with what the classifier gives
when it is asked directly. The parts page, clicks and camera need playwright and
Chromium (CONVMIXER_CHROMIUM, or on the PATH).
"""

import argparse
import contextlib
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # the repository, so that `demo` and `benchmarks` are found

from benchmarks.demo_browser import open_browser, run_camera, run_clicks, run_page  # noqa: E402
from benchmarks.demo_load import PICTURES, ROUNDS, pictures_with_answers, run_load, run_queue  # noqa: E402
from benchmarks.demo_server import MODEL, Server, serve_constant  # noqa: E402
from benchmarks.harness import Failure, write_json  # noqa: E402
from benchmarks.options import at_least_one, in_a_folder  # noqa: E402

PARTS = ("page", "clicks", "camera", "load", "queue")


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
    if camera := result.get("camera"):
        row("camera: answers a second", f"{camera['answers/s']:.1f}")


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
        if {"page", "clicks", "camera"} & {*parts}:
            with open_browser() as browser:
                if browser is None:
                    print("page, clicks, camera are left out: they need playwright, Chromium (CONVMIXER_CHROMIUM=FILE)")
                if browser and "page" in parts:
                    result["page"] = run_page(browser, ours)
                if browser and "clicks" in parts:
                    result["clicks"] = run_clicks(browser, ours, folder)
                if browser and "camera" in parts:
                    result["camera"] = run_camera(browser, ours)
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=at_least_one, default=50)
    parser.add_argument("--requests", type=at_least_one, default=2000, help="of all clients together")
    parser.add_argument("--only", nargs="+", choices=PARTS, help="some of the parts")
    parser.add_argument("--json", type=in_a_folder, metavar="FILE", help="write every figure there, too")
    parser.add_argument("--constant", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.constant:
        serve_constant(options.port)
        return 0
    try:
        with tempfile.TemporaryDirectory() as folder:
            result = measure(options, Path(folder))
        write_json(options.json, result)
    except (Failure, OSError) as error:
        print(f"benchmarks/demo.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
