"""serving/pictures.py: what people send as a picture, and what it leads to."""

import asyncio
import base64
import threading

import pytest
from file_server import FileServer, Resource

from convmixer import ImageError
from convmixer import web as web_module
from serving import RequestError
from serving.decoding import content_of
from serving.pictures import read

CONTENT = bytes(range(256)) * 5 + b"?"  # every character of base64, and a last group that is not full
STANDARD, SAFE = base64.b64encode(CONTENT).decode(), base64.urlsafe_b64encode(CONTENT).decode()


@pytest.fixture
def web(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with FileServer() as web:
        web.resources["/picture"] = Resource(CONTENT)
        web.resources["/old"] = Resource(redirect=web.url("/picture"))
        web.resources["/astray"] = Resource(redirect="file:///etc/passwd")
        web.resources["/cut"] = Resource(CONTENT, cuts=[100])
        web.resources["/held"] = Resource(CONTENT, pause=threading.Event())
        yield web


def get(text: str) -> bytes:
    return asyncio.run(read(text))


@pytest.mark.parametrize(
    "uri",
    [
        f"DATA:IMAGE/PNG;BASE64,{STANDARD}",
        f"data:image/png;charset=x;base64,{SAFE.rstrip('=')}",
        "data:image/png;base64," + "\r\n".join(STANDARD[i : i + 76] for i in range(0, len(STANDARD), 76)),
        "data:image/png;base64," + STANDARD.replace("+", "%2B").replace("/", "%2f").replace("=", "%3D"),
        "data:application/octet-stream," + "".join(f"%{byte:02x}" for byte in CONTENT),
    ],
)
def test_base64_of_any_kind_is_read(uri):
    assert get(uri) == uri  # it is taken apart where pictures are decoded
    assert content_of(uri) == CONTENT


@pytest.mark.parametrize("uri", ["data:;base64,@@@@", "data:;base64,AA=AA", "data:;base64,\u2603", "data:image/png"])
def test_a_data_uri_that_is_damaged_gets_one_line(uri):
    with pytest.raises(ImageError, match=r"damaged base64|without a comma") as raised:
        content_of(uri)
    assert str(raised.value).isprintable()


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("/etc/passwd", "send one of them"),
        (STANDARD, "send one of them"),
        (7, "send one of them"),
        ("http://", "no host"),
        ("http://127.0.0.1:9/x", "Connection refused"),
    ],
)
def test_what_cannot_be_read_gets_one_line(text, line, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with pytest.raises(RequestError) as raised:
        get(text)
    assert line in str(raised.value) and str(raised.value).isprintable()


def test_an_address_is_fetched_redirects_are_followed_and_both_can_be_forbidden(web, monkeypatch):
    assert get(web.url("/picture")) == get(web.url("/old").replace("http", "HTTP", 1)) == CONTENT
    web.requests.clear()
    monkeypatch.setenv("CONVMIXER_FETCH", "0")
    with pytest.raises(RequestError, match="this server fetches none"):
        get(web.url("/picture"))
    assert not web.requests


@pytest.mark.parametrize(
    ("path", "limit", "value", "line"),
    [
        ("/astray", "SECONDS", 60, "could not be fetched"),
        ("/nothing", "SECONDS", 60, "could not be fetched: HTTP Error 404"),
        ("/cut", "SECONDS", 60, r"cut off on its way|could not be fetched"),
        ("/picture", "MAX_BYTES", len(CONTENT) - 1, "more than the 1,280 bytes"),
        ("/held", "SILENCE", 0.1, "timed out"),
        ("/picture", "SECONDS", -1, "did not arrive within"),
    ],
)
def test_an_address_that_gives_no_picture_gets_one_line(web, monkeypatch, path, limit, value, line):
    monkeypatch.setattr(web_module, limit, value)
    with pytest.raises(RequestError, match=line):
        get(web.url(path))
