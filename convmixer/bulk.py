"""Many pictures at the machine's limit: decoded on all cores while the network runs, in bounded memory."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

from .cpu.threads import usable_cpus
from .images import ImageError

AHEAD = 2  # batches that are decoded, or being decoded, before the network takes them


def prepared(sources: Iterable, prepare: Callable, batch: int, workers: int | None = None) -> Iterator[list]:
    """Lists of up to ``batch`` of what ``prepare`` makes of each source, in order; an ImageError stands for itself.

    ``prepare`` runs in ``workers`` threads, by default one for each CPU: decoders, and resizing, let go of Python's
    lock. While the caller is busy with one list, the next ones are made.
    """

    def attempt(source):
        try:
            return prepare(source)
        except ImageError as error:
            return error

    sources, waiting = iter(sources), deque()
    pool = ThreadPoolExecutor(workers or usable_cpus(), thread_name_prefix="prepare")
    try:
        while True:
            missing = AHEAD * batch - len(waiting)
            waiting.extend(pool.submit(attempt, source) for source in islice(sources, missing))
            if not waiting:
                return
            yield [waiting.popleft().result() for _ in range(min(batch, len(waiting)))]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
