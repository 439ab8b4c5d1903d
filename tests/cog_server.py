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
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from file_server import FileServer, Resource
from PIL import Image

from convmixer import Checkpoint, Classifier, ConvMixer, ConvMixerConfig, Preprocessing, save_checkpoint
from serving.watcher import status_of

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 120  # seconds; the machine may be busy with something else


def encoded(picture: Image.Image, format: str = "PNG") -> bytes:
    stream = io.BytesIO()
    picture.save(stream, format)
    return stream.getvalue()


def data_uri(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


PICTURE = encoded(noise(90, 70))
GOOD = data_uri(PICTURE)


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def write_weights(path: Path) -> None:
    torch.manual_seed(0)
    config = ConvMixerConfig(
        dim=16, depth=2, kernel_size=5, patch_size=4, num_classes=150
    )  # of which 100 can be asked for
    network = ConvMixer(config)
    with torch.no_grad():
        network.head.weight *= 30  # scores that differ
    preprocessing = Preprocessing(48, 0.9, "bicubic", (0.5, 0.45, 0.4), (0.25, 0.2, 0.3))
    labels = tuple(f"label {index}" for index in range(150))
    save_checkpoint(path, Checkpoint("random", config, network.state_dict(), labels, preprocessing, {}, {}))


def expect(output: dict, classifier: Classifier, picture: bytes, top_k: int = 5, heatmap: bool = False) -> None:
    """``output`` is what the classifier says about ``picture``."""
    assert output["model"] == classifier.name and bool(output["heatmap"]) == heatmap
    for found, wanted in zip(output["predictions"], classifier.classify(picture, top_k), strict=True):
        assert found == asdict(wanted) | {"score": pytest.approx(wanted.score, abs=1e-5)}
    if heatmap:  # the server's threads may round a sum differently: by one of 256 steps at most
        drawn = np.asarray(opened(output["heatmap"])).astype(int)
        assert abs(drawn - np.asarray(classifier.heatmap(picture).overlay())).max() <= 1


def opened(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))


class Server:
    """`python -m serving` with ``arguments``, started in another folder; weights and temporary files are in ``folder``.

    Once it is ready the weights are gone: whatever it answers, it answers with the model that setup loaded.
    """

    def __init__(self, folder: Path, *arguments: object, host: str = "127.0.0.1"):
        self.folder, self.temporary, self.log = folder, folder / "tmp", folder / "log"
        self.temporary.mkdir()
        write_weights(weights := folder / "model.safetensors")
        self.classifier = Classifier(str(weights))
        with socket.socket() as free:
            free.bind((host, 0))
            self.host, self.port = free.getsockname()
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "COG_WEIGHTS": weights.name,
            "CONVMIXER_CACHE": "cache",
            "TMPDIR": str(self.temporary),
            "https_proxy": "http://127.0.0.1:9",  # nothing can be downloaded, whether there is a network or not
            "no_proxy": "127.0.0.1,127.0.0.2",
        }
        command = [sys.executable, "-m", "serving", "--host", host, "--port", str(self.port), *map(str, arguments)]
        with open(self.log, "wb") as log:
            pipes = {"stdout": log, "stderr": log}
            self.process = subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True, **pipes)
        try:
            self.wait_for("READY")
        except BaseException:
            self.__exit__()
            raise
        weights.unlink()

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # with its worker
        self.process.wait()

    def wait_for(self, status: str) -> None:
        wait_until(lambda: status_of(self.host, self.port) == status or self.process.poll() is not None)
        assert self.process.poll() is None, self.log.read_text()

    def request(self, method: str, path: str, body: object = None) -> tuple[int, str]:
        """The status code and the text of one answer, none of which may give away anything about the server."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=PATIENCE)
        connection.request(method, path, json.dumps(body), {"Content-Type": "application/json"})
        with contextlib.closing(connection), connection.getresponse() as response:
            text = response.read().decode()
        words = re.sub(r"base64,[\w+/=]+", "", text)  # in a picture's code, anything may turn up
        for secret in (str(ROOT), str(self.folder), "site-packages", "Traceback"):
            assert secret not in words
        return response.status, text

    def send(self, body: object, method: str = "POST", path: str = "/predictions") -> tuple[int, str]:
        """`request` for a prediction. Cog has no queue: a client that is told so comes back."""
        while (answer := self.request(method, path, body))[0] == 409:
            time.sleep(0.01)
        return answer

    def predict(self, **inputs) -> dict:
        status, text = self.send({"input": inputs})
        assert status == 200, text
        return json.loads(text)

    def output(self, **inputs) -> dict:
        answer = self.predict(**inputs)
        assert answer["status"] == "succeeded", answer
        return answer["output"]

    def is_well(self) -> None:
        """It takes requests, and has left nothing behind."""
        self.wait_for("READY")
        expect(self.output(image=GOOD), self.classifier, PICTURE)
        assert [path for path in self.temporary.rglob("*") if path.is_file()] == []

    @contextlib.contextmanager
    def under_way(self, web: FileServer, requests: int = 1, **inputs) -> Iterator[list[Future]]:
        """While so many requests are under way: PICTURE arrives after that. Gives what will be their answers."""
        web.resources["/held.png"] = Resource(PICTURE, pause=threading.Event())
        before = len(web.requests)
        with ThreadPoolExecutor(requests) as pool:
            answers = [pool.submit(self.predict, image=web.url("/held.png"), **inputs) for _ in range(requests)]
            try:
                wait_until(lambda: len(web.requests) == before + requests)
                yield answers
            finally:
                web.resources["/held.png"].pause.set()
