"""What the benchmarks share: turns side by side, processes, servers, pictures, tables, JSON and a plot."""

import argparse
import contextlib
import importlib.metadata
import io
import json
import os
import platform
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODEL = "convmixer_256_8_cifar10"  # the shipped one
PATIENCE = 120  # seconds that a server may take to start


class Failure(Exception):
    """What keeps a measurement from going on, in one line."""


class Parser(argparse.ArgumentParser):
    """The command line of a benchmark; errors are one line. With ``rounds`` it has --rounds, and --json."""

    def __init__(self, doc: str, rounds: int = 0):
        super().__init__(description=doc.splitlines()[0])
        if rounds:
            self.add_argument("--rounds", type=at_least_one, default=rounds, help="turns of each contestant")
            self.add_argument("--json", type=in_a_folder, metavar="FILE", help="write every figure there, too")

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message} (see --help)\n")


def at_least_one(text: str) -> int:
    if not (text.isascii() and text.isdecimal()) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r:.50} is not a whole number above 0")
    return int(text)


def in_a_folder(text: str) -> Path:
    if not Path(text).absolute().parent.is_dir():  # said now, and not after half an hour
        raise argparse.ArgumentTypeError(f"there is no folder for {text}")
    return Path(text)


def run(main: Callable[[], object]) -> None:
    """Ends the process with what ``main`` gives, or with status 1 and a line that says why it did not go on."""
    try:
        sys.exit(main())
    except (Failure, OSError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")


class Process:
    """A contestant's process, which answers each line on its standard input with one of JSON, by `serve`."""

    def __init__(self, name: str, words: Iterable[object]):
        self.name, pipes = name, {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT, **pipes)

    def read(self):
        """The next answer. Raises Failure if the process has ended."""
        line = self.process.stdout.readline()
        if not line:
            raise Failure(f"{self.name} ended without an answer (exit status {self.process.wait()}); see above")
        return json.loads(line)

    def turn(self):
        print(file=self.process.stdin, flush=True)
        return self.read()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def serve(first: Callable[[], object], turn: Callable[[], object]) -> None:
    """The other end of a `Process`: answers what ``first`` gives, and for each line what ``turn`` gives."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is not taken for an answer
    print(json.dumps(first()), file=answers, flush=True)
    for _ in sys.stdin:
        print(json.dumps(turn()), file=answers, flush=True)


def take_turns(
    contestants: dict[str, Callable[[], object]], rounds: int, seconds: float = 1e9, pause: float = 0
) -> dict[str, list]:
    """What each contestant's call gives in each round; backwards in every second: nobody always follows the same.

    seconds: after which no further round begins, once there were three.
    """
    found, start = {name: [] for name in contestants}, time.monotonic()
    for number in range(rounds):
        if number >= 3 and time.monotonic() - start > seconds:
            break
        for name in list(contestants)[:: -1 if number % 2 else 1]:
            time.sleep(pause)
            found[name].append(contestants[name]())
    return found


class Server:
    """A server in processes of its own, ready when __init__ returns; {port} in a word becomes its port."""

    def __init__(self, name: str, words: Iterable[object], log: Path, page: str = "/health-check", **options):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.name, self.url, self.page, self.log = name, f"http://127.0.0.1:{self.port}", page, log
        path = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)])
        own = {"PORT": str(self.port), "PATH": path, "PYTHONPATH": str(ROOT), "no_proxy": "127.0.0.1"}
        options["env"] = os.environ | own | options.get("env", {})
        command = [sys.executable, *(str(word).format(port=self.port) for word in words)]
        start = time.perf_counter()
        with open(log, "wb") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True, **options)
        while not self._is_ready():
            if self.process.poll() is not None or time.perf_counter() - start > PATIENCE:
                self.close()
                raise Failure(f"{name} did not start: {log.read_text(errors='replace').strip()[-300:]}")
            time.sleep(0.003)
        self.start_seconds = time.perf_counter() - start

    def _is_ready(self) -> bool:
        with contextlib.suppress(OSError), urllib.request.urlopen(self.url + self.page, timeout=10) as answer:
            return self.page == "/" or json.load(answer)["status"] == "READY"
        return False

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def photograph(width: int, height: int, seed: int = 0) -> bytes:
    """A JPEG of clouds of colour, as noisy as a photograph."""
    import numpy as np
    from PIL import Image

    rng, stream = np.random.default_rng(seed), io.BytesIO()
    clouds = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    clouds = np.asarray(clouds.resize((width, height), Image.Resampling.BICUBIC), np.int16)
    noisy = clouds + rng.normal(0, 8, (height, width, 1)).astype(np.int16)
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=88)
    return stream.getvalue()


def memory(field: str, pid: int | str = "self") -> float | None:
    """VmRSS, what a process has in memory, or VmHWM, the most it ever had, in MB; None where Linux is not."""
    with contextlib.suppress(OSError):
        found = re.search(rf"{field}:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
        return found and int(found[1]) * 1024 / 1e6
    return None


def medians(turns: Iterable[Iterable[float]]) -> list[float]:
    """The median of each of the figures that every turn has."""
    return [statistics.median(column) for column in zip(*turns, strict=True)]


def machine() -> dict:
    """What the figures depend on: processor, cores, and versions of what is installed."""
    processor, versions = platform.processor() or platform.machine(), {"python": platform.python_version()}
    for package in ("torch", "timm", "onnxruntime", "openvino"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    with contextlib.suppress(OSError, TypeError):
        processor = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())[1]
    return {"processor": processor, "cores": os.cpu_count(), "versions": versions}


def print_machine() -> None:
    print(*(f"{name}: {value}" for name, value in machine().items()), sep="; ", flush=True)


def table(heads: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """Markdown; None is an empty cell, a float has three digits or all before the point."""
    heads = list(heads)
    lines = [f"| {' | '.join(map(cell, line))} |" for line in (heads, *rows)]
    return "\n".join([lines[0], "|---" * len(heads) + "|", *lines[1:]])


def cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:#.3g}"
    return "" if value is None else str(value)


def write_json(path: Path | None, result: object) -> None:
    if path:
        path.write_text(json.dumps({"machine": machine(), "result": result}, indent=1) + "\n")


def plot(path: Path | None, title: str, panels: dict[str, dict[str, float]]) -> None:
    """Bars as PNG: a panel each, in it a bar for each name; those of "ours" in another colour."""
    if not path:
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 2 + 2 * len(panels)), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left")
    for axes, (name, bars) in zip(figure.subplots(len(panels), squeeze=False).flat, panels.items(), strict=True):
        colours = ["tab:orange" if bar.startswith("ours") else "tab:blue" for bar in bars]
        axes.bar_label(axes.barh(list(bars), list(bars.values()), color=colours), fmt=" %.3g")
        axes.set_title(name, loc="left", fontsize=10)
    figure.savefig(path, format="png")
