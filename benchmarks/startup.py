"""Time and memory until the first answer and until the servers are ready, against `import torch` alone, in one run.

    python benchmarks/startup.py [--rounds 9]

Whole processes that take turns; times are medians, memory is the largest resident size of any one process. Commands are
measured from start to exit, servers until /health-check says READY (Cog's) or the page is there (the demo). The models'
peers stand beside them: Cog's server with a predictor that does nothing, and what timm needs to be imported.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODEL = "convmixer_256_8_cifar10"
PATIENCE = 120  # seconds

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
    "Cog, no model": (["-m", "cog.server.http", "--host", "127.0.0.1"], "/health-check"),
    "server": (["-m", "serving"], "/health-check"),
    "demo": ([str(ROOT / "demo" / "app.py"), "--model", MODEL], "/"),
}


def until_exit(arguments: list[str]) -> tuple[float, float]:
    """Seconds and megabytes of a whole process."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"startup.py: {' '.join(arguments)} ended with status {process.returncode}")
    return time.perf_counter() - start, used.ru_maxrss / 1024


def until_ready(arguments: list[str], page: str, folder: str) -> tuple[float, float]:
    """Seconds from the start of a server in ``folder`` until it is ready, and megabytes of its largest process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)])
    environment = os.environ | {"PORT": port, "PATH": path, "COG_PREDICT_TYPE_STUB": "predict.py:Predictor"}
    if "cog.server.http" not in arguments:
        environment["PYTHONPATH"] = str(ROOT)
        arguments = [*arguments, "--port", port]
        environment["COG_WEIGHTS"] = str(ROOT / "convmixer" / "assets" / f"{MODEL}.safetensors")
    start = time.perf_counter()
    with tempfile.TemporaryFile() as log:
        options = {"cwd": folder, "env": environment, "stdout": log, "stderr": log, "start_new_session": True}
        server = subprocess.Popen([sys.executable, *arguments], **options)
        try:
            while not is_ready(port, page):
                if server.poll() is not None or time.perf_counter() - start > PATIENCE:
                    log.seek(0)
                    sys.exit(f"startup.py: the server did not start:\n{log.read().decode(errors='replace')}")
                time.sleep(0.003)
            return time.perf_counter() - start, max(map(megabytes, session(server.pid)))
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(PATIENCE)


def is_ready(port: str, page: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}{page}", timeout=5) as answer:
        return page == "/" or json.load(answer)["status"] == "READY"
    return False


def session(leader: int) -> list[int]:
    """The processes that a server has started, itself included."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if int((folder / "stat").read_text().rpartition(")")[2].split()[3]) == leader:
                found.append(int(folder.name))
    return found


def megabytes(pid: int) -> float:
    with contextlib.suppress(OSError):
        if found := re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text()):
            return int(found[1]) / 1024
    return 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in COMMANDS | SERVERS}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "predict.py").write_text(ECHO)
        for round_ in range(rounds + 1):  # the first unmeasured: files into the page cache, bytecode written
            for name in results:
                taken = until_exit(COMMANDS[name]) if name in COMMANDS else until_ready(*SERVERS[name], folder)
                if round_:
                    results[name].append(taken)
    seconds = {name: statistics.median(each for each, _ in rows) for name, rows in results.items()}
    print(f"{rounds} rounds\n{'':<31} {'seconds':>8} {'fastest':>8} {'slowest':>8} {'MB':>6}  import torch takes")
    for name, rows in results.items():
        times = [each for each, _ in rows]
        line = f"{name:<31} {seconds[name]:8.2f} {min(times):8.2f} {max(times):8.2f} {max(mb for _, mb in rows):6.0f}"
        print(f"{line}  {seconds['import torch'] / seconds[name]:5.1f} times as long")


if __name__ == "__main__":
    main()
