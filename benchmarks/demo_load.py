"""The demo's API under many clients at once; every answer is compared with the classifier's own."""

import io
import itertools
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from benchmarks.demo_server import MODEL, Client, Outcome, Picture, Server
from benchmarks.harness import percentiles

TOLERANCE = 1e-5  # between two scores; the same picture gives the same one, but for the order of a few sums
APART = 1e-3  # at least, the largest difference between two pictures' scores: a mistaken one would be noticed
ROUNDS = 5
PICTURES = 4  # of each client, its own


def draw_pictures() -> Iterator[bytes]:
    """JPEG files of 480 x 360 pixels without end: the demo's examples under clouds of colour."""
    import numpy as np
    from PIL import Image

    from demo.drawings import draw_examples

    rng = np.random.default_rng(0)
    for example in itertools.cycle(draw_examples().values()):
        clouds = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
        clouds = clouds.resize(example.size, Image.Resampling.BICUBIC)
        turned = example.rotate(float(rng.uniform(-40, 40)))
        yield jpeg(Image.blend(turned, clouds, float(rng.uniform(0.2, 0.8))))


def jpeg(picture) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=88)
    return stream.getvalue()


def pictures_with_answers(number: int) -> list[Picture]:
    """Pictures that are told apart by their right answers, which the classifier gives without any server."""
    from convmixer import Classifier

    classifier, pictures = Classifier(MODEL), []
    for content in draw_pictures():  # one at a time, as the demo does
        picture = Picture(content, classifier.scores([content])[0].tolist())
        if all(largest_difference(picture.scores, other.scores) > APART for other in pictures):
            pictures.append(picture)
        if len(pictures) == number:
            return pictures


def largest_difference(one: list[float], two: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, two, strict=True))


def is_right(rows: list[dict], picture: Picture) -> bool:
    """Every class once, the best first, each with the score that it should have."""
    given = {row["index"]: row["score"] for row in rows}
    falling = all(one["score"] >= two["score"] for one, two in itertools.pairwise(rows))
    complete = len(rows) == len(given) == len(picture.scores)
    right = [given.get(index, -1) for index in range(len(picture.scores))]
    return falling and complete and largest_difference(right, picture.scores) <= TOLERANCE


def run_load(ours: Server, floor: Server, pictures: list[Picture], clients: int, requests: int) -> dict:
    """All clients at once, each asking one question after the other, in rounds that alternate between the servers."""
    servers = {"ours": ours, "floor": floor}
    groups = {name: [Client(server) for _ in range(clients)] for name, server in servers.items()}
    outcomes, rates, before = {"ours": [], "floor": []}, {"ours": [], "floor": []}, {}
    memory, wrong, told = {"ours": [], "floor": []}, 0, set()
    marks = {200, *range(1000, requests, 1000)} - {requests}
    for name, server in servers.items():
        groups[name][0].ask(pictures[0].content)  # whatever is done only once
        before[name] = server.state()
        memory[name].append((0, before[name].get("MB")))
    for number, name in itertools.product(range(ROUNDS), servers):
        shares = split(split(requests, ROUNDS)[number], clients)
        lock = threading.Lock()

        def work(index: int, name: str = name, number: int = number, shares: list[int] = shares, lock=lock) -> None:
            nonlocal wrong
            client = groups[name][index]
            client.http.close()  # the server has closed it, for it was idle
            for step in range(shares[index]):
                picture = pictures[PICTURES * index + (number + step) % PICTURES]
                outcome = client.ask(picture.content)
                with lock:
                    outcomes[name].append(outcome)
                    if name == "ours":
                        wrong += outcome.rows is not None and not is_right(outcome.rows, picture)
                        told.update([index] if any(outcome.places) else [])
                    if len(outcomes[name]) in marks:
                        memory[name].append((len(outcomes[name]), servers[name].state().get("MB")))

        start = time.perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            list(pool.map(work, range(clients)))
        rates[name].append(sum(shares) / (time.perf_counter() - start))
    result = {}
    for name, server in servers.items():
        seconds = [outcome.seconds for outcome in outcomes[name]]
        after = server.state()
        memory[name].append((len(seconds), after.get("MB")))
        result[name] = {
            "requests": len(seconds),
            "requests/s": statistics.median(rates[name]),
            "requests/s of each round": rates[name],
            **percentiles(seconds),
            "errors": Counter(outcome.error for outcome in outcomes[name] if outcome.error),
            "MB": memory[name],
            "before": before[name],
            "after": after,
        }
    result["ours"] |= {"wrong": wrong, "told": len(told)}
    return result


def split(total: int, parts: int) -> list[int]:
    """A number as a sum of ``parts`` numbers that are as equal as can be."""
    return [total // parts + (index < total % parts) for index in range(parts)]


def run_queue(server: Server, pictures: list[Picture]) -> dict:
    """Twice as many questions at the same moment as may wait, and afterwards those that were refused once more."""
    from demo.app import QUEUE

    number = 2 * QUEUE
    before, start = server.state(), threading.Barrier(number)
    asked = [pictures[index % len(pictures)] for index in range(number)]

    def burst(picture: Picture) -> Outcome:
        return Client(server).ask(picture.content, lambda: start.wait(60))

    with ThreadPoolExecutor(number) as pool:
        first = list(pool.map(burst, asked))
    again = [picture for picture, outcome in zip(asked, first, strict=True) if outcome.error]
    second = [Client(server).ask(picture.content) for picture in again]
    answered = [*zip(asked, first, strict=True), *zip(again, second, strict=True)]
    wrong = sum(outcome.rows is not None and not is_right(outcome.rows, picture) for picture, outcome in answered)
    return {
        "questions": number,
        "limit": QUEUE,
        "answered": sum(outcome.rows is not None for outcome in first),
        "refused": sum(outcome.refused for outcome in first),
        "refusal": next((outcome.error for outcome in first if outcome.refused), ""),
        "errors": Counter(outcome.error for outcome in first if outcome.error and not outcome.refused),
        "answered afterwards": sum(outcome.rows is not None for outcome in second),
        "wrong": wrong,
        "before": before,
        "after": server.state(),
    }
