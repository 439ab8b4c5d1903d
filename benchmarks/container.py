"""The containers that `make container` builds: size, time until READY, memory, and time to stop.

    python benchmarks/container.py convmixer-cpu convmixer [--rounds 9] [--weights FILE] [--json FILE]

Each image is started and stopped --rounds times, in turn with the others; the figures are medians. READY is what
/health-check says, asked every few milliseconds, from `docker run` on; Docker's part of it is until that has returned.
The memory is what `docker stats` counts once a picture of 480 x 360 pixels has been answered twenty times. --weights
takes the place of the default model's weights, for images that were built without a network.
"""

import argparse
import contextlib
import http.client
import io
import json
import re
import statistics
import subprocess
import sys
import time
import urllib.request
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # the repository, so that `docs` and `convmixer` are found

from benchmarks.harness import table, take_turns, write_json  # noqa: E402
from benchmarks.options import at_least_one, in_a_folder  # noqa: E402
from convmixer.sample import draw_sample  # noqa: E402
from docs.client import classify  # noqa: E402

PATIENCE = 120  # seconds
REQUESTS = 20
MEDIANS = ("ready_s", "docker_s", "memory", "stop_s")
UNITS = {"kiB": 2**10, "MiB": 2**20, "GiB": 2**30}
WEIGHTS = "/opt/convmixer/convmixer_768_32.safetensors"
# What an image holds, by where it is.
PARTS = {
    "CUDA from PyPI": "nvidia triton",
    "PyTorch": "torch torchgen functorch sympy mpmath networkx",
    "NumPy and Pillow": "numpy numpy.libs PIL pillow.libs safetensors",
    "Cog's server": "cog coglet yaml requests urllib3 structlog",
}


def docker(*words: object) -> str:
    return subprocess.run(["docker", *map(str, words)], check=True, capture_output=True, text=True).stdout.strip()


class Container:
    """One container, removed at the end. options: those of `docker run`."""

    def __init__(self, image: str, *options: object):
        self.start = time.perf_counter()
        self.id = docker("run", "--detach", "--publish", "127.0.0.1::5000", *options, image)
        self.docker_s = time.perf_counter() - self.start
        with contextlib.suppress(subprocess.CalledProcessError):  # without a network it has no port
            self.address = f"http://{docker('port', self.id, 5000).splitlines()[0]}"

    def __enter__(self) -> "Container":
        return self

    def __exit__(self, *exception) -> None:
        docker("rm", "--force", self.id)

    def health(self) -> dict:
        with urllib.request.urlopen(f"{self.address}/health-check", timeout=PATIENCE) as response:
            return json.load(response)

    def wait(self) -> float:
        """Seconds since `docker run` until it is ready for requests. Raises RuntimeError if it never is."""
        while time.perf_counter() < self.start + PATIENCE:
            with contextlib.suppress(OSError, http.client.HTTPException):  # nobody is there yet
                health = self.health()
                if health["status"] == "READY":
                    return time.perf_counter() - self.start
                if health["status"] == "SETUP_FAILED":
                    break
            time.sleep(0.005)
        raise RuntimeError(f"the container is not ready: {self.logs()[-2000:]}")

    def ask(self, picture: bytes, **inputs) -> dict:
        return classify(picture, self.address, **inputs)

    def logs(self) -> str:
        done = subprocess.run(["docker", "logs", self.id], capture_output=True, text=True, check=False)
        return done.stdout + done.stderr

    def memory(self) -> int:
        """Bytes."""
        used = docker("stats", "--no-stream", "--format", "{{.MemUsage}}", self.id)
        number, unit = re.match(r"([\d.]+)(\w+)", used).groups()
        return round(float(number) * UNITS[unit])

    def stop(self) -> tuple[float, int]:
        """Seconds, and the exit status."""
        start = time.perf_counter()
        docker("stop", "--time", PATIENCE, self.id)
        seconds = time.perf_counter() - start
        return seconds, int(docker("inspect", "--format", "{{.State.ExitCode}}", self.id))


def sample() -> bytes:
    stream = io.BytesIO()
    draw_sample().save(stream, "PNG")
    return stream.getvalue()


def image_size(image: str) -> int:
    return int(docker("image", "inspect", "--format", "{{.Size}}", image))


def parts(image: str) -> dict[str, int]:
    """Bytes of the packages in an image, those of PARTS."""
    code = "import cog, pathlib; print(pathlib.Path(cog.__file__).parents[1])"
    script = f'cd "$(python -c "{code}")" && du -sk -- *'
    sizes = [line.split("\t") for line in docker("run", "--rm", "--entrypoint", "sh", image, "-c", script).splitlines()]
    kilobytes = {name: int(size) for size, name in sizes}
    return {part: 1024 * sum(kilobytes.get(name, 0) for name in names.split()) for part, names in PARTS.items()}


def one_round(image: str, options: list[str]) -> dict:
    picture = sample()
    with Container(image, *options) as container:
        ready = container.wait()
        for _ in range(REQUESTS):
            answer = container.ask(picture)
        row = {"model": answer["model"], "engine": answer["engine"], "ready_s": ready, "docker_s": container.docker_s}
        row["memory"] = container.memory()
        row["stop_s"], row["exit"] = container.stop()
    return row


def measure(images: list[str], rounds: int, options: list[str]) -> dict[str, dict]:
    rows = {}
    for image, turns in take_turns({image: partial(one_round, image, options) for image in images}, rounds).items():
        medians = {key: statistics.median(row[key] for row in turns) for key in MEDIANS}
        last = turns[-1] | {"exit": max(row["exit"] for row in turns)}
        rows[image] = {"size": image_size(image), "parts": parts(image)} | last | medians
    return rows


def tables(rows: dict[str, dict]) -> str:
    names = {
        "model": "model",
        "engine": "engine",
        "size": "size, MB",
        "ready_s": "READY, s",
        "docker_s": "of which Docker",
    }
    names |= {"memory": "memory, MB", "stop_s": "stop, s", "exit": "exit"}
    shown = {image: row | {"size": row["size"] / 1e6, "memory": row["memory"] / 1e6} for image, row in rows.items()}
    first = table(["image", *names.values()], [[image, *map(row.get, names)] for image, row in shown.items()])
    inside = [
        [image, *(size / 1e6 for size in (*row["parts"].values(), row["size"] - sum(row["parts"].values())))]
        for image, row in rows.items()
    ]
    return f"{first}\n\n" + table(["MB of", *PARTS, "the rest"], inside)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", nargs="+", metavar="IMAGE")
    parser.add_argument("--rounds", type=at_least_one, default=9)
    parser.add_argument("--weights", type=Path, metavar="FILE", help="a convmixer_768_32.safetensors")
    parser.add_argument("--json", type=in_a_folder, metavar="FILE")
    arguments = parser.parse_args()
    options = ["--volume", f"{arguments.weights.resolve()}:{WEIGHTS}:ro"] if arguments.weights else []
    rows = measure(arguments.images, arguments.rounds, options)
    print(tables(rows))
    write_json(arguments.json, rows)


if __name__ == "__main__":
    main()
