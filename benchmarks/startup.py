"""Time until the command line has answered and until the server is ready, against `import torch` alone, in one run.

    python benchmarks/startup.py [--rounds 9]

Whole processes that take turns; the figures are medians. "import ..." and the command line are measured from start to
exit. The server is `python -m serving` with the shipped model, from its start until /health-check says READY, asked
every few milliseconds; beside it stands Cog's server with a predictor that does nothing. Both are ended before the next
turn.
"""

import argparse
import contextlib
import json
import os
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
WEIGHTS = ROOT / "convmixer" / "assets" / f"{MODEL}.safetensors"
PATIENCE = 120  # seconds

ECHO = """
from cog import BaseRunner, Input

class Predictor(BaseRunner):
    def run(self, image: str = Input(description="Anything.")) -> str:
        return "the same"
"""

COMMANDS = {
    "import torch": ["-c", "import torch"],
    "command line": ["-m", "convmixer", "classify", "--sample", "--model", MODEL],
    "import timm": ["-c", "import timm"],
}
SERVERS = {
    "Cog, no model": ["-m", "cog.server.http", "--host", "127.0.0.1"],
    "server": ["-m", "serving"],
}


def until_exit(arguments: list[str]) -> float:
    """Seconds of a whole process."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def until_ready(arguments: list[str], folder: str) -> float:
    """Seconds from the start of a server in ``folder`` until it is ready for requests."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)])
    environment = os.environ | {
        "PORT": port,
        "PATH": path,
        "PYTHONPATH": str(ROOT) if arguments == SERVERS["server"] else "",
        "COG_PREDICT_TYPE_STUB": "predict.py:Predictor",
        "COG_WEIGHTS": str(WEIGHTS),
    }
    if arguments == SERVERS["server"]:
        arguments = [*arguments, "--port", port]
    start = time.perf_counter()
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen([sys.executable, *arguments], cwd=folder, env=environment, stdout=log, stderr=log)
        try:
            while status(port) != "READY":
                if server.poll() is not None or time.perf_counter() - start > PATIENCE:
                    log.seek(0)
                    sys.exit(f"startup.py: the server did not start:\n{log.read().decode(errors='replace')}")
                time.sleep(0.003)
            return time.perf_counter() - start
        finally:
            server.terminate()
            server.wait(PATIENCE)


def status(port: str) -> str:
    """What the server says of itself; "" while there is none."""
    address = f"http://127.0.0.1:{port}/health-check"
    with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=5) as answer:
        return json.load(answer)["status"]
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    times: dict[str, list[float]] = {name: [] for name in COMMANDS | SERVERS}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "predict.py").write_text(ECHO)
        for round_ in range(rounds + 1):  # the first unmeasured: files into the page cache, bytecode written
            for name in times:
                taken = until_exit(COMMANDS[name]) if name in COMMANDS else until_ready(SERVERS[name], folder)
                if round_:
                    times[name].append(taken)
    medians = {name: statistics.median(values) for name, values in times.items()}
    torch, cog = medians["import torch"], medians["Cog, no model"]
    print(f"{rounds} rounds\n{'':<14} {'seconds':>8} {'fastest':>8} {'slowest':>8}  above import torch")
    for name, values in times.items():
        line = f"{name:<14} {medians[name]:8.2f} {min(values):8.2f} {max(values):8.2f}"
        if name not in ("import torch", "Cog, no model"):
            line += f"  {medians[name] - torch:+.2f}"
        if name == "server":
            line += f"; above import torch and Cog's own start: {medians[name] - torch - cog:+.2f}"
        print(line)


if __name__ == "__main__":
    main()
