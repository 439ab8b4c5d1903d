"""Cog's own server with predict.py in it, as `make serve` starts it, and pictures to send to it."""

import base64
import contextlib
import http.client
import io
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from convmixer import Checkpoint, Classifier, ConvMixer, ConvMixerConfig, Preprocessing, save_checkpoint

ROOT = Path(__file__).resolve().parents[1]
COGS_FOLDER = Path("/tmp/coglet/predictions")  # where Cog keeps what is too large for its sockets; it is not TMPDIR
CLASSES = 150  # more than the 100 that can be asked for
PATIENCE = 60  # seconds; the machine may be busy with something else


def encoded(picture: Image.Image, format: str = "PNG") -> bytes:
    stream = io.BytesIO()
    picture.save(stream, format)
    return stream.getvalue()


def data_uri(content: bytes, mime: str = "image/png") -> str:
    return f"data:{mime};base64,{base64.b64encode(content).decode()}"


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def png_header(width: int, height: int) -> bytes:
    """A PNG of this size as far as its header says, with hardly any pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")


PICTURE = encoded(noise(90, 70))
GOOD = data_uri(PICTURE)


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def write_weights(path: Path) -> None:
    torch.manual_seed(0)
    config = ConvMixerConfig(dim=16, depth=2, kernel_size=5, patch_size=4, num_classes=CLASSES)
    network = ConvMixer(config)
    with torch.no_grad():
        network.head.weight *= 30  # scores that differ
    preprocessing = Preprocessing(48, 0.9, "bicubic", (0.5, 0.45, 0.4), (0.25, 0.2, 0.3))
    labels = tuple(f"label {index}" for index in range(CLASSES))
    save_checkpoint(path, Checkpoint("random", config, network.state_dict(), labels, preprocessing, {}, {}))


class Server:
    """`python -m serving` with ``arguments``, started in another folder; weights and temporary files are in ``folder``.

    Once it is ready the weights are gone: whatever it answers, it answers with the model that setup loaded.
    """

    def __init__(self, folder: Path, *arguments: object, host: str = "127.0.0.1", **environment: str):
        self.folder, self.temporary, self.log = folder, folder / "tmp", folder / "log"
        self.temporary.mkdir()
        weights = folder / "model.safetensors"
        write_weights(weights)
        self.classifier = Classifier(str(weights))
        self.host = host
        with socket.socket() as probe:
            probe.bind((host, 0))
            self.port = probe.getsockname()[1]
        environment = os.environ | environment
        environment |= {
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)]),
            "COG_WEIGHTS": weights.name,
            "CONVMIXER_CACHE": "cache",
            "TMPDIR": str(self.temporary),
            "https_proxy": "http://127.0.0.1:9",  # nothing can be downloaded, whether there is a network or not
            "no_proxy": "127.0.0.1,127.0.0.2",
        }
        self.started = time.time()
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "serving", "--host", host, "--port", str(self.port), *map(str, arguments)],
                cwd=folder,
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            self.wait_for("READY")
        except BaseException:
            self.kill()
            raise
        weights.unlink()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # with its worker
        self.process.wait()

    def wait_for(self, status: str) -> None:
        wait_until(lambda: self.status() == status or self.process.poll() is not None)
        assert self.process.poll() is None, self.log.read_text()

    def status(self) -> str:
        try:
            return json.loads(self.request("GET", "/health-check")[1])["status"]
        except ConnectionError:
            return "DOWN"

    def request(self, method: str, path: str, body: object = None) -> tuple[int, str]:
        """The status code and the text of one answer, none of which may give away anything about the server."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=PATIENCE)
        content = body if isinstance(body, bytes) else json.dumps(body)
        connection.request(method, path, content, {"Content-Type": "application/json"})
        with contextlib.closing(connection), connection.getresponse() as response:
            text = response.read().decode()
        words = re.sub(r"base64,[\w+/=]+", "", text)  # in a picture's code, anything may turn up
        for secret in (str(ROOT), str(self.folder), "site-packages", "Traceback"):
            assert secret not in words
        return response.status, text

    def send(self, body: object, method: str = "POST", path: str = "/predictions") -> tuple[int, str]:
        """`request` for a prediction. Cog has no queue: a client that is told so comes back."""
        deadline = time.monotonic() + PATIENCE
        while True:
            status, text = self.request(method, path, body)
            if status != 409 or time.monotonic() > deadline:
                return status, text
            time.sleep(0.01)

    def predict(self, **inputs) -> dict:
        """The answer to a request that was understood."""
        status, text = self.send({"input": inputs})
        assert status == 200, text
        return json.loads(text)

    def output(self, **inputs) -> dict:
        """The output for a good request."""
        answer = self.predict(**inputs)
        assert answer["status"] == "succeeded", answer
        return answer["output"]

    def expect(self, output: dict, picture: bytes, top_k: int = 5) -> None:
        """``output`` is what the classifier says about ``picture``."""
        expected = [asdict(prediction) for prediction in self.classifier.classify(picture, top_k)]
        assert output["model"] == "random"
        assert len(output["predictions"]) == top_k
        for found, wanted in zip(output["predictions"], expected, strict=True):
            assert found == wanted | {"score": pytest.approx(wanted["score"], abs=1e-5)}

    def files(self) -> list[Path]:
        return [path for path in self.temporary.rglob("*") if path.is_file()]
