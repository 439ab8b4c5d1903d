"""What Schemathesis sends and checks, loaded by it: see fuzz/server.py."""

import base64
import os
import re

import requests
import schemathesis
from hypothesis import strategies as st

from fuzz.damage import damaged
from fuzz.pictures import check_message, seeds

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
SERVER, WEB, FOLDER = (os.environ[f"FUZZ_{name}"] for name in ("SERVER", "WEB", "FOLDER"))
SECRETS = (ROOT, FOLDER, "site-packages", "Traceback", 'File "', "/usr/", "/root", "root:x:")
MAX_ERROR = 1000
ADDRESSES = (
    *(f"{WEB}/{name}" for name in ("picture.png", "nothing", "to-file", "to-picture", "loop", "empty", "cut", "500")),
    *("file:///etc/passwd", "/etc/passwd", "file://localhost/etc/passwd", "ftp://127.0.0.1:9/x", "http://127.0.0.1:9/"),
    *("http://", "http:///x", "http://[::1", "http://127.0.0.1:99999/x", "http://user:secret@127.0.0.1:9/x"),
    *("//127.0.0.1/x", "predict.py", "..", "~", "", "data:", "data:,", "data:;base64,", "data:image/png;base64,A"),
)
HEADS = st.sampled_from(["data:image/png;base64,"] * 6 + ["data:,", "DATA:;base64,", "data:image/png;x=y;base64,"])


def data_uri(head: str, picture: bytes) -> str:
    return head + base64.b64encode(picture).decode()


pictures = st.builds(data_uri, HEADS, damaged(seeds()))
texts = st.text(max_size=20).map("data:image/png;base64,{}".format)
schemathesis.openapi.format("uri", st.one_of(pictures, pictures, st.sampled_from(ADDRESSES), texts))


@schemathesis.hook
def map_body(context, body):
    if isinstance(body, dict):
        for name in ("id", "webhook", "webhook_events_filter", "output_file_prefix"):
            body.pop(name, None)
    return body


@schemathesis.check
def says_nothing_about_itself(context, response, case) -> None:
    text = re.sub(r"base64,[\w+/=]+", "", response.text)  # in a picture's code, anything may turn up
    for secret in SECRETS:
        assert secret not in text, f"the answer speaks of {secret}"
    content = response.json() if text.startswith("{") else None
    if isinstance(content, dict) and content.get("error"):
        check_message(content["error"], MAX_ERROR)


@schemathesis.check
def stays_ready(context, response, case) -> None:
    health = requests.get(f"{SERVER}/health-check", timeout=60)
    assert health.json()["status"] in ("READY", "BUSY"), health.text
