"""The servers that benchmarks/demo.py measures, and a client that speaks HTTP to them without a library."""

import json
import re
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException, HTTPResponse
from pathlib import Path

from benchmarks import harness
from benchmarks.harness import ROOT, Failure

MODEL = "convmixer_256_8_cifar10"
TOP_K = 10  # all classes of the shipped model, so that the whole vector of scores is compared


class Server(harness.Server):
    """A web server in a process of its own, with a folder of its own for uploads."""

    def __init__(self, *words: object, log: Path):
        self.uploads = log.with_suffix(".uploads")
        environment = {"GRADIO_TEMP_DIR": str(self.uploads), "GRADIO_ANALYTICS_ENABLED": "False"}
        super().__init__(str(words[0]), [*words, "--port", "{port}"], log, "/", cwd=ROOT, env=environment)
        config = Client(self).get("/config")
        self.functions = {event["api_name"]: event["id"] for event in config["dependencies"]}

    def state(self) -> dict[str, float]:
        """What the process holds: resident memory in MB, threads, open files, and files among its uploads."""
        if self.process.poll() is not None:
            raise Failure(f"a server ended with code {self.process.returncode}: {self.log.read_text()[-300:]!r}")
        files = sum(path.is_file() for path in self.uploads.rglob("*"))
        proc = Path(f"/proc/{self.process.pid}")
        if not proc.exists():  # not Linux
            return {"uploads": files}
        said = dict(re.findall(r"^(VmRSS|Threads):\s+(\d+)", (proc / "status").read_text(), re.MULTILINE))
        descriptors = len(list((proc / "fd").iterdir()))
        return {
            "MB": int(said["VmRSS"]) / 1024,
            "threads": int(said["Threads"]),
            "open files": descriptors,
            "uploads": files,
        }

    def complaints(self) -> int:
        """Tracebacks that the server printed."""
        return self.log.read_text().count("Traceback")


def serve_constant(port: int) -> None:
    """The floor: Gradio alone, with the same inputs, the same queue, and an answer of the same size."""
    import gradio as gr

    from demo.app import QUEUE

    rows = [{"label": "label", "index": index, "score": index / 37} for index in range(TOP_K)]
    answer = {"model": MODEL, "predictions": rows, "seconds": 0.0}
    with gr.Blocks(analytics_enabled=False) as page:
        inputs, output = [gr.File(), gr.Textbox(), gr.Number()], gr.JSON()
        options = {"api_name": "classify", "concurrency_limit": 1, "preprocess": False}  # which would copy the file
        gr.Button().click(lambda file, model, top_k: answer, inputs, output, **options)
    page.queue(max_size=QUEUE).launch(server_name="127.0.0.1", server_port=port, ssr_mode=False, quiet=True)


@dataclass(frozen=True)
class Picture:
    """A picture file, and the right answer about it: the score of each class."""

    content: bytes
    scores: list[float]


@dataclass
class Outcome:
    """What one request came to."""

    seconds: float
    rows: list[dict] | None = None  # predictions
    error: str = ""
    refused: bool = False  # because the queue was full
    places: list[int] = field(default_factory=list)  # in the queue, as the client was told them


class Client:
    """Speaks to a server as Gradio's own clients do, with less work: upload, join the queue, read the events."""

    def __init__(self, server: Server):
        self.server, self.session = server, secrets.token_hex(6)
        self.http = HTTPConnection("127.0.0.1", server.port, timeout=120)

    def request(self, method: str, path: str, body: bytes | None = None, kind: str = "") -> HTTPResponse:
        self.http.request(method, path, body, {"Content-Type": kind} if kind else {})
        return self.http.getresponse()

    def get(self, path: str) -> dict:
        return json.loads(self.request("GET", path).read())

    def upload(self, content: bytes) -> str:
        """Gives the path of the upload on the server."""
        head = b'--limit\r\nContent-Disposition: form-data; name="files"; filename="picture.jpg"\r\n'
        body = head + b"Content-Type: image/jpeg\r\n\r\n" + content + b"\r\n--limit--\r\n"
        response = self.request("POST", "/gradio_api/upload", body, "multipart/form-data; boundary=limit")
        return json.loads(response.read())[0]

    def join(self, path: str) -> str:
        """Asks /classify about an upload; gives the server's reason if it refuses."""
        file = {"path": path, "meta": {"_type": "gradio.FileData"}}
        event = {"data": [file, "auto", TOP_K], "fn_index": self.server.functions["classify"]}
        body = json.dumps(event | {"session_hash": self.session}).encode()
        response = self.request("POST", "/gradio_api/queue/join", body, "application/json")
        text = response.read().decode()
        return "" if response.status == 200 else f"{response.status} {text}"

    def events(self) -> Iterator[dict]:
        """What the server says about this client's request, until it closes the stream."""
        response = self.request("GET", f"/gradio_api/queue/data?session_hash={self.session}")
        for line in iter(response.readline, b""):
            if line.startswith(b"data: "):
                yield json.loads(line[6:])

    def ask(self, content: bytes, before: Callable[[], object] = lambda: None) -> Outcome:
        """before: called between the upload and the question."""
        start = time.perf_counter()
        outcome = Outcome(0)
        try:
            path = self.upload(content)
            before()
            if refusal := self.join(path):
                outcome.error, outcome.refused = refusal, refusal.startswith("503")
            for event in () if refusal else self.events():
                if event["msg"] == "estimation":
                    outcome.places.append(event["rank"])
                elif event["msg"] == "process_completed" and event["success"]:
                    outcome.rows = event["output"]["data"][0]["predictions"]
                elif event["msg"] in ("process_completed", "unexpected_error"):
                    outcome.error = str(event.get("output") or event["message"])
            if outcome.rows is None and not outcome.error:
                outcome.error = "no answer"
        except (OSError, HTTPException, ValueError) as error:
            outcome.error = f"{type(error).__name__}: {error}"
            self.http.close()
        outcome.seconds = time.perf_counter() - start
        return outcome
