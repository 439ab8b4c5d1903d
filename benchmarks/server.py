"""The server under load: what an answer takes, and how much of that is neither Cog's server nor the model.

    python benchmarks/server.py [--clients 1 4 16] [--rounds 5] [--requests 100] [--json FILE]

Real HTTP on this machine: `python -m serving` with one slot and with sixteen, and the shipped model; beside each, Cog's
server with as many slots around an echo: a predictor with the same inputs that returns a constant.
The clients are threads that ask as docs/client.py does, coming back after each 409, each time with a JPEG of 640 x 480
pixels. The servers take turns, and in each round the model is also asked directly, in this process.

"Against echo + model": of the median latency with one client, of 1 / (requests a second) with several, which overlap.
"""

import base64
import contextlib
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, so that the rest is found

from benchmarks import harness
from benchmarks.harness import MODEL, Failure, Server
from docs.client import ServerError, ask

TOLERANCE = 1e-4  # between two scores; in a batch, sums are taken in another order
SLOTS = (1, 16)

# The same inputs. Nobody looks at the picture, which Cog decodes into a file as for every predictor with a Path.
ECHO = """
from cog import BaseRunner, Input, Path
from predict import MODELS, Output, Prediction


class Predictor(BaseRunner):
    async def run(
        self,
        image: Path = Input(description="The picture", accept="image/*"),
        model: str = Input(description="The model", default="auto", choices=MODELS),
        top_k: int = Input(description="How many classes", default=5, ge=1, le=100),
        heatmap: bool = Input(description="Also a heat map", default=False),
    ) -> Output:
        ranked = [Prediction(label=f"label {index}", index=index, score=index / 37) for index in range(top_k)]
        return Output(model="echo", engine="none", precision="none", predictions=ranked, heatmap=None)
"""


def start(kind: str, slots: int, folder: Path) -> Server:
    """ours: `python -m serving` with the shipped model; echo: Cog's server around a predictor with a constant."""
    from serving.__main__ import write_schema

    home = folder / f"{kind}-{slots}"
    home.mkdir()
    command = ["-m", "serving", "--port", "{port}", "--slots", slots]
    environment = {"COG_WEIGHTS": "", "CONVMIXER_CACHE": str(home)}  # no other model is found, whatever there is
    if kind == "echo":
        write_schema(home / ".cog" / "openapi_schema.json")
        (home / "echo.py").write_text(ECHO)
        environment = {"COG_PREDICT_TYPE_STUB": "echo.py:Predictor", "COG_MAX_CONCURRENCY": str(slots)}
        command = ["-m", "cog.server.http", "--host", "127.0.0.1"]
    return Server(f"{kind}, slots: {slots}", command, home / "log", cwd=home, env=environment)


def load(ask_one: Callable[[int], object], clients: int, requests: int) -> dict:
    """Clients that all ask at once, each one question after the other."""

    def timed(number: int) -> float:
        start = time.perf_counter()
        ask_one(number)
        return 1000 * (time.perf_counter() - start)

    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        milliseconds = list(pool.map(timed, range(requests)))
    return {"ms": milliseconds, "requests/s": requests / (time.perf_counter() - start)}


def figures(turns: list[dict]) -> list[float]:
    """Median, 95th and 99th percentile in milliseconds, requests a second."""
    ordered = sorted(ms for turn in turns for ms in turn["ms"])
    found = [ordered[min(len(ordered) - 1, len(ordered) * p // 100)] for p in (50, 95, 99)]
    return [*found, statistics.median(turn["requests/s"] for turn in turns)]


def measure(clients: list[int], rounds: int, requests: int, folder: Path) -> dict:
    """Every turn of the model and of every (kind, slots, clients). Raises Failure and ServerError."""
    from convmixer import Classifier

    picture, classifier = harness.photograph(640, 480), Classifier(MODEL)
    uri = f"data:image/jpeg;base64,{base64.b64encode(picture).decode()}"
    body, expected = json.dumps({"input": {"image": uri}}).encode(), classifier.classify(picture)

    def ask_one(number: int, server: Server) -> None:
        output = ask(body, server.url)
        pairs = zip(output["predictions"], expected, strict=True)
        right = all(a["label"] == b.label and abs(a["score"] - b.score) < TOLERANCE for a, b in pairs)
        if not right and output["model"] != "echo":
            raise Failure(f"{server.name} answers {output}")

    found = {"model": partial(load, lambda number: classifier.classify(picture), 1, 20)}
    with contextlib.ExitStack() as stack:
        for slots, kind in itertools.product(SLOTS, ("echo", "ours")):
            server = start(kind, slots, folder)
            stack.callback(server.close)
            this = partial(ask_one, server=server)
            load(this, max(clients), 2 * max(clients))  # whatever is done only once
            found |= {(kind, slots, number): partial(load, this, number, requests) for number in clients}
        return harness.take_turns(found, rounds)


def main() -> None:
    parser = harness.Parser(__doc__, rounds=5)
    parser.add_argument("--clients", type=harness.at_least_one, nargs="+", default=[1, 4, 16])
    parser.add_argument("--requests", type=harness.at_least_one, default=100, help="of all clients together, a round")
    options, rows = parser.parse_args(), []
    harness.print_machine()
    try:
        with tempfile.TemporaryDirectory() as folder:
            turns = measure(options.clients, options.rounds, options.requests, Path(folder))
    except ServerError as error:
        raise Failure(str(error)) from error
    model, *_ = figures(turns.pop("model"))
    found = {key: figures(each) for key, each in turns.items()}
    for (kind, slots, clients), own in found.items():
        echo, share = found["echo", slots, clients], None
        if kind == "ours":
            share = own[0] / (echo[0] + model) if clients == 1 else 1000 / own[-1] / (1000 / echo[-1] + model)
        rows.append([kind, slots, clients, *own, share])
    print(f"{options.rounds} rounds of {options.requests} requests; the model alone takes {model:.1f} ms\n")
    heads = ["", "slots", "clients", "p50 ms", "p95 ms", "p99 ms", "requests/s", "against echo + model"]
    print(harness.table(heads, rows))
    harness.write_json(options.json, {"model_ms": model, "rows": rows})


if __name__ == "__main__":
    harness.run(main)
