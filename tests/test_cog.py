"""predict.py in Cog's own server: real requests, good and bad, and what is left of them."""

import base64
import io
import json
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from cog_server import (
    COGS_FOLDER,
    GOOD,
    PICTURE,
    ROOT,
    Server,
    data_uri,
    encoded,
    noise,
    png_header,
    wait_until,
)
from file_server import FileServer, Resource
from PIL import Image

from convmixer import Classifier, zoo
from serving.__main__ import COGS_SCHEMA, SCHEMA


@pytest.fixture(scope="module")
def running(tmp_path_factory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"), "--slots", 1)
    yield server
    server.kill()


@pytest.fixture
def server(running) -> Iterator[Server]:
    """The running server, which must answer well after each test, whatever happened in it."""
    yield running
    running.expect(running.output(image=GOOD), PICTURE)
    assert running.files() == []


@pytest.fixture
def web() -> Iterator[FileServer]:
    with FileServer() as web:
        web.resources["/picture.png"] = Resource(PICTURE)
        yield web


def held(web: FileServer) -> tuple[str, threading.Event]:
    """The address of a picture that does not arrive before the event: a request for it is under way for that long."""
    release = threading.Event()
    web.resources["/held.png"] = Resource(PICTURE, pause=release)
    return web.url("/held.png"), release


# Good requests.


@pytest.mark.parametrize("top_k", [None, 1, 5, 100, 3.0])
def test_a_data_uri_is_classified(server, top_k):
    output = server.output(image=GOOD, **({} if top_k is None else {"top_k": top_k}))
    server.expect(output, PICTURE, 5 if top_k is None else int(top_k))
    assert output["heatmap"] is None


def test_an_http_url_is_classified(server, web):
    server.expect(server.output(image=web.url("/picture.png"), model="auto"), PICTURE)


def test_a_small_heat_map_is_exact(server):
    output = server.output(image=GOOD, heatmap=True, top_k=2)
    server.expect(output, PICTURE, 2)
    prefix, content = output["heatmap"].split(",")
    heatmap = Image.open(io.BytesIO(base64.b64decode(content)))
    assert prefix == "data:image/png;base64"
    assert heatmap.size == (90, 70)
    # The server's threads may round a sum differently: by one of 256 steps at most.
    difference = np.asarray(heatmap).astype(int) - np.asarray(server.classifier.heatmap(PICTURE).overlay())
    assert abs(difference).max() <= 1


def test_a_large_heat_map_is_small_enough_not_to_stay_on_the_servers_disk(server):
    content = encoded(noise(2100, 2110), "BMP")  # noise: nothing takes more space once it is compressed
    answer = server.predict(image=data_uri(content, "image/bmp"), heatmap=True)
    server.expect(answer["output"], content)
    prefix, encoding = answer["output"]["heatmap"].split(",")
    heatmap = Image.open(io.BytesIO(base64.b64decode(encoding)))
    assert prefix == "data:image/jpeg;base64"
    assert heatmap.size == (2038, 2048)
    expected = server.classifier.heatmap(content).overlay()
    small, wanted = (np.asarray(each.resize((20, 20), Image.Resampling.BOX)) for each in (heatmap, expected))
    assert abs(small.astype(int) - wanted).max() <= 3
    assert [path for path in (COGS_FOLDER / answer["id"]).rglob("*") if path.is_file()] == []


def test_the_shipped_model_answers_by_name(server):
    if zoo.local_path("convmixer_256_8_cifar10") is None:
        pytest.skip("the shipped weights are not here yet")
    expected = Classifier("convmixer_256_8_cifar10").classify(PICTURE, 3)
    output = server.output(image=GOOD, model="convmixer_256_8_cifar10", top_k=3)
    assert output["model"] == "convmixer_256_8_cifar10"
    assert [found["label"] for found in output["predictions"]] == [wanted.label for wanted in expected]
    server.expect(server.output(image=GOOD), PICTURE)  # auto is what it was


# Bad requests.


@pytest.mark.parametrize(
    ("inputs", "field", "message"),
    [
        ({}, "image", "required"),
        ({"image": None}, "image", "not of type"),
        ({"image": 7}, "image", "not of type"),
        ({"image": [GOOD]}, "image", "not of type"),
        ({"image": GOOD, "top_k": 0}, "top_k", "minimum of 1"),
        ({"image": GOOD, "top_k": 101}, "top_k", "maximum of 100"),
        ({"image": GOOD, "top_k": 2.5}, "top_k", "not of type"),
        ({"image": GOOD, "top_k": "5"}, "top_k", "not of type"),
        ({"image": GOOD, "model": "resnet50"}, "model", "not one of"),
        ({"image": GOOD, "model": ROOT.joinpath("x.safetensors").name}, "model", "not one of"),
        ({"image": GOOD, "heatmap": "yes"}, "heatmap", "not of type"),
    ],
)
def test_an_input_of_the_wrong_kind_is_refused(server, inputs, field, message):
    status, text = server.send({"input": inputs})
    (problem,) = json.loads(text)["detail"]
    assert status == 422
    assert problem["loc"] == ["body", "input", field]
    assert message in problem["msg"]


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("data:,hello", "cannot be read as a picture"),
        ("data:image/png;base64,", "is empty"),
        (data_uri(PICTURE[:-2000]), "damaged or cut short"),
        (data_uri(png_header(100_000, 100_000)), "100000 x 100000 pixels, more than the 64,000,000"),
        (data_uri(encoded(Image.new("1", (8001, 8000)))), "8001 x 8000 pixels, more than the 64,000,000"),
        ("/etc/passwd", "URL"),
        ("file:///etc/passwd", "URL"),
        ("", "URL"),
        ("x" * 100_000, "URL"),
        ("a\0b", "URL"),
        (GOOD.split(",")[1], "URL"),
        ("http://127.0.0.1:9/picture.png", "refused"),
        ("http://", "no host"),
        ("data:image/png", "without a comma"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_no_picture_gets_one_line(server, image, message):
    answer = server.predict(image=image)
    assert answer["status"] == "failed"
    assert "output" not in answer
    assert message in answer["error"]
    assert "\n" not in answer["error"]


def test_no_file_of_the_server_can_be_asked_for(server):
    outside, inside = server.folder / "private.png", server.temporary / "private.png"
    for path in (outside, inside):
        path.write_bytes(PICTURE)
        for image in (str(path), f"file://{path}", os.path.relpath(path, ROOT)):
            assert "send one of them" in server.predict(image=image)["error"]
        path.unlink()


def test_a_url_without_a_picture_gets_one_line(server, web):
    assert "404" in server.predict(image=web.url("/nothing.png"))["error"]


def test_a_model_that_is_not_there_gets_one_line(server):
    answer = server.predict(image=GOOD, model="convmixer_1024_20_ks9_p14")
    assert "convmixer_1024_20_ks9_p14 is not on this server; choose another model" in answer["error"]
    assert answer["error"].endswith(
        "(whoever runs it can add it: python -m convmixer download convmixer_1024_20_ks9_p14)"
    )
    assert answer["logs"] == ""


# Requests that do not come one after the other.


@pytest.mark.parametrize("moment", ["while the picture is downloaded", "while it is classified"])
def test_a_prediction_can_be_cancelled(server, web, moment):
    address, release = held(web)
    name = f"cancelled-{server.port}-{len(moment)}"
    if moment == "while it is classified":
        release.set()
        address = web.url("/large.png")
        web.resources["/large.png"] = Resource(encoded(Image.new("L", (7900, 7900))))  # a second and more
    with ThreadPoolExecutor() as pool:
        body = {"input": {"image": address, "heatmap": True}}
        cancelled = pool.submit(server.send, body, "PUT", f"/predictions/{name}")
        wait_until(lambda: web.requests)
        time.sleep(0.2)
        assert server.request("POST", f"/predictions/{name}/cancel")[0] == 200
        release.set()
        status, text = cancelled.result()
    assert status == 200
    assert json.loads(text)["status"] == "canceled"
    assert "output" not in json.loads(text)


# What stays behind.


def test_the_server_describes_its_api(server):
    status, text = server.request("GET", "/openapi.json")
    assert status == 200
    assert json.loads(text) == json.loads(SCHEMA.read_text())
    assert COGS_SCHEMA.stat().st_mtime >= server.started - 1  # file systems and clocks differ a little


NO_KERNEL = """
from convmixer.cpu import kernel
def load(*_): raise kernel.KernelError("there is none today")
kernel.load = load
"""


def test_a_slower_way_is_told_in_the_log_once(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(NO_KERNEL)  # which each process of the server runs first
    server = Server(tmp_path)
    try:
        assert server.output(image=GOOD)["engine"] == "numpy"
        assert server.log.read_text().count("there is none today") == 1
    finally:
        server.kill()
