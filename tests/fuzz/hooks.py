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
    *(f"{WEB}/{name}" for name in ("picture.png", "nothing", "to-file", "to-picture", "loop", "cut", "500")),
    *("file:///etc/passwd", "/etc/passwd", "file://localhost/etc/passwd", "ftp://127.0.0.1:9/x", "http://127.0.0.1:9/"),
    *("http://", "http:///x", "http://[::1", "http://127.0.0.1:99999/x", "http://user:secret@127.0.0.1:9/x"),
    *("//127.0.0.1/x", "predict.py", "..", "~", "", "data:", "data:,", "data:;base64,", "data:image/png;base64,A"),
)
HEADS = st.sampled_from(["data:image/png;base64,"] * 6 + ["data:,", "DATA:;base64,", "data:image/png;x=y;base64,"])


def data_uri(head: str, picture: bytes) -> str:
    return head + base64.b64encode(picture).decode()


pictures = st.builds(data_uri, HEADS, damaged(seeds()))
texts = st.text(max_size=20).map("data:image/png;base64,{}".format)
IMAGES = st.one_of(pictures, pictures, st.sampled_from(ADDRESSES), texts)
schemathesis.openapi.format("uri", IMAGES)
NAMED = ("id", "webhook", "webhook_events_filter", "output_file_prefix")
OURS = {"top_k": st.integers(0, 101), "heatmap": st.booleans(), "model": st.sampled_from(["auto", "none"])}
INPUTS = st.fixed_dictionaries({"image": IMAGES}, optional=OURS)


@schemathesis.hook
def flatmap_body(context, body):
    """Half of what Schemathesis makes is as it is, the other half has more different inputs."""
    if not isinstance(body, dict):
        return st.just(body)
    kept = st.just({name: value for name, value in body.items() if name not in NAMED})
    return kept | INPUTS.map(lambda inputs: {"input": inputs}) if "input" in body else kept


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
