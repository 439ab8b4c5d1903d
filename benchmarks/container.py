"""The containers that `make container` builds: size, time until READY, memory, and time to stop.

    python benchmarks/container.py convmixer-cpu convmixer [--rounds 9] [--json FILE]

Each image is started and stopped --rounds times, in turn with the others; the figures are medians. READY is what
/health-check says, from `docker run` on. The memory is what `docker stats` counts once a picture of 480 x 360 pixels
has been answered twenty times.
"""

import contextlib
import http.client
import io
import json
import re
import subprocess
import sys
import time
import urllib.request
from functools import partial
from pathlib import Path

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, so that the rest is found

from benchmarks import harness
from convmixer.sample import draw_sample
from docs.client import classify

REQUESTS = 20
HEADS = ("READY, s", "memory, MB", "stop, s")
UNITS = {"kiB": 2**10, "MiB": 2**20, "GiB": 2**30}
PARTS = {  # what an image holds, by where it is
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
        with contextlib.suppress(subprocess.CalledProcessError):  # without a network it has no port
            self.address = f"http://{docker('port', self.id, 5000).splitlines()[0]}"

    def __enter__(self) -> "Container":
        return self

    def __exit__(self, *exception) -> None:
        docker("rm", "--force", self.id)

    def wait(self) -> float:
        """Seconds since `docker run` until it is ready for requests. Raises Failure if it never is."""
        while time.perf_counter() < self.start + harness.PATIENCE:
            with contextlib.suppress(OSError, http.client.HTTPException):  # nobody is there yet
                with urllib.request.urlopen(f"{self.address}/health-check", timeout=harness.PATIENCE) as response:
                    status = json.load(response)["status"]
                if status == "READY":
                    return time.perf_counter() - self.start
                if status == "SETUP_FAILED":
                    break
            time.sleep(0.005)
        raise harness.Failure(f"the container is not ready: {self.logs()[-2000:]}")

    def ask(self, picture: bytes, **inputs) -> dict:
        return classify(picture, self.address, **inputs)

    def logs(self) -> str:
        return subprocess.getoutput(f"docker logs {self.id}")

    def memory(self) -> int:
        """Bytes."""
        used = docker("stats", "--no-stream", "--format", "{{.MemUsage}}", self.id)
        number, unit = re.match(r"([\d.]+)(\w+)", used).groups()
        return round(float(number) * UNITS[unit])

    def stop(self) -> tuple[float, int]:
        """Seconds, and the exit status."""
        start = time.perf_counter()
        docker("stop", "--time", harness.PATIENCE, self.id)
        seconds = time.perf_counter() - start
        return seconds, int(docker("inspect", "--format", "{{.State.ExitCode}}", self.id))


def sample() -> bytes:
    stream = io.BytesIO()
    draw_sample().save(stream, "PNG")
    return stream.getvalue()


def image_size(image: str) -> int:
    return int(docker("image", "inspect", "--format", "{{.Size}}", image))


def parts(image: str) -> list[float]:
    """Megabytes of the packages in an image, those of PARTS."""
    code = "import cog, pathlib; print(pathlib.Path(cog.__file__).parents[1])"
    script = f'cd "$(python -c "{code}")" && du -sk -- *'
    sizes = [line.split("\t") for line in docker("run", "--rm", "--entrypoint", "sh", image, "-c", script).splitlines()]
    megabytes = {name: int(size) * 1024 / 1e6 for size, name in sizes}
    return [sum(megabytes.get(name, 0.0) for name in names.split()) for names in PARTS.values()]


def one_round(image: str) -> tuple[float, ...]:
    """HEADS' figures. Raises Failure where a container does not end as it should."""
    picture = sample()
    with Container(image) as container:
        ready = container.wait()
        for _ in range(REQUESTS):
            container.ask(picture)
        memory, (stop, status) = container.memory(), container.stop()
    if status:
        raise harness.Failure(f"{image} ended with status {status}")
    return ready, memory / 1e6, stop


def main() -> None:
    parser = harness.Parser(__doc__, rounds=9)
    parser.add_argument("images", nargs="+", metavar="IMAGE")
    options, times, sizes = parser.parse_args(), [], []
    turns = {image: partial(one_round, image) for image in options.images}
    for image, found in harness.take_turns(turns, options.rounds).items():
        whole, inside = image_size(image) / 1e6, parts(image)
        times.append([image, whole, *harness.medians(found)])
        sizes.append([image, *inside, whole - sum(inside)])
    print(harness.table(["image", "size, MB", *HEADS], times) + "\n")
    print(harness.table(["MB of", *PARTS, "the rest"], sizes))
    harness.write_json(options.json, {"times": times, "sizes": sizes})


if __name__ == "__main__":
    harness.run(main)
