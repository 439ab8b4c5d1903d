"""predict_batched.py: by itself, and in Cog's own server under hundreds of interleaved requests."""

import ast
import asyncio
import base64
import http.client
import io
import json
import os
import random
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from cog_server import GOOD, PATIENCE, PICTURE, ROOT, Server, data_uri, encoded, noise, wait_until
from file_server import FileServer, Resource
from PIL import Image

import predict
import predict_batched
import serve
from convmixer import Classifier
from docs.client import STRAY

SHIPPED = "convmixer_256_8_cifar10"
SLOTS = 6

# What Cog's command line reads off the text.


def parsed(file: str) -> dict[str, str]:
    """The definitions that make up the API, as text without comments and layout."""
    tree = ast.parse((ROOT / file).read_text())
    found = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    (choices,) = (
        node for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "MODELS"
    )
    (run,) = (node for node in found["Predictor"].body if getattr(node, "name", "") == "run")
    parts = [choices, found["Prediction"], found["Output"], run.args, run.returns]
    return {type(part).__name__ + str(index): ast.unparse(part) for index, part in enumerate(parts)}


def test_both_runners_have_the_same_api():
    assert parsed("predict_batched.py") == parsed("predict.py")
    assert serve.openapi_schema(predict_batched.Predictor) == serve.openapi_schema(predict.Predictor)


def test_the_container_gets_slots_from_a_number_in_the_text():
    tree = ast.parse((ROOT / "predict_batched.py").read_text())
    (run,) = (node for node in ast.walk(tree) if isinstance(node, ast.AsyncFunctionDef) and node.name == "run")
    assert [ast.unparse(decorator) for decorator in run.decorator_list] == ["concurrent(max=16)"]


@pytest.mark.parametrize("slots", ["0", "-1", "x", "1.5", "257", ""])
def test_a_number_of_slots_that_is_none_gets_one_line(slots, capsys):
    with pytest.raises(SystemExit) as stopped:
        serve.main([f"--slots={slots}"])
    assert stopped.value.code == 2
    expected = f"serve.py: argument --slots: {slots!r} is not a number of slots; give one from 1 to 256\n"
    assert capsys.readouterr().err == expected


# The runner in this process, without a server.


@pytest.fixture
def predictor(monkeypatch, random_checkpoint) -> Iterator[predict_batched.Predictor]:
    monkeypatch.setattr(tempfile, "tempdir", None)  # setup changes it for the whole process
    monkeypatch.setenv("COG_WEIGHTS", str(random_checkpoint()))
    predictor = predict_batched.Predictor()
    predictor.setup()
    yield predictor
    predictor.single.decoder.close()


def image_of(predictor: predict_batched.Predictor, name: str, content: bytes) -> predict_batched.Path:
    """A picture where Cog would have put it."""
    path = predict_batched.Path(predictor.single.scratch, name)
    path.write_bytes(content)
    return path


def test_requests_that_come_together_share_the_network(predictor, monkeypatch):
    shared = []
    one = Classifier.classify_many

    def recorded(self, images, top_k=5):
        images = list(images)
        shared.append(len(images))
        return one(self, images, top_k)

    monkeypatch.setattr(Classifier, "classify_many", recorded)
    pictures = [encoded(noise(60, 50, seed=seed)) for seed in range(12)]
    classifier = predictor.single.classifiers["auto"]
    # None goes before all are prepared: so long is the window.
    predictor.batcher.window_s = 1000

    async def ask(index: int) -> predict_batched.Output:
        image = image_of(predictor, f"{index}.png", pictures[index])
        model = "auto" if index % 2 else classifier.name  # which is not among the names, but is the same classifier
        predictor.single.classifiers[classifier.name] = classifier
        return await predictor.run(image=image, model=model, top_k=1 + index % 3, heatmap=False)

    async def ask_all() -> list[predict_batched.Output]:
        return await asyncio.gather(*map(ask, range(12)))

    outputs = asyncio.run(ask_all())
    assert sum(shared) == max(shared) == 12
    for index, (output, picture) in enumerate(zip(outputs, pictures, strict=True)):
        expected = classifier.classify(picture, 1 + index % 3)
        assert [each.label for each in output.predictions] == [each.label for each in expected]
        assert [each.score for each in output.predictions] == pytest.approx([each.score for each in expected])
    assert not predictor.inputs


def test_a_model_is_loaded_once_for_all_who_wait_for_it(predictor, monkeypatch):
    loaded, release = [], threading.Event()

    def load(model: str):
        loaded.append(model)
        assert release.wait(PATIENCE)
        if len(loaded) == 1:
            raise predict.RequestError("no such luck")
        return predictor.single.classifiers["auto"]

    monkeypatch.setattr(predict, "load", load)

    async def check():
        for outcome in (predict.RequestError, Classifier):
            release.clear()
            waiting = [asyncio.create_task(predictor.classifier("convmixer_768_32")) for _ in range(3)]
            await asyncio.sleep(0.01)
            waiting[0].cancel()
            assert await predictor.classifier("auto") is predictor.single.classifiers["auto"]  # meanwhile
            release.set()
            first, *others = await asyncio.gather(*waiting, return_exceptions=True)
            assert isinstance(first, asyncio.CancelledError)
            assert [type(other) for other in others] == [outcome, outcome]
        await predictor.classifier("convmixer_768_32")

    asyncio.run(check())
    assert loaded == ["convmixer_768_32"] * 2


def test_only_what_is_old_and_no_input_is_deleted(tmp_path):
    (tmp_path / "folder").mkdir()
    for name in ("young", "old", "input"):
        (tmp_path / name).write_bytes(b"x")
    for name in ("old", "input", "folder"):
        os.utime(tmp_path / name, (0, 0))
    predict_batched.remove_abandoned(tmp_path, {tmp_path / "input"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "input", "young"]


def test_a_download_that_was_taken_for_abandoned_gets_one_line(predictor):
    path = image_of(predictor, "gone.png", b"")
    path.unlink()
    with pytest.raises(predict.RequestError, match=r"^image took too long to arrive; send it again$"):
        asyncio.run(predictor.run(image=path, model="auto", top_k=5, heatmap=False))


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
    for path in running.files():  # what Cog leaves behind of requests that are cancelled very early, or fail
        os.utime(path, (0, 0))
    running.expect(running.output(image=GOOD), PICTURE)
    wait_until(lambda: list(scratch(running).iterdir()) == [])


def scratch(server: Server) -> Path:
    (folder,) = server.temporary.glob("convmixer-*")
    return folder


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
        assert answer["error"].endswith("is not on this server and cannot be downloaded; choose another model")

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


def test_the_file_of_a_failed_download_is_deleted_in_the_end(server, web):
    assert "refused" in server.predict(image="http://127.0.0.1:9/picture.png")["error"]
    (left,) = scratch(server).iterdir()
    server.expect(server.output(image=GOOD), PICTURE)
    assert left in server.files()
    os.utime(left, (0, 0))
    server.expect(server.output(image=GOOD), PICTURE)
    assert left not in server.files()


WATCHED = """
import sys, time
from serving.stuck import Unsticker
def run(): pass
Unsticker(run, seconds=1, every=0.1, is_under_way=lambda: sys.argv[1] == "under way").start()
time.sleep(4)
"""


def test_a_worker_whose_server_lost_all_slots_ends_itself_unless_a_request_is_under_way(python, tmp_path):
    server = Server(tmp_path, "--slots", 2)
    try:
        for index in range(2):  # Cog cannot make a folder of this name, and loses a slot
            assert server.request("PUT", f"/predictions/{index}{'x' * 300}", {"input": {"image": GOOD}})[0] == 200
        assert server.status() == "BUSY"
        environment = {"env": os.environ | {"PORT": str(server.port)}}
        assert python("-c", WATCHED, "under way", **environment).returncode == 0
        assert python("-c", WATCHED, "idle", **environment).returncode == -9
    finally:
        server.kill()


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
        wait_until(lambda: list(server.temporary.iterdir()) == [])
    finally:
        server.kill()
