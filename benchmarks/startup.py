"""Time and memory until the first answer and until the servers are ready, against `import torch` alone, in one run.

    python benchmarks/startup.py [--rounds 9] [--json FILE]

Whole processes that take turns; the figures are medians, memory is the largest resident size of any one process.
Commands are measured from start to exit, servers until /health-check says READY, the demo until its page is there.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, so that the rest is found

from benchmarks import harness
from benchmarks.harness import MODEL, ROOT, Failure, Server

EMPTY = """
from cog import BaseRunner, Input

class Predictor(BaseRunner):
    def run(self, image: str = Input(description="Anything.")) -> str:
        return "the same"
"""
COMMANDS = {
    "import torch": ["-c", "import torch"],
    "import timm": ["-c", "import timm"],
    "import numpy, PIL, safetensors": ["-c", "import numpy, PIL.Image, safetensors"],
    "classify": ["-m", "convmixer", "classify", "--sample", "--model", MODEL],
}
SERVERS = {
    "Cog, no model": (["-m", "cog.server.http", "--host", "127.0.0.1"], "/health-check"),
    "server": (["-m", "serving", "--port", "{port}"], "/health-check"),
    "demo": ([ROOT / "demo" / "app.py", "--model", MODEL, "--port", "{port}"], "/"),
}


def until_exit(words: list[str]) -> tuple[float, float]:
    """Seconds and megabytes of a whole process."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise Failure(f"{' '.join(words)} ended with status {process.returncode}")
    return time.perf_counter() - start, used.ru_maxrss * 1024 / 1e6


def until_ready(name: str, folder: Path) -> tuple[float, float]:
    """Seconds from the start of a server in ``folder`` until it is ready, and megabytes of its largest process."""
    words, page = SERVERS[name]
    weights = str(ROOT / "convmixer" / "assets" / f"{MODEL}.safetensors")
    environment = {"COG_PREDICT_TYPE_STUB": "predict.py:Predictor", "COG_WEIGHTS": weights}
    server = Server(name, words, folder / "log", page, cwd=folder, env=environment)
    try:
        return server.start_seconds, max(harness.memory("VmHWM", pid) or 0 for pid in session(server.process.pid))
    finally:
        server.close()


def session(leader: int) -> list[int]:
    """The processes that a server has started, itself included."""
    found = [leader]
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(file.read_text().rpartition(")")[2].split()[3]) == leader:
                found.append(int(file.parent.name))
    return found


def main() -> None:
    options = harness.Parser(__doc__, rounds=9).parse_args()
    harness.print_machine()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "predict.py").write_text(EMPTY)
        contestants = {name: partial(until_exit, words) for name, words in COMMANDS.items()}
        contestants |= {name: partial(until_ready, name, Path(folder)) for name in SERVERS}
        found = harness.take_turns(contestants, options.rounds + 1)
    # Without the first turn: files come into the page cache, bytecode is written.
    rows = [[name, *harness.medians(turns[1:])] for name, turns in found.items()]
    print(f"medians of {options.rounds} rounds\n" + harness.table(["", "seconds", "MB"], rows))
    harness.write_json(options.json, found)


if __name__ == "__main__":
    harness.run(main)
