"""What the benchmarks share: turns side by side, processes, servers, medians, tables, JSON and a plot."""

import contextlib
import importlib.metadata
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
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 120  # seconds that a server may take to start or to end
PACKAGES = ("torch", "timm", "onnxruntime", "openvino")


class Failure(Exception):
    """What keeps a measurement from going on, in one line."""


class Process:
    """A contestant's process, which answers each line on its standard input with a line of JSON."""

    def __init__(self, name: str, words: Iterable[object]):
        self.name = name
        command = [sys.executable, *map(str, words)]
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

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
        self.process.wait()
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()


def take_turns(
    contestants: dict[str, Callable[[], object]], rounds: int, seconds: float = 1e9, pause: float = 0
) -> dict:
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
        own = {"PORT": str(self.port), "PATH": path, "no_proxy": "127.0.0.1"}
        environment = os.environ | own | options.pop("env", {})
        start = time.perf_counter()
        with open(log, "wb") as output:
            streams = {"stdout": output, "stderr": output, "start_new_session": True}
            command = [sys.executable, *(str(word).format(port=self.port) for word in words)]
            self.process = subprocess.Popen(command, env=environment, **streams, **options)
        while not self._is_ready():
            if self.process.poll() is not None or time.perf_counter() - start > PATIENCE:
                self.close()
                lines = [*filter(None, map(str.strip, log.read_text(errors="replace").splitlines()))]
                raise Failure(f"{name} did not start: {lines[-1][:300] if lines else 'it said nothing'}")
            time.sleep(0.003)
        self.start_seconds = time.perf_counter() - start

    def _is_ready(self) -> bool:
        import urllib.request

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


def memory(field: str, pid: int | str = "self") -> float | None:
    """VmRSS, what a process has in memory, or VmHWM, the most it ever had, in MB; None where Linux is not."""
    with contextlib.suppress(OSError):
        found = re.search(rf"{field}:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
        return found and int(found[1]) * 1024 / 1e6
    return None


def session(leader: int) -> list[int]:
    """The processes that a server has started, itself included."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(file.read_text().rpartition(")")[2].split()[3]) == leader:
                found.append(int(file.parent.name))
    return found


def percentiles(values: Iterable[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {f"p{p}": ordered[min(len(ordered) - 1, len(ordered) * p // 100)] for p in (50, 95, 99)}


def median_of(values: Iterable[float | None]) -> float | None:
    """None as soon as one of them is."""
    values = list(values)
    return None if None in values else statistics.median(values)


def machine() -> dict:
    """What the figures depend on: processor, cores, and versions of what is installed."""
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    found = None
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    processor = found[1] if found else platform.processor() or platform.machine()
    return {"processor": processor, "cores": cores, "python": platform.python_version(), "versions": versions}


def print_machine() -> None:
    about = machine()
    versions = ", ".join(f"{package} {version}" for package, version in about["versions"].items())
    print(f"{about['processor']}, {about['cores']} cores; Python {about['python']}, {versions}", flush=True)


def table(heads: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """Markdown; None is an empty cell, a float has three digits or all before the point."""
    lines = [list(heads), *(map(cell, row) for row in rows)]
    text = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([text[0], "|---" * len(lines[0]) + "|", *text[1:]])


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

    from train.report.pictures import HELD_OUT, TRAIN

    figure = Figure(figsize=(8.5, 1 + sum(0.6 + 0.25 * len(bars) for bars in panels.values())), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left")
    for axes, (name, bars) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels.items(), strict=True):
        colours = [HELD_OUT if bar.startswith("ours") else TRAIN for bar in bars]
        axes.bar_label(axes.barh(list(bars), list(bars.values()), color=colours), fmt=" %.3g")
        axes.invert_yaxis()
        axes.set_title(name, loc="left", fontsize=10)
    figure.savefig(path, format="png")
