"""predict.py in Cog's own server: real requests, good and bad, and what is left of them."""

import itertools
import json
import os
import random
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
from cog_server import GOOD, PATIENCE, PICTURE, ROOT, Server, data_uri, encoded, expect, noise, opened, wait_until
from file_server import Resource
from PIL import Image

from convmixer import Classifier
from docs.client import STRAY, ServerError, classify
from serving.__main__ import COGS_SCHEMA, SCHEMA
from serving.watcher import FOLDER

SHIPPED = "convmixer_256_8_cifar10"


@pytest.mark.parametrize(
    ("inputs", "top_k"), [({}, 5), ({"top_k": 100}, 100), ({"top_k": 3.0}, 3), ({"heatmap": True, "model": "auto"}, 5)]
)
def test_a_picture_is_classified(cog, web, inputs, top_k):
    web.resources["/picture.png"] = Resource(PICTURE)
    for image in (GOOD, web.url("/picture.png")):
        expect(cog.output(image=image, **inputs), cog.classifier, PICTURE, top_k, "heatmap" in inputs)


def test_a_heat_map_does_not_change_the_scores(cog):
    """A large JPEG is read at a fraction of its sides for the network, and at more of them to be shown."""
    large = data_uri(encoded(noise(40, 30).resize((1600, 1200)), "JPEG"))
    plain, drawn = (cog.output(image=large, heatmap=heatmap) for heatmap in (False, True))
    assert drawn["predictions"] == plain["predictions"]


def test_a_large_heat_map_is_small_enough_not_to_stay_on_the_servers_disk(cog):
    content = encoded(noise(2100, 2110), "BMP")  # noise: nothing takes more space once it is compressed
    answer = cog.predict(image=data_uri(content), heatmap=True)
    drawn = opened(answer["output"]["heatmap"])
    assert (drawn.format, drawn.size) == ("JPEG", (2038, 2048))
    assert not [name for _, _, files in os.walk(f"{FOLDER}/{answer['id']}") for name in files]


@pytest.mark.parametrize(
    ("inputs", "field", "message"),
    [
        ({}, "image", "required"),
        ({"image": GOOD, "top_k": 101}, "top_k", "maximum of 100"),
        ({"image": GOOD, "model": "resnet50"}, "model", "not one of"),
        ({"image": GOOD, "heatmap": "yes"}, "heatmap", "not of type"),
    ],
)
def test_an_input_of_the_wrong_kind_is_refused(cog, inputs, field, message):
    status, text = cog.send({"input": inputs})
    (problem,) = json.loads(text)["detail"]
    assert (status, problem["loc"]) == (422, ["body", "input", field])
    assert message in problem["msg"]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"image": "data:,hello"}, "cannot be read as a picture"),
        ({"image": data_uri(PICTURE[:-2000])}, "damaged or cut short"),
        ({"image": data_uri(encoded(Image.new("1", (8001, 8000))))}, "8001 x 8000 pixels, more than the 64,000,000"),
        ({"image": "data:image/png"}, "without a comma"),
        ({"image": GOOD.split(",")[1]}, "send one of them"),
        ({"image": "http://127.0.0.1:9/picture.png"}, "refused"),
        ({"image": GOOD, "model": "convmixer_768_32"}, "is not on this server; choose another model (whoever runs it"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_has_no_answer_gets_one_line(cog, inputs, message):
    answer = cog.predict(**inputs)
    assert answer["status"] == "failed" and "output" not in answer
    assert message in answer["error"] and "\n" not in answer["error"]
    assert answer["logs"] == ""


def test_no_file_of_the_server_can_be_asked_for(cog):
    (path := cog.folder / "private.png").write_bytes(PICTURE)
    for image in (str(path), f"file://{path}", os.path.relpath(path, ROOT)):
        assert "send one of them" in cog.predict(image=image)["error"]


def test_a_prediction_can_be_cancelled(cog, web):
    with cog.under_way(web) as (other,), ThreadPoolExecutor(1) as pool:
        path = f"/predictions/cancelled-{cog.port}"
        cancelled = pool.submit(cog.request, "PUT", path, {"input": {"image": web.url("/held.png"), "heatmap": True}})
        wait_until(lambda: len(web.requests) == 2)
        assert cog.request("POST", f"{path}/cancel")[0] == 200
        status, text = cancelled.result()
        assert (status, json.loads(text)["status"]) == (200, "canceled") and "output" not in json.loads(text)
    expect(other.result()["output"], cog.classifier, PICTURE)


def test_the_server_describes_its_api(cog):
    assert json.loads(cog.request("GET", "/openapi.json")[1]) == json.loads(SCHEMA.read_text())
    assert COGS_SCHEMA.read_bytes() == SCHEMA.read_bytes()


# Many requests at once.

KINDS = {"good": 60, "heatmap": 10, "bad": 20, "cancelled": 20, "gone": 40}


def ask(server: Server, shipped: Classifier, number: int, kind: str) -> None:
    """One request with its own picture; raises AssertionError if it does not get its own right answer."""
    chance = random.Random(number)
    picture = encoded(noise(40 + number % 37, 30 + number % 23, number), chance.choice(["PNG", "JPEG", "BMP"]))
    classifier, model = chance.choice([(server.classifier, "auto"), (shipped, SHIPPED)])
    top_k, heatmap = chance.randint(1, 10), kind == "heatmap"
    image = "data:,no picture" if kind == "bad" else data_uri(picture)
    inputs = {"image": image, "model": model, "top_k": top_k, "heatmap": heatmap}
    path = f"/predictions/storm-{server.port}-{number}"
    if kind == "gone":  # the client hangs up as soon as it has sent its request, or before
        body = json.dumps({"input": inputs}).encode()
        head = b"POST /predictions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: "
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall(b"%s%d\r\n\r\n%s" % (head, len(body), body[: len(body) if number % 4 else number]))
        return
    if kind == "cancelled":
        cancelling = threading.Timer(number % 10 / 500, server.request, ("POST", f"{path}/cancel"))
        cancelling.start()
        answer = json.loads(server.send({"input": inputs}, "PUT", path)[1])
        cancelling.join()
    else:
        answer = next(filter(not_stray, (server.predict(**inputs) for _ in range(5))))
    if kind == "bad":
        assert answer["status"] == "failed" and "cannot be read as a picture" in answer["error"]
    elif not_stray(answer):
        expect(answer["output"], classifier, picture, top_k, heatmap)


def not_stray(answer: dict) -> bool:
    """False if it was cancelled, which Cog may raise in the thread of another request."""
    return answer["status"] != "canceled" and not answer.get("error", "").endswith(STRAY)


def test_each_of_many_interleaved_requests_gets_its_own_answer_and_all_slots_are_free_after_it(cog, web):
    kinds = [kind for kind, count in KINDS.items() for _ in range(count)]
    random.Random(0).shuffle(kinds)
    with ThreadPoolExecutor(12) as pool:
        list(pool.map(partial(ask, cog, Classifier(SHIPPED)), itertools.count(1), kinds))
    cog.wait_for("READY")
    with cog.under_way(web, 6) as answers:
        cog.wait_for("BUSY")
        assert cog.request("POST", "/predictions", {"input": {"image": GOOD}})[0] == 409
    for answer in answers:
        expect(answer.result()["output"], cog.classifier, PICTURE)


# docs/client.py, with this server and with what one in trouble does.

CANCELLED = b'{"status": "failed", "error": "Prediction failed: CancelationException: "}'
DONE = b'{"status": "succeeded", "output": {"model": "at last"}}'
SAYS = [
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 2\r\n\r\n{}",
    b"",  # it hangs up
    *(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(text), text) for text in (CANCELLED, DONE)),
]


@pytest.mark.parametrize(
    ("picture", "top_k", "line"),
    [
        (b"no picture", 5, r"^the picture cannot be read as a picture; supported formats are .*TGA$"),
        (PICTURE, 101, r"^the server refuses the request: 422 .*maximum of 100"),
        (bytes(80 * 2**20), 5, r"^the server refuses the request: 413 "),  # it closes before it has read it all
    ],
    ids=["no picture", "wrong input", "too large"],
)
def test_a_request_that_is_refused_is_told_in_the_servers_line(cog, picture, top_k, line):
    with pytest.raises(ServerError, match=line):
        classify(picture, f"http://127.0.0.1:{cog.port}", within=PATIENCE, top_k=top_k)


def test_a_busy_server_is_asked_again(cog, web):
    with cog.under_way(web, 6):
        cog.wait_for("BUSY")
        with pytest.raises(ServerError, match=r"^no answer from \S+ within .*: (409 .*apacity|timed out)"):
            classify(PICTURE, f"HTTP://127.0.0.1:{cog.port}", within=0.2)
        threading.Timer(0.1, web.resources["/held.png"].pause.set).start()
        expect(classify(PICTURE, f"127.0.0.1:{cog.port}/", within=PATIENCE), cog.classifier, PICTURE)


def test_a_server_that_is_still_starting_is_waited_for():
    """The port opens late, answers 503, hangs up, cancels the wrong request, and answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
    with pytest.raises(ServerError, match=r"^no answer from http\S+ within 0.2 seconds, at last: .*refused.*$"):
        classify(PICTURE, f"http://127.0.0.1:{address[1]}", within=0.2)

    def door() -> None:
        with socket.create_server(address) as listener:
            for words in SAYS:
                with listener.accept()[0] as client:
                    client.recv(2**20)
                    client.sendall(words)
                    client.shutdown(socket.SHUT_WR)
                    while client.recv(2**20):
                        pass

    threading.Timer(0.1, door).start()
    assert classify(PICTURE, f"http://127.0.0.1:{address[1]}", within=PATIENCE) == {"model": "at last"}


def test_the_command_line(cog, tmp_path):
    (tmp_path / "good.png").write_bytes(PICTURE)
    command = [sys.executable, ROOT / "docs" / "client.py", "good.png", "bad.png", "--server", f"127.0.0.1:{cog.port}"]
    environment = os.environ | {"no_proxy": "127.0.0.1"}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    best = cog.classifier.classify(PICTURE)[0]
    assert (run.returncode, run.stdout) == (1, f"good.png: {best.label}, {best.score:.2%}\n")
    assert run.stderr == "client.py: bad.png: [Errno 2] No such file or directory: 'bad.png'\n"
