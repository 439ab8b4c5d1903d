"""The demo's page on a server in this process, a raw client for it, and a witness of what the process opens."""

import functools
import io
import json
import os
import sys
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

SHIPPED, SECOND = "convmixer_256_8_cifar10", "second"
HAS_MCP = find_spec("mcp") is not None


def draw(seed: int, width: int = 60, height: int = 40) -> Image.Image:
    """A picture of soft colours; another one for each seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encode(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def png(seed: int) -> bytes:
    return encode(draw(seed))


def write_checkpoint(
    path: Path, name: str = SECOND, labels=None, seed: int = 0, size: int = 32, **architecture
) -> Path:
    """A checkpoint of a randomly initialised network."""
    import torch

    from convmixer.model import ConvMixer, ConvMixerConfig
    from convmixer.preprocessing import Preprocessing
    from convmixer.weights import Checkpoint, save_checkpoint

    labels = tuple(labels or (f"{name} {index}" for index in range(7)))
    shape = {"dim": 16, "depth": 3, "kernel_size": 5, "patch_size": 2, "num_classes": len(labels)} | architecture
    config = ConvMixerConfig(**shape)
    torch.manual_seed(seed)
    save_checkpoint(path, Checkpoint(name, config, ConvMixer(config).state_dict(), labels, Preprocessing(size), {}, {}))
    return path


def value(answer: httpx.Response):
    """The first output, or the error's text. Over the route "call" what is said last."""
    said = json.loads(answer.text.rpartition("\ndata: ")[2])
    outputs = said.get("data", said) if isinstance(said, dict) else said
    return outputs["error"] if "error" in outputs else outputs[0]


class Client:
    """Gradio's HTTP interface, without the checks of its own clients."""

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        limits = httpx.Limits(max_keepalive_connections=0)  # gradio ends a connection after an error
        self.http = httpx.Client(base_url=self.url, timeout=60, trust_env=False, limits=limits)

    def upload(self, name: str, content: bytes) -> str:
        response = self.http.post("/gradio_api/upload", files={"files": (name, content)})
        (path,) = response.raise_for_status().json()
        return path

    def send(self, address: str, body: dict) -> httpx.Response:
        content = json.dumps(body)  # httpx's own JSON has no place for half a character, such as \ud800
        return self.http.post("/gradio_api/" + address, content=content, headers={"Content-Type": "application/json"})

    def ask(self, event: str | int, *inputs, route: str = "run", **body) -> httpx.Response:
        """An event, by its name or number, over one of gradio's routes; what the client sees of it."""
        body |= {"data": inputs}
        number = event if isinstance(event, int) else self.number(event)
        if route == "queue":
            body |= {"session_hash": os.urandom(8).hex(), "fn_index": number}
            response, events = self.send("queue/join", body), f"queue/data?session_hash={body['session_hash']}"
        elif route == "call":
            response = self.send(f"call/{event}", body)
            events = f"call/{event}/{json.loads(response.text).get('event_id')}"
        else:
            address = f"{route}/{event}" if isinstance(event, str) else "run/predict"
            response, events = self.send(address, body | {"fn_index": number}), None
        if events and response.status_code == 200:
            response = self.http.get("/gradio_api/" + events)
        return response

    @functools.cached_property
    def events(self) -> list[dict]:
        """Those that the server answers."""
        return [each for each in self.http.get("/config").json()["dependencies"] if each["backend_fn"]]

    def number(self, name: str) -> int:
        (found,) = (each["id"] for each in self.events if each["api_name"] == name)
        return found

    def file(self, path: str) -> httpx.Response:
        return self.http.get("/gradio_api/file=" + urllib.parse.quote(path))


class Witness:
    """Notes what files this process opens and what hosts it calls in the with block, by Python's audit events."""

    def __init__(self, own_port: int):
        self.files, self.calls, self.active, self.own_port = set(), [], False, own_port
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple) -> None:
        if not self.active:
            return
        if event in ("open", "os.listdir", "os.scandir", "shutil.copyfile", "os.rename"):
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


@dataclass
class Served:
    """The running page, and what lies beside its uploads."""

    page: object
    models: object
    examples: dict[str, Image.Image]
    client: Client
    witness: Witness
    uploads: Path
    outside: Path

    def uploaded(self) -> set[Path]:
        return {path for path in self.uploads.rglob("*") if path.is_file()}

    def answer(self, picture: bytes | Image.Image, model: str = SHIPPED) -> tuple[list, list]:
        """What the classifier says to this picture by itself: predictions and heat maps."""
        return self.models.get(model).classify_with_heatmaps(picture, 5)


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[Served]:
    from demo.app import examples
    from demo.guard import launch_options
    from demo.models import Models
    from demo.page import LOOKS, build

    parent = tmp_path_factory.mktemp("served")
    outside = parent / "outside" / ("f" * 64)  # looks like a folder of uploads
    outside.mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(parent / "uploads"))
        patch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
        patch.setenv("CONVMIXER_CACHE", str(parent / "cache"))
        patch.delenv("COG_WEIGHTS", raising=False)
        models, pictures = Models([SHIPPED, str(write_checkpoint(parent / "second.safetensors"))]), examples()
        page = build(models, pictures).queue(max_size=100)
        _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, **launch_options(mcp=HAS_MCP) | LOOKS)
        client, witness = Client(url), Witness(page.server_port)
        yield Served(page, models, pictures, client, witness, parent / "uploads", outside)
        page.close(verbose=False)


@pytest.fixture
def client(served) -> Client:
    return served.client


FIXTURES = served, client
