"""Time and memory until the first answer and until the servers are ready, against `import torch` alone, in one run.

    python benchmarks/startup.py [--rounds 9]

Whole processes that take turns; times are medians, memory is the largest resident size of any one process. Commands are
measured from start to exit, servers until /health-check says READY (Cog's) or the page is there (the demo). The models'
peers stand beside them: Cog's server with a predictor that does nothing, and what timm needs to be imported.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # the repository, so that `benchmarks` is found

from benchmarks.harness import Server, memory, print_machine, session, table, take_turns  # noqa: E402
from benchmarks.options import at_least_one  # noqa: E402

MODEL = "convmixer_256_8_cifar10"

ECHO = """
from cog import BaseRunner, Input

class Predictor(BaseRunner):
    def run(self, image: str = Input(description="Anything.")) -> str:
        return "the same"
"""

COMMANDS = {
    "import torch": ["-c", "import torch"],
    "classify": ["-m", "convmixer", "classify", "--sample", "--model", MODEL],
    "import numpy, PIL, safetensors": ["-c", "import numpy, PIL.Image, safetensors"],
    "import timm": ["-c", "import timm"],
}
SERVERS = {
    "Cog, no model": (["-m", "cog.server.http", "--host", "127.0.0.1"], "/health-check", {}),
    "server": (["-m", "serving", "--port", "{port}"], "/health-check", {"PYTHONPATH": str(ROOT)}),
    "demo": ([ROOT / "demo" / "app.py", "--model", MODEL, "--port", "{port}"], "/", {"PYTHONPATH": str(ROOT)}),
}


def until_exit(words: list[str]) -> tuple[float, float]:
    """Seconds and megabytes of a whole process."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"startup.py: {' '.join(words)} ended with status {process.returncode}")
    return time.perf_counter() - start, used.ru_maxrss * 1024 / 1e6


def until_ready(name: str, folder: Path) -> tuple[float, float]:
    """Seconds from the start of a server in ``folder`` until it is ready, and megabytes of its largest process."""
    words, page, environment = SERVERS[name]
    environment |= {"COG_PREDICT_TYPE_STUB": "predict.py:Predictor"}
    environment |= {"COG_WEIGHTS": str(ROOT / "convmixer" / "assets" / f"{MODEL}.safetensors")}
    server = Server(name, words, folder / "log", page, cwd=folder, env=environment)
    try:
        return server.start_seconds, max(memory("VmHWM", pid) or 0 for pid in session(server.process.pid))
    finally:
        server.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=at_least_one, default=9)
    rounds = parser.parse_args().rounds
    print_machine()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "predict.py").write_text(ECHO)
        contestants = {name: partial(until_exit, words) for name, words in COMMANDS.items()}
        contestants |= {name: partial(until_ready, name, Path(folder)) for name in SERVERS}
        found = take_turns(contestants, rounds + 1)
    rows, torch = [], None
    for name, turns in found.items():
        times, sizes = zip(*turns[1:], strict=True)  # the first: files into the page cache, bytecode written
        torch = torch or statistics.median(times)
        rows.append(
            [name, statistics.median(times), min(times), max(times), max(sizes), torch / statistics.median(times)]
        )
    print(f"{rounds} rounds\n" + table(["", "seconds", "fastest", "slowest", "MB", "import torch takes x"], rows))


if __name__ == "__main__":
    main()
