"""The server under load: what an answer takes, and how much of that is neither Cog's server nor the model.

    python benchmarks/server.py [--clients 1 4 16] [--rounds 5] [--requests 100] [--slots 16] [--json FILE]

Real servers, real HTTP, all on this machine: `python -m serving` with one slot and with sixteen, and the shipped model;
beside each, Cog's server with as many slots around an echo: a predictor with the same inputs that returns a constant.
The clients are threads that ask as docs/client.py does, coming back after each 409; what that costs counts into the
latency. Every request carries a JPEG of 640 x 480 pixels, about 100 kB, as a data URI. Rounds alternate between the
servers, and in each round the model is also asked directly, in this process, while no client is there.

Against the sum of echo and model there stand

- with one client, the median latency: ours / (echo + model);
- with several, what one answer occupies the server for, 1 / (requests a second): ours / (echo + model), where
  echo is 1 / (its requests a second with as many clients). The server's own work for one client may overlap with the
  model's for another, so that this can be below 1.

The model is timed with one picture right after the other, the fastest it can be. Its time after a pause, when caches
and threads have gone cold, is also printed, and enters no ratio. The last table says what the network takes for one
picture when several go through it together.
"""

import argparse
import base64
import contextlib
import io
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # the repository, so that `docs` and `benchmarks` are found

from benchmarks.harness import Failure, Server, percentiles, print_machine, table, write_json  # noqa: E402
from benchmarks.options import at_least_one, in_a_folder  # noqa: E402
from docs.client import ServerError, ask  # noqa: E402

MODEL = "convmixer_256_8_cifar10"
WIDTH, HEIGHT = 640, 480
TOLERANCE = 1e-4  # between two scores; in a batch, sums are taken in another order
BATCHES = (1, 2, 4, 8, 16)
PAUSE = 0.003  # seconds; about what the server itself takes between two uses of the model

# The same inputs, checked against the same description. Nobody looks at the picture, which Cog decodes into a file as
# for every predictor with a Path.
ECHO = """
import sys
sys.path.insert(0, {root!r})
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
        ranked = [Prediction(label=f"label {{index}}", index=index, score=index / 37) for index in range(top_k)]
        return Output(model="echo", engine="none", precision="none", predictions=ranked, heatmap=None)
"""


def start_ours(folder: Path, slots: int) -> Server:
    """`python -m serving` with the shipped model."""
    command = ["-m", "serving", "--port", "{port}", "--slots", slots]
    name = f"serving, {slots} slots" if slots > 1 else "serving, 1 slot"
    # No other model is to be found, whatever this machine has.
    weights = {"COG_WEIGHTS": "", "CONVMIXER_CACHE": str(folder)}
    log = folder / f"{name}.log"
    return Server(name, command, log, cwd=folder, env={"PYTHONPATH": str(ROOT)} | weights)


def start_echo(folder: Path, slots: int) -> Server:
    """Cog's server, with as many slots, around a predictor that returns a constant."""
    from serving.__main__ import write_schema

    home = folder / f"echo-{slots}"
    home.mkdir()
    write_schema(home / ".cog" / "openapi_schema.json")
    (home / "echo.py").write_text(ECHO.format(root=str(ROOT)))
    environment = {"COG_PREDICT_TYPE_STUB": "echo.py:Predictor", "COG_MAX_CONCURRENCY": str(slots)}
    command = ["-m", "cog.server.http", "--host", "127.0.0.1"]
    name = f"echo, {slots} slots" if slots > 1 else "echo, 1 slot"
    return Server(name, command, folder / f"{name}.log", cwd=home, env=environment)


def draw_jpeg() -> bytes:
    """A picture as noisy as a photograph."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    clouds = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    clouds = np.asarray(clouds.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))
    noisy = (clouds + rng.normal(0, 8, (HEIGHT, WIDTH, 1))).clip(0, 255).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noisy).save(stream, "JPEG", quality=88)
    return stream.getvalue()


def request_body(picture: bytes) -> bytes:
    uri = f"data:image/jpeg;base64,{base64.b64encode(picture).decode()}"
    return json.dumps({"input": {"image": uri}}).encode()


def load(server: Server, body: bytes, clients: int, requests: int, check: Callable[[dict], bool]) -> dict:
    """All clients at once, each asking one question after the other: latencies, seconds in all, wrong answers."""
    seconds, wrong, lock = [], 0, threading.Lock()

    def work(index: int) -> None:
        nonlocal wrong
        for _ in range(requests // clients + (index < requests % clients)):
            start = time.perf_counter()
            output = ask(body, server.url)
            taken = time.perf_counter() - start
            with lock:
                seconds.append(taken)
                wrong += not check(output)

    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(work, range(clients)))
    return {"seconds": seconds, "all": time.perf_counter() - start, "wrong": wrong}


def times(action: Callable[[], object], number: int, pause: float = 0) -> list[float]:
    taken = []
    for _ in range(number):
        time.sleep(pause)
        start = time.perf_counter()
        action()
        taken.append(time.perf_counter() - start)
    return taken


def measure(options: argparse.Namespace, folder: Path) -> dict:
    """Every round of every server; raises Failure and ServerError."""
    from convmixer import Classifier

    picture = draw_jpeg()
    body, classifier = request_body(picture), Classifier(MODEL)
    expected = [(each.label, each.score) for each in classifier.classify(picture)]

    def is_right(output: dict) -> bool:
        found = [(each["label"], each["score"]) for each in output["predictions"]]
        pairs = zip(found, expected, strict=True)
        return all(one[0] == two[0] and abs(one[1] - two[1]) < TOLERANCE for one, two in pairs)

    def is_echo(output: dict) -> bool:
        return output["model"] == "echo"

    cells: dict[str, dict[int, list[dict]]] = {}
    model, rested, network = [], [], {batch: [] for batch in BATCHES}
    prepared = classifier.prepare(picture)
    with contextlib.ExitStack() as stack:
        contestants = []
        for slots in sorted({1, options.slots}):
            for start, check in ((start_echo, is_echo), (start_ours, is_right)):
                server = start(folder, slots)
                stack.callback(server.close)
                contestants.append((server, check))
                cells[server.name] = {clients: [] for clients in options.clients}
        for server, check in contestants:
            load(server, body, max(options.clients), 2 * max(options.clients), check)  # whatever is done only once
        for _ in range(options.rounds):
            model += times(lambda: classifier.classify(picture), 20)
            rested += times(lambda: classifier.classify(picture), 20, PAUSE)
            for batch, taken in network.items():
                taken += [each / batch for each in times(lambda batch=batch: classifier.logits([prepared] * batch), 5)]
            for clients in options.clients:
                for server, check in contestants:
                    cells[server.name][clients].append(load(server, body, clients, options.requests, check))
    return {
        "rounds": options.rounds,
        "requests a round": options.requests,
        "body bytes": len(body),
        "model seconds": statistics.median(model),
        "model seconds after a pause": statistics.median(rested),
        "network seconds a picture": {batch: statistics.median(taken) for batch, taken in network.items()},
        "servers": {
            name: {clients: summary(rounds) for clients, rounds in by_clients.items()}
            for name, by_clients in cells.items()
        },
    }


def summary(rounds: list[dict]) -> dict:
    """The percentiles of all latencies of all rounds, and the median round's requests a second."""
    seconds = [taken for one in rounds for taken in one["seconds"]]
    return {
        **percentiles(seconds),
        "requests/s": statistics.median(len(one["seconds"]) / one["all"] for one in rounds),
        "requests": len(seconds),
        "wrong": sum(one["wrong"] for one in rounds),
    }


def ratio(ours: dict, echo: dict, model: float, clients: int) -> float:
    """As the text at the top says: 1 would be nothing but Cog's server and the model, one after the other."""
    if clients == 1:
        return ours["p50"] / (echo["p50"] + model)
    return (1 / ours["requests/s"]) / (1 / echo["requests/s"] + model)


def print_result(result: dict) -> None:
    model, rows, names = result["model seconds"], [], list(result["servers"])
    print(f"{result['rounds']} rounds of {result['requests a round']} requests, {result['body bytes']:,} bytes each")
    print(
        f"The model alone, from the JPEG to the answer, in this process: {1000 * model:.1f} ms; after a pause of",
        end="",
    )
    print(f" {1000 * PAUSE:g} ms, as in a server: {1000 * result['model seconds after a pause']:.1f} ms\n")
    for echo, name in zip(names[::2], names[1::2], strict=True):
        for each in (echo, name):
            for clients, cell in result["servers"][each].items():
                share = None if each == echo else ratio(cell, result["servers"][echo][clients], model, clients)
                latency = [1000 * cell[f"p{p}"] for p in (50, 95, 99)]
                rows.append([each, clients, *latency, cell["requests/s"], share, cell["wrong"]])
    heads = ["server", "clients", "p50 ms", "p95 ms", "p99 ms", "requests/s", "against echo + model", "wrong answers"]
    print(table(heads, rows))
    network = [[batch, 1000 * seconds] for batch, seconds in result["network seconds a picture"].items()]
    print("\n" + table(["pictures together", "network, ms a picture"], network))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=at_least_one, nargs="+", default=[1, 4, 16], help="default: 1 4 16")
    parser.add_argument("--rounds", type=at_least_one, default=5)
    parser.add_argument("--requests", type=at_least_one, default=100, help="of all clients together, in each round")
    parser.add_argument("--slots", type=at_least_one, default=16, help="of the second pair of servers; 1 for none")
    parser.add_argument("--json", type=in_a_folder, metavar="FILE", help="write every figure there, too")
    options = parser.parse_args()
    print_machine()
    try:
        with tempfile.TemporaryDirectory() as folder:
            result = measure(options, Path(folder))
        print_result(result)
        write_json(options.json, result)
    except (Failure, ServerError, OSError) as error:
        print(f"benchmarks/server.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
