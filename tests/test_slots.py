"""Cog's own server with several slots, under hundreds of interleaved requests."""

import base64
import http.client
import io
import json
import random
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import numpy as np
import pytest
from cog_server import GOOD, PATIENCE, PICTURE, Server, data_uri, encoded, noise, wait_until
from file_server import FileServer, Resource
from PIL import Image

from convmixer import Classifier
from docs.client import STRAY

SHIPPED = "convmixer_256_8_cifar10"
SLOTS = 6

# In Cog's own server.


@pytest.fixture(scope="module")
def running(tmp_path_factory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"), "--slots", SLOTS)
    yield server
    server.kill()


@pytest.fixture
def server(running) -> Iterator[Server]:
    """The running server, which must answer well after each test, whatever happened in it."""
    yield running
    running.wait_for("READY")
    running.expect(running.output(image=GOOD), PICTURE)
    assert running.files() == []


@pytest.fixture(scope="module")
def shipped() -> Classifier:
    return Classifier(SHIPPED)


@pytest.fixture
def web() -> Iterator[FileServer]:
    with FileServer() as web:
        web.resources["/picture.png"] = Resource(PICTURE)
        yield web


class Storm:
    """Requests of many kinds to one server, each with its own picture and its own right answer."""

    def __init__(self, server: Server, shipped: Classifier, web: FileServer):
        self.server, self.web = server, web
        self.classifiers = {"auto": server.classifier, SHIPPED: shipped}

    def ask(self, number: int, kind: str) -> None:
        """One request; raises AssertionError if it does not get what it must."""
        chance = random.Random(number)
        picture = encoded(noise(40 + number % 37, 30 + number % 23, seed=number), chance.choice(["PNG", "JPEG", "BMP"]))
        inputs = {"image": data_uri(picture), "model": chance.choice(list(self.classifiers))}
        inputs["top_k"] = chance.randint(1, 10)
        getattr(self, f"_{kind}")(number, picture, inputs)

    def predict(self, **inputs) -> dict:
        """The answer, at the second attempt if Cog has raised another request's cancellation in this one's thread."""
        for _ in range(5):
            answer = self.server.predict(**inputs)
            if answer["status"] != "canceled" and not answer.get("error", "").endswith(STRAY):
                break
        return answer

    def output(self, **inputs) -> dict:
        answer = self.predict(**inputs)
        assert answer["status"] == "succeeded", answer
        return answer["output"]

    def _good(self, number: int, picture: bytes, inputs: dict) -> None:
        self.check(self.output(**inputs), picture, inputs)

    def _url(self, number: int, picture: bytes, inputs: dict) -> None:
        self.web.resources[f"/{number}"] = Resource(picture)
        self.check(self.output(**inputs | {"image": self.web.url(f"/{number}")}), picture, inputs)

    def _heatmap(self, number: int, picture: bytes, inputs: dict) -> None:
        self.check(self.output(**inputs, heatmap=True), picture, inputs, with_heatmap=True)

    def _bad(self, number: int, picture: bytes, inputs: dict) -> None:
        broken = picture[: len(picture) // 2] if number % 2 else b"no picture at all"
        answer = self.predict(**inputs | {"image": data_uri(broken)})
        assert answer["status"] == "failed" and "output" not in answer
        assert ("damaged or cut short" if number % 2 else "cannot be read as a picture") in answer["error"]
        assert "\n" not in answer["error"]

    def _missing(self, number: int, picture: bytes, inputs: dict) -> None:
        answer = self.predict(**inputs | {"model": "convmixer_768_32"})
        assert answer["status"] == "failed"
        assert "is not on this server; choose another model" in answer["error"]

    def _cancelled(self, number: int, picture: bytes, inputs: dict) -> None:
        """PUT and wait for the answer, while another thread cancels it."""
        path = f"/predictions/storm-{self.server.port}-{number}"
        cancelling = threading.Timer(number % 10 / 500, self.server.request, ("POST", f"{path}/cancel"))
        cancelling.start()
        status, text = self.server.send({"input": inputs}, "PUT", path)
        cancelling.join()
        answer = json.loads(text)
        assert status == 200
        if answer["status"] == "succeeded":  # it came too late, or too early
            self.check(answer["output"], picture, inputs)
        elif answer["status"] == "failed":  # it came just before or after run(), and Cog says it so
            assert answer["error"].endswith(STRAY)
        else:
            assert answer["status"] == "canceled" and "output" not in answer

    def _asynchronous(self, number: int, picture: bytes, inputs: dict) -> None:
        """Nobody waits for the answer, and it is cancelled."""
        path = f"/predictions/storm-{self.server.port}-{number}"
        while self.put_async(path, inputs) == 409:
            time.sleep(0.01)
        assert self.server.request("POST", f"{path}/cancel")[0] in (200, 404)  # 404: it is over

    def put_async(self, path: str, inputs: dict) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=PATIENCE)
        headers = {"Content-Type": "application/json", "Prefer": "respond-async"}
        connection.request("PUT", path, json.dumps({"input": inputs}), headers)
        with connection.getresponse() as response:
            response.read()
        connection.close()
        assert response.status in (202, 409)
        return response.status

    def _gone(self, number: int, picture: bytes, inputs: dict) -> None:
        """The client hangs up somewhere on the way."""
        body = json.dumps({"input": inputs}).encode()
        head = f"POST /predictions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        with socket.create_connection(("127.0.0.1", self.server.port)) as client:
            client.sendall(head.encode() + b"\r\n\r\n" + body[: len(body) if number % 4 else number])
            time.sleep(number % 5 / 200)

    def check(self, output: dict, picture: bytes, inputs: dict, with_heatmap: bool = False) -> None:
        classifier = self.classifiers[inputs["model"]]
        expected = [asdict(each) for each in classifier.classify(picture, inputs["top_k"])]
        assert output["model"] == classifier.name
        assert len(output["predictions"]) == inputs["top_k"]
        for found, wanted in zip(output["predictions"], expected, strict=True):
            assert found == wanted | {"score": pytest.approx(wanted["score"], abs=1e-5)}
        assert bool(output["heatmap"]) == with_heatmap
        if with_heatmap:
            drawn = Image.open(io.BytesIO(base64.b64decode(output["heatmap"].split(",")[1])))
            wanted = np.asarray(classifier.heatmap(picture).overlay()).astype(int)
            assert abs(np.asarray(drawn) - wanted).max() <= 1


KINDS = {
    "good": 200,
    "url": 20,
    "heatmap": 20,
    "bad": 30,
    "missing": 10,
    "cancelled": 40,
    "asynchronous": 20,
    "gone": 30,
}


def test_every_one_of_hundreds_of_interleaved_requests_gets_its_own_answer(server, shipped, web):
    storm = Storm(server, shipped, web)
    kinds = [kind for kind, count in KINDS.items() for _ in range(count)]
    random.Random(0).shuffle(kinds)
    with ThreadPoolExecutor(2 * SLOTS) as pool:
        for _ in pool.map(storm.ask, range(1, len(kinds) + 1), kinds):
            pass


def test_all_slots_work_at_the_same_time(server, web):
    release = threading.Event()
    with ThreadPoolExecutor(SLOTS) as pool:
        requests = []
        for index in range(SLOTS):
            web.resources[f"/{index}"] = Resource(encoded(noise(50 + index, 40, seed=index)), pause=release)
            requests.append(pool.submit(server.output, image=web.url(f"/{index}")))
        server.wait_for("BUSY")
        assert server.request("POST", "/predictions", {"input": {"image": GOOD}})[0] == 409
        release.set()
        for index, request in enumerate(requests):
            server.expect(request.result(), web.resources[f"/{index}"].body)


def test_sigterm_lets_the_running_predictions_finish(tmp_path, web):
    server = Server(tmp_path, "--slots", 3)
    try:
        release = threading.Event()
        web.resources["/held.png"] = Resource(PICTURE, pause=release)
        with ThreadPoolExecutor() as pool:
            last = [pool.submit(server.output, image=web.url("/held.png"), heatmap=True) for _ in range(3)]
            wait_until(lambda: len(web.requests) == 3)
            server.process.terminate()
            time.sleep(0.3)
            assert server.process.poll() is None
            release.set()
        for request in last:
            server.expect(request.result(), PICTURE)
        assert server.process.wait(PATIENCE) == 0
        assert server.files() == []
    finally:
        server.kill()
