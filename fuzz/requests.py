"""Requests for the fuzzing of the server: JSON texts that say what is sent, in which pieces, and what may come back.

A request is {"parts": [...], "pause": seconds, "end": ..., "answered": ...}. The parts are sent one after the other,
as Latin-1. "end" is what the client does then: "wait" for the answer, "half" close its side first, or "leave". With
"answered" the request is whole, so that there must be an answer. WEB and GONE in it stand for the addresses of a web
server of the fuzzing and of one that is not there.
"""

import base64
import itertools
import json

import numpy as np

from fuzz import pictures
from fuzz.files import HOSTILE_VALUES, changed_text, changed_tree
from fuzz.mutations import INTERESTING, PLAIN, Rng, chance, pick, some_bytes
from fuzz.valid_pictures import KINDS, valid_picture

WEB, GONE = "http://web.invalid", "http://127.0.0.1:9"
HEAD = "{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"


def data_uri(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def make(seed: int, number: int) -> bytes:
    """The request of one case."""
    rng = np.random.default_rng((seed, number, 4))
    kinds = (
        _picture,
        _picture,
        _inputs,
        _inputs,
        _address,
        _body,
        _body,
        _head,
        _head,
        _path,
        _slow,
        _leaving,
        _chunked,
    )
    return json.dumps(kinds[number % len(kinds)](rng, seed)).encode()


def is_valid(number: int) -> bool:
    return False


def _request(body: object, method: str = "POST", path: str = "/predictions", **more) -> dict:
    text = body if isinstance(body, str) else json.dumps(body)
    head = HEAD.format(method=method, path=path, length=len(text.encode("latin-1", "replace")))
    return {"parts": [head + text], "pause": 0, "end": "wait", "answered": True} | more


def _good(rng: Rng, seed: int) -> dict:
    inputs = {"image": data_uri(valid_picture(seed, int(rng.integers(KINDS))))}
    if chance(rng, 0.3):
        inputs["heatmap"] = True
    if chance(rng, 0.3):
        inputs["top_k"] = int(rng.integers(1, 101))
    return {"input": inputs}


def _picture(rng: Rng, seed: int) -> dict:
    """A damaged picture, sent as it should be, or in a data URI that is damaged itself."""
    uri = data_uri(pictures.make(seed, int(rng.integers(10**6))))
    match int(rng.integers(6)):
        case 0:
            uri = pick(rng, PLAIN)(rng, uri.encode()).decode("latin-1")
        case 1:
            uri = (
                pick(rng, ("data:", "data:,", "data:;base64,", "data:image/png,", "DATA:image/png;base64,")) + uri[22:]
            )
        case 2:
            kind = pick(
                rng, ("../../x", "image/" + "x" * 3000, "text/html", "image/png;charset=x;base64;base64", "\x00")
            )
            uri = uri.replace("image/png", kind, 1)
    return _request({"input": {"image": uri, "heatmap": chance(rng, 0.3)}})


def _inputs(rng: Rng, seed: int) -> dict:
    """A good request in which something else stands in one place or two."""
    body: object = _good(rng, seed) | ({"id": "x"} if chance(rng, 0.1) else {})
    for _ in range(int(rng.integers(1, 3))):
        body = changed_tree(rng, body)
    if isinstance(body, dict) and body.get("id") != "x":
        body.pop("id", None)  # for Cog makes a folder of this name: see docs/security.md
    if chance(rng, 0.3):
        name = pick(rng, ("image", "top_k", "model", "heatmap", "extra", "__class__", "", "input"))
        body = {"input": {"image": data_uri(valid_picture(seed, 1)), name: pick(rng, HOSTILE_VALUES)}}
    return _request(body)


def _address(rng: Rng, seed: int) -> dict:
    """An address in the place of the picture."""
    address = pick(
        rng,
        (
            "file:///etc/passwd",
            "/etc/passwd",
            "file://localhost/etc/passwd",
            "ftp://127.0.0.1:9/x",
            "gopher://127.0.0.1:9/x",
            f"{GONE}/x.png",
            "http://",
            "http:///x",
            "https://127.0.0.1:9/x",
            "http://[::1",
            "http://127.0.0.1:99999/x",
            "http://user:secret@127.0.0.1:9/x",
            "http://\u0000/",
            "http://x y/",
            "//127.0.0.1/x",
            "predict.py",
            "..",
            "~",
            "",
            f"{WEB}/picture.png",
            f"{WEB}/nothing",
            f"{WEB}/to-file",
            f"{WEB}/to-picture",
            f"{WEB}/loop",
            f"{WEB}/empty",
            f"{WEB}/cut",
            f"{WEB}/500",
            f"{WEB}/to-gopher",
            f"{WEB}/picture.png?{'x' * 3000}",
            f"{WEB}/{'a' * 300}.png",
            f"{WEB}/..%2f..%2fx.png",
            f"{WEB}/noise",
            "data:image/png;base64," + "A" * 100_000,
            "x" * 2_000_000,
            "\ud800",
        ),
    )
    return _request({"input": {"image": address}})


def _body(rng: Rng, seed: int) -> dict:
    """What is no JSON, or JSON of a kind that programs trip over."""
    text = json.dumps(_good(rng, seed))
    if chance(rng, 0.5):
        return _request(changed_text(rng, text.replace('"image"', '"top_k": 4, "x": 3, "image"')))
    return _request(pick(rng, PLAIN)(rng, text.encode()).decode("latin-1"))


def _head(rng: Rng, seed: int) -> dict:
    """A first line or headers that lie."""
    text = json.dumps(_good(rng, seed))
    request = _request(text)
    head, body = request["parts"][0].split("\r\n\r\n", 1)
    length = pick(rng, (0, 1, len(text) - 1, len(text) + 1, *INTERESTING, -1, 10**30, "x", "0x10", "1, 2", ""))
    match int(rng.integers(8)):
        case 0 | 1:
            head = head.rsplit("\r\n", 1)[0] + f"\r\nContent-Length: {length}"
        case 2:
            head += f"\r\nContent-Length: {length}"
        case 3:
            head = head.replace(
                "application/json", pick(rng, ("text/plain", "multipart/form-data", "x" * 20_000, "", "\x01"))
            )
        case 4:
            line = pick(
                rng, ("POST", "POST /predictions", "POST /predictions HTTP/9.9", "\x16\x03\x01\x02", "G" * 70_000, "")
            )
            head = line + head[head.index("\r\n") :]
        case 5:
            head += "\r\n" + "\r\n".join(f"X-{i}: {'y' * 50}" for i in range(int(pick(rng, (5, 99, 101, 3000)))))
        case 6:
            extra = (
                "Expect: 100-continue",
                "Connection: close",
                "Upgrade: websocket",
                "Prefer: respond-async",
                "Prefer: wait=x",
            )
            head += "\r\n" + pick(
                rng, (*extra, "Content-Encoding: gzip", "traceparent: x", ": x", "Host: " + "h" * 9999)
            )
        case _:
            head = pick(rng, PLAIN)(rng, head.encode("latin-1")).decode("latin-1")
    return request | {"parts": [head + "\r\n\r\n" + body], "answered": False, "end": "half"}


def _path(rng: Rng, seed: int) -> dict:
    """Places and methods that are not there, and predictions with names of the client's choice."""
    name = pick(rng, ("fuzz-1", "fuzz-" + "x" * 250, "%ff", "fuzz%20x", "fuzz-%E2%80%AE", "*", "fuzz;x"))
    path = pick(
        rng,
        (
            f"/predictions/{name}",
            f"/predictions/{name}/cancel",
            f"/predictions/{name}",
            "/predictions/",
            "/predictions/x/y",
            "/../../etc/passwd",
            "/openapi.json",
            "/docs",
            "/trainings",
            "/trainings/x",
            "//predictions",
            "/health-check",
            "/predictions?x=1",
            "/%2e%2e/%2e%2e/etc/passwd",
            "*",
            "http://x/predictions",
            "/" + "a" * 100_000,
            "/ready",
            "",
        ),
    )
    method = pick(
        rng, ("GET", "POST", "PUT", "PUT", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "TRACE", "CONNECT", "BREW")
    )
    return _request(_good(rng, seed), method, path, answered=False, end="half")


def _slow(rng: Rng, seed: int) -> dict:
    """A good request that comes in small pieces."""
    text = _request(_good(rng, seed))["parts"][0]
    count = int(rng.integers(2, 8))
    cuts = sorted({0, len(text), *(int(rng.integers(len(text))) for _ in range(count))})
    parts = [text[start:end] for start, end in itertools.pairwise(cuts)]
    return {"parts": parts, "pause": 0.005, "end": "wait", "answered": True}


def _leaving(rng: Rng, seed: int) -> dict:
    """A client that goes away in the middle of its request, or before the answer."""
    request = _request(_good(rng, seed))
    text = request["parts"][0]
    sent = text if chance(rng, 0.4) else text[: int(rng.integers(len(text)))]
    return request | {"parts": [sent], "end": pick(rng, ("leave", "half")), "answered": False}


def _chunked(rng: Rng, seed: int) -> dict:
    """Transfer-Encoding: chunked, right or wrong."""
    text, chunks = json.dumps(_good(rng, seed)), ""
    while text:
        length = int(rng.integers(1, 4000))
        chunks += f"{len(text[:length]):x}\r\n{text[:length]}\r\n"
        text = text[length:]
    chunks += "0\r\n\r\n"
    if chance(rng, 0.7):
        chunks = pick(rng, PLAIN)(rng, chunks.encode()).decode("latin-1")
    if chance(rng, 0.2):
        chunks = pick(
            rng, ("ffffffffffffffffff\r\nx", "-1\r\n", "7fffffffffffffff\r\n", ";" * 10_000, some_bytes(rng).hex())
        )
    head = (
        "POST /predictions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    return {"parts": [head + chunks], "pause": 0, "end": "half", "answered": False}
