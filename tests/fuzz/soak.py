"""A soak: many requests to Cog's own server by four clients, a tenth of them bad, and what they leave behind.

    python tests/fuzz/soak.py --requests 10000

After a tenth, half and all of the requests the memory of each of the server's processes is printed, in MB, and in
brackets the number of its open file descriptors. A failure is a wrong answer, or one that speaks of the server; memory
that grows by more than 5 % and 20 MB from half to the end; more file descriptors than at a tenth, but for a few of
connections under way; another process; a temporary file more than before. Linux only.
"""

import argparse
import itertools
import json
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

if not __package__:  # run as a script
    sys.path[0:1] = map(str, Path(__file__).resolve().parents[1:3])  # `fuzz`, `cog_server`, `convmixer` are found

from cog_server import Server, data_uri, expect
from processes import children, speaks_of

from fuzz.pictures import seeds

MAX_GROWTH, MAX_GROWN_BYTES = 0.05, 20e6
DECODERS_HEAP = 128 * 2**20  # bytes that a decoder keeps between two pictures, as serving/decoder.py says
KINDS = ("decoding", "watcher", "coglet", "cog.server", "serving")  # words of the command lines
TEXTS = ("/etc/passwd", "http://127.0.0.1:9/x", "data:image/png;base64,A", "x" * 2_000_000)
BAD = [{"image": image} for image in (*TEXTS, *(data_uri(each[: len(each) // 2]) for each in seeds()[::7]))]
BAD += [{}, *({"image": data_uri(seeds()[0])} | wrong for wrong in ({"top_k": 0}, {"model": "none"}))]


def ask(server: Server, number: int) -> str:
    """What is wrong with the answer to one request, if anything is."""
    picture = seeds()[number % 20]
    try:
        if number % 10 == 3:
            status, text = server.send({"input": BAD[number // 10 % len(BAD)]})
            assert status == 422 or (status == 200 and json.loads(text)["status"] == "failed"), text
        else:
            expect(server.output(image=data_uri(picture)), server.classifier, picture)
    except AssertionError as error:
        return f"request {number}: {error}"
    return ""


def look(server: Server) -> dict[str, tuple[int, int]]:
    """Bytes in memory and open file descriptors of each process of a server at rest; some of the latter come and go."""
    server.wait_for("READY")
    family, found = [server.process.pid], {}
    for pid in family:  # grows meanwhile
        family += children(pid)
        name = next(kind for kind in KINDS if speaks_of(pid, kind))
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        counts = [len(os.listdir(f"/proc/{pid}/fd")) for _ in range(10) if not time.sleep(0.02)]
        name += "'" * sum(known.rstrip("'") == name for known in found)
        found[name] = pages * os.sysconf("SC_PAGE_SIZE"), min(counts)
    return found


def left(tenth: dict, half: dict, end: dict) -> list[str]:
    """What is more at the end than it was, of what `look` gives."""
    failures = [] if tenth.keys() == half.keys() == end.keys() else ["other processes than before"]
    for name in tenth.keys() & half.keys() & end.keys():
        before, (size, files) = half[name][0], end[name]
        room = DECODERS_HEAP if name.startswith("decoding") else MAX_GROWN_BYTES
        if files > tenth[name][1] + 8 or size - before > max(room, MAX_GROWTH * before):
            failures.append(f"{name} has grown: {tenth[name]}, {half[name]}, {end[name]} bytes and open files")
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests/fuzz/soak.py", description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=10_000)
    total, failures, seen, start = parser.parse_args().requests, [], [], time.monotonic()
    folder, pool = tempfile.TemporaryDirectory(prefix="convmixer-fuzz-"), ThreadPoolExecutor(4)
    with folder, pool, Server(Path(folder.name)) as server:
        files = {*server.temporary.rglob("*")}
        for begin, end in itertools.pairwise((0, total // 10, total // 2, total)):
            failures += filter(None, pool.map(partial(ask, server), range(begin, end)))
            seen.append(look(server))
            sizes = (f"{name} {size / 1e6:.1f} ({files})" for name, (size, files) in seen[-1].items())
            print(f"{end:>7,} requests: MB (descriptors): {', '.join(sizes)}", flush=True)
        failures += left(*seen) + [f"left behind: {path}" for path in {*server.temporary.rglob("*")} - files]
    print(f"{total:,} requests in {time.monotonic() - start:.0f} s; {len(failures)} failures")
    print(*failures[:20], sep="\n")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
