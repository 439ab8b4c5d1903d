"""A small app with each component that takes files, a raw client for it, and a witness of what the process opens."""

import csv
import functools
import json
import os
import sys
import urllib.parse
from dataclasses import dataclass
from pathlib import Path

import gradio as gr
import httpx
import numpy as np

META = {"_type": "gradio.FileData"}
FILE_ENDPOINTS = ("image", "file", "button", "files", "folder", "download_input")
OTHER_ENDPOINTS = ("json", "dropdown", "html", "dataframe", "state", "textbox", "checkbox")


def build(example: Path) -> gr.Blocks:
    with gr.Blocks(analytics_enabled=False, title="guard") as blocks:
        image = gr.Image()
        gr.Examples([[str(example)]], [image])
        parts = {
            "image": image,
            "file": gr.File(),
            "button": gr.UploadButton(),
            "files": gr.File(file_count="multiple"),
            "folder": gr.UploadButton(file_count="directory"),
            "download_input": gr.DownloadButton(),
            "json": gr.JSON(),
            "dropdown": gr.Dropdown(["a"], allow_custom_value=True),
            "html": gr.HTML(),
            "dataframe": gr.Dataframe(),
            "state": gr.State({"kept": True}),
            "textbox": gr.Textbox(),
            "checkbox": gr.Checkbox(),
        }
        answer, echo, table, picture = gr.Textbox(), gr.JSON(), gr.DownloadButton(), gr.Image()
        start = gr.Button()
        for name, part in parts.items():
            start.click(describe, part, answer, api_name=name)
        start.click(lambda value: value, parts["json"], echo, api_name="echo")
        start.click(write_table, None, table, api_name="table")
        start.click(draw, None, picture, api_name="draw")
        start.click(lambda: gr.Image(label="another"), None, image, api_name="update")
        start.click(describe_event, None, answer, api_name="event")
        start.click(several_steps, parts["file"], answer, api_name="steps")
        start.click(describe_two, [image, parts["files"]], answer, api_name="two")
    return blocks.queue(max_size=50, default_concurrency_limit=4)


def describe(value) -> str:
    """What the event's function was given; of files also the beginning."""
    if isinstance(value, list) and value and hasattr(value[0], "path"):
        return json.dumps([describe(each) for each in value])
    if hasattr(value, "path"):
        return f"{value.name}: {value.path.read_bytes()[:40]!r}"
    return repr(value)


def describe_two(one, others) -> str:
    return describe(one) + " and " + describe(others)


def describe_event(event: gr.EventData) -> str:
    return repr(event._data)


def several_steps(value):
    for step in range(3):
        yield f"{step} {describe(value)}"


def write_table() -> str:
    path = Path(os.environ["GRADIO_TEMP_DIR"]).with_name("table.csv")
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([["name", "share"], ["cat", 0.5]])
    return str(path)


def draw() -> np.ndarray:
    return np.full((8, 8, 3), 200, np.uint8)


class Witness:
    """Notes the files that this process opens or asks about, and the hosts it calls, between start and stop.

    Python's own audit events tell of every open and connect, whatever the library; os.stat and os.lstat have none and
    are wrapped.
    """

    def __init__(self):
        self.files, self.calls, self.active, self.own_port = set(), [], False, None
        sys.addaudithook(self._hear)
        self._stats = {name: getattr(os, name) for name in ("stat", "lstat")}
        for name, function in self._stats.items():
            setattr(os, name, self._noting(function))

    def _noting(self, function):
        def noting(path, *arguments, **options):
            if self.active and isinstance(path, str | os.PathLike):
                self.files.add(os.fspath(path))
            return function(path, *arguments, **options)

        return noting

    def _hear(self, event: str, arguments: tuple) -> None:
        if not self.active:
            return
        if event in ("open", "os.listdir", "os.scandir", "shutil.copyfile", "os.rename") and arguments:
            self.files.update(str(each) for each in arguments[:2] if isinstance(each, str | os.PathLike))
        elif event == "socket.connect" and arguments[1][1:2] != (self.own_port,):
            self.calls.append(arguments[1])
        elif event == "socket.getaddrinfo" and arguments[1] != self.own_port:
            self.calls.append(arguments[:2])

    def __enter__(self) -> "Witness":
        self.files, self.calls, self.active = set(), [], True
        return self

    def __exit__(self, *_):
        self.active = False

    def close(self) -> None:
        for name, function in self._stats.items():
            setattr(os, name, function)


@dataclass
class Answer:
    status: int
    text: str

    @property
    def value(self):
        """The first output."""
        return json.loads(self.text)["data"][0]


class Client:
    """Sends what no page would send."""

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        limits = httpx.Limits(max_keepalive_connections=0)  # gradio ends a connection after an error
        self.http = httpx.Client(base_url=url, timeout=20, trust_env=False, limits=limits)

    def upload(self, name: str, content: bytes) -> str:
        response = self.http.post("/gradio_api/upload", files={"files": (name, content)})
        (path,) = response.raise_for_status().json()
        return path

    def send(self, address: str, body: dict) -> httpx.Response:
        content = json.dumps(body)  # httpx's own JSON has no place for half a character, such as \ud800
        return self.http.post("/gradio_api/" + address, content=content, headers={"Content-Type": "application/json"})

    def ask(self, endpoint: str, *inputs, route: str = "run", **body) -> Answer:
        """An event over one of gradio's routes; what the client sees of it."""
        body |= {"data": inputs}
        if route == "queue":
            body = {"session_hash": os.urandom(8).hex(), "fn_index": self.index(endpoint)} | body
            response = self.send("queue/join", body)
            events = "queue/data?session_hash=" + body["session_hash"]
        elif route == "call":
            response = self.send(f"call/{endpoint}", body)
            events = f"call/{endpoint}/" + json.loads(response.text).get("event_id", "none")
        elif route == "predict":
            response, events = self.send("run/predict", body | {"fn_index": self.index(endpoint)}), None
        else:
            response, events = self.send(f"{route}/{endpoint}", body), None
        if events and response.status_code == 200:
            response = self.http.get("/gradio_api/" + events)
        return Answer(response.status_code, response.text)

    @functools.cache  # noqa: B019
    def index(self, endpoint: str) -> int:
        events = self.http.get("/config").json()["dependencies"]
        (found,) = (each["id"] for each in events if each["api_name"] == endpoint)
        return found

    def file(self, path: str) -> httpx.Response:
        return self.http.get("/gradio_api/file=" + urllib.parse.quote(path))
