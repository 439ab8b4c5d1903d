"""The servers that benchmarks/server.py measures: this project's, and echoes of it without a model."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
UNTIL_READY = 120  # seconds that a server may take to start

# The same inputs, checked against the same description. Nobody looks at the picture, which Cog decodes into a file as
# for every predictor with a Path.
ECHO = """
import sys
sys.path.insert(0, {root!r})
from cog import BaseRunner, Input, Path
from predict import MODELS, Output, Prediction


class Predictor(BaseRunner):
    async def run(
        self,
        image: Path = Input(description="The picture", accept="image/*"),
        model: str = Input(description="The model", default="auto", choices=MODELS),
        top_k: int = Input(description="How many classes", default=5, ge=1, le=100),
        heatmap: bool = Input(description="Also a heat map", default=False),
    ) -> Output:
        ranked = [Prediction(label=f"label {{index}}", index=index, score=index / 37) for index in range(top_k)]
        return Output(model="echo", engine="none", precision="none", predictions=ranked, heatmap=None)
"""


class Failure(Exception):
    """What keeps the measurement from going on, in one line."""


class CogServer:
    """One of Cog's servers with a worker, in processes of its own; started here, ready when __init__ returns."""

    def __init__(self, name: str, command: list[object], folder: Path, log: Path, **environment: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.name, self.url, self.log = name, f"http://127.0.0.1:{self.port}", log
        command = [sys.executable, *(str(word).format(port=self.port) for word in command)]
        path = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)])
        own = {"PORT": str(self.port), "PATH": path, "no_proxy": "127.0.0.1"}
        with open(log, "wb") as output:
            self.process = subprocess.Popen(
                command,
                cwd=folder,
                env=os.environ | own | environment,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self.close()
            raise

    def _wait_until_ready(self) -> None:
        end = time.monotonic() + UNTIL_READY
        while (status := self._status()) != "READY":
            if status == "SETUP_FAILED" or self.process.poll() is not None or time.monotonic() > end:
                lines = [*filter(None, map(str.strip, self.log.read_text().splitlines()))]
                raise Failure(
                    f"{self.name} did not start ({status}): {lines[-1][:300] if lines else 'it said nothing'}"
                )
            time.sleep(0.01)

    def _status(self) -> str:
        try:
            with urllib.request.urlopen(f"{self.url}/health-check", timeout=10) as response:
                return json.load(response)["status"]
        except (OSError, ValueError):
            return "DOWN"

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def start_ours(folder: Path, slots: int) -> CogServer:
    """`python -m serving` with the shipped model."""
    command = ["-m", "serving", "--port", "{port}", "--slots", slots]
    name = f"serving, {slots} slots" if slots > 1 else "serving, 1 slot"
    # No other model is to be found, whatever this machine has.
    weights = {"COG_WEIGHTS": "", "CONVMIXER_CACHE": str(folder)}
    return CogServer(name, command, folder, folder / f"{name}.log", PYTHONPATH=str(ROOT), **weights)


def start_echo(folder: Path, slots: int) -> CogServer:
    """Cog's server, with as many slots, around a predictor that returns a constant."""
    sys.path.insert(0, str(ROOT))
    from serving.__main__ import write_schema

    home = folder / f"echo-{slots}"
    home.mkdir()
    write_schema(home / ".cog" / "openapi_schema.json")
    (home / "echo.py").write_text(ECHO.format(root=str(ROOT)))
    environment = {"COG_PREDICT_TYPE_STUB": "echo.py:Predictor", "COG_MAX_CONCURRENCY": str(slots)}
    command = ["-m", "cog.server.http", "--host", "127.0.0.1"]
    name = f"echo, {slots} slots" if slots > 1 else "echo, 1 slot"
    return CogServer(name, command, home, folder / f"{name}.log", **environment)
