"""A soak: many requests to Cog's own server, a tenth of them bad, and what they leave behind.

    python fuzz/soak.py --requests 10000 [--clients 4] [--seed 0]

The server is started by `python -m serving` with a small random model. After a tenth, half and all of the requests the
memory of each of its processes is printed, in MB, and in brackets the number of its open file descriptors. A failure,
for which the exit code is 1, is: an answer to a good picture that is not the first one, but for the last digits of the
scores, which depend on the pictures that went through the network together; an answer to a bad request that breaks
what `fuzz/server.py` checks; memory that grows by more than 5 % and 20 MB from half to the end; more file descriptors
than at a tenth, but for a few of connections under way; another process; a temporary file more than before. Linux
only.
"""

import sys
from pathlib import Path

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, so that `fuzz` and `convmixer` are found

import argparse
import itertools
import json
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from fuzz import requests
from fuzz.processes import descriptors, family, memory, name
from fuzz.server import GOOD, Runner
from fuzz.valid_pictures import valid_picture

KINDS = 20  # different good pictures
BAD = ("_picture", "_inputs", "_address", "_body", "_leaving")  # of fuzz/requests.py
MAX_GROWTH, MAX_GROWN_BYTES = 0.05, 20e6
DECODERS_HEAP = 128 * 2**20  # bytes that a decoder keeps between two pictures, as serving/decoder.py says
TOLERANCE = 1e-5  # between two scores
SPARE_DESCRIPTORS = 8  # of connections that are closed a moment later


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fuzz/soak.py", description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.requests < 10 or not 1 <= options.clients <= 64 or options.seed < 0:
        parser.exit(2, "fuzz/soak.py: give 10 requests or more, 1 to 64 clients and a seed of at least 0\n")
    runner = Runner(options.seed)
    try:
        runner.start()
        return soak(runner, options.requests, options.clients)
    finally:
        runner.close()


def soak(runner: Runner, total: int, clients: int) -> int:
    """The number of failures, each of which is printed."""
    server, failures = runner.server, []
    pictures = [requests.data_uri(valid_picture(7, kind)) for kind in range(KINDS)]
    first = [_output(server, picture) for picture in pictures]
    good = server.output(image=GOOD)
    before_files = _listing(server)
    busy, start = 0, time.monotonic()
    seen: list[dict[str, tuple[int, int]]] = []
    with ThreadPoolExecutor(clients) as pool:
        for begin, end in itertools.pairwise((0, total // 10, total // 2, total)):
            work = [pool.submit(_one, runner, number, pictures, first) for number in range(begin, end)]
            for future in work:
                retries, failure = future.result()
                busy += retries
                failures += [failure] if failure else []
            _settle(server)
            seen.append(_look(server.process.pid))
            sizes = ", ".join(f"{kind} {size / 1e6:.1f} ({files})" for kind, (size, files) in seen[-1].items())
            print(f"{end:>7,} requests: MB (descriptors): {sizes}", flush=True)
    seconds = time.monotonic() - start
    last = [_output(server, picture) for picture in pictures]
    if not all(map(_same, [server.output(image=GOOD), *last], [good, *first])):
        failures.append("the last answers are not the first")
    failures += _left(seen, before_files, _listing(server))
    grown = sum(size for size, _ in seen[-1].values()) - sum(size for size, _ in seen[0].values())
    bad = sum(map(_is_bad, range(total)))
    print(
        f"{total:,} requests, {bad:,} of them bad, by {clients} clients in {seconds:.0f} s: "
        f"{total / seconds:.0f} a second, {busy:,} times told to come back; {grown / 1e6:+.1f} MB from 10 % to 100 %; "
        f"{len(failures)} failures"
    )
    for failure in failures[:20]:
        print(f"  {failure}")
    return 1 if failures else 0


def _is_bad(number: int) -> bool:
    return number % 10 == 3


def _one(runner: Runner, number: int, pictures: list[str], first: list) -> tuple[int, str]:
    """One request; how often it had to come back, and what was wrong with the answer."""
    try:
        if _is_bad(number):
            rng = np.random.default_rng((runner.seed, number, 5))
            request = getattr(requests, BAD[number // 10 % len(BAD)])(rng, runner.seed)
            runner.send(json.loads(json.dumps(request)))
            return 0, ""
        kind = number % len(pictures)
        retries = 0
        while True:
            status, text = runner.server.request("POST", "/predictions", {"input": {"image": pictures[kind]}})
            if status != 409:
                break
            retries += 1
            time.sleep(0.002)
        found = json.loads(text).get("output") if status == 200 else text
        return retries, "" if _same(
            found, first[kind]
        ) else f"request {number}: another answer than the first: {text[:200]}"
    except (AssertionError, OSError, ValueError) as error:
        return 0, f"request {number}: {error}"


def _same(one: object, other: object) -> bool:
    """Whether two answers are equal, but for the last digits of the numbers in them."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) < TOLERANCE
    return one == other


def _output(server, picture: str):
    return server.output(image=picture)


def _settle(server) -> None:
    """Wait until nothing is under way, and have the files of the last request deleted by one more."""
    server.wait_for("READY")
    server.output(image=GOOD)
    time.sleep(0.5)


def _listing(server) -> set[str]:
    """What is in the server's temporary folder."""
    _settle(server)
    return {str(path) for path in server.temporary.rglob("*")}


def _look(pid: int) -> dict[str, tuple[int, int]]:
    """Bytes in memory and open file descriptors of each process of a server; a few of the latter come and go."""
    found: dict[str, tuple[int, int]] = {}
    for each in family(pid):
        kind = name(each)
        while kind in found:
            kind += "'"
        counts = []
        for _ in range(20):
            counts.append(descriptors(each))
            time.sleep(0.02)
        found[kind] = memory(each), min(counts)
    return found


def _left(seen: list[dict[str, tuple[int, int]]], before: set[str], after: set[str]) -> list[str]:
    failures = [] if seen[0].keys() == seen[-1].keys() else [f"other processes: {list(seen[0])}, then {list(seen[-1])}"]
    for kind, (end, files) in seen[-1].items():
        half, _ = seen[1].get(kind, (0, 0))
        if files > seen[0].get(kind, (0, 0))[1] + SPARE_DESCRIPTORS:
            failures.append(f"{kind} has {files} open files at the end, {seen[0].get(kind, (0, 0))[1]} at 10 %")
        if end - half > (DECODERS_HEAP if kind.startswith("decoder") else max(MAX_GROWN_BYTES, MAX_GROWTH * half)):
            failures.append(f"{kind} grew from {half / 1e6:.0f} to {end / 1e6:.0f} MB in the second half")
    return failures + [f"left behind: {path}" for path in sorted(after - before)]


if __name__ == "__main__":
    sys.exit(main())
