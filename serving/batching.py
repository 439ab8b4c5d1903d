"""Requests that come at about the same time go through the network together.

A GPU takes hardly longer for sixteen pictures than for one. So what several requests want is gathered for a few
milliseconds and handed over as one list, by one thread, which is the only one that uses the device.
"""

import asyncio
import contextlib
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

Run = Callable[[list[Any]], list[Any]]  # the items of a batch to their results, in the same order


@dataclass(frozen=True)
class _Entry:
    """One request that is ready for the network."""

    item: Any
    result: Future = field(default_factory=Future)  # it also says whether somebody still wants it
    since: float = field(default_factory=time.monotonic)


class Batcher:
    """Gathers requests into batches.

    window_s: how long, in seconds, the first request of a batch waits for others. It waits only while others are being
        prepared: a request that is alone goes at once.
    max_batch: no more than this many go together.
    preparers: threads that prepare requests, mostly waiting for something else that decodes pictures.

    Raises ValueError for a number that is out of range.
    """

    def __init__(self, *, window_s: float = 0.005, max_batch: int = 64, preparers: int = 4):
        for name, value, least in (("window_s", window_s, 0), ("max_batch", max_batch, 1), ("preparers", preparers, 1)):
            if not value >= least:
                raise ValueError(f"{name} is {value!r}; it must be at least {least}")
        self.window_s, self.max_batch = window_s, max_batch
        self._changed = threading.Condition()  # guards the four below, and tells of every change
        self._waiting: dict[Run, deque[_Entry]] = {}  # prepared, not yet begun; no empty ones
        self._coming: Counter[Run] = Counter()  # being prepared
        self._is_closed = False
        self._is_working = True
        self._preparers = ThreadPoolExecutor(preparers, thread_name_prefix="prepare")
        # A daemon: a process that ends without close() does not wait for requests that nobody can answer any more.
        self._thread = threading.Thread(target=self._work, name="device", daemon=True)
        self._thread.start()

    async def submit(self, run: Run, prepare: Callable[[], Any]) -> Any:
        """What ``run`` makes of the item that ``prepare`` gives.

        prepare: called in a thread; what it raises is raised here, and no other request notices.
        run: called in the device's thread with the items of all requests that came with an equal ``run``, and gives as
            many results. If it raises, each item is tried again alone, so that only the guilty one's request fails,
            with what ``run`` raised for it.

        A caller may be cancelled at any time: what has not begun is not begun, and the others get their answers.
        Raises RuntimeError once the batcher is closed.
        """
        with self._announced(run):
            entry = _Entry(await asyncio.get_running_loop().run_in_executor(self._preparers, prepare))
            with self._changed:
                self._waiting.setdefault(run, deque()).append(entry)
        return await asyncio.wrap_future(entry.result)

    async def close(self) -> None:
        """Take no more requests, and return when all that were taken have been answered."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        await asyncio.to_thread(self._thread.join)
        self._preparers.shutdown(wait=False)

    @contextlib.contextmanager
    def _announced(self, run: Run) -> Iterator[None]:
        """While in this context, one more request with ``run`` is being prepared."""
        with self._changed:
            if self._is_closed:
                raise RuntimeError("the server is shutting down and takes no more requests")
            self._coming[run] += 1
        try:
            yield
        finally:
            with self._changed:
                self._coming[run] -= 1
                if not self._coming[run]:
                    del self._coming[run]
                self._changed.notify()

    def _work(self) -> None:
        """The device's thread: one batch after the other."""
        while self._is_working:
            # Cog cancels by raising an exception in a thread that it knows by number only. Should it ever be this one,
            # the requests that come later must not wait for a thread that is gone.
            with contextlib.suppress(BaseException):
                self._work_once()

    def _work_once(self) -> None:
        """Wait for the next batch and run it."""
        # A function of its own, so that no large item outlives its batch in a variable.
        run, entries = self._next_batch()
        if run is None:
            self._is_working = False
            return
        try:
            if not _run_together(run, entries):
                for entry in entries:
                    _run_alone(run, entry)
        finally:
            for entry in entries:
                if not entry.result.done():
                    entry.result.set_exception(RuntimeError("the request was interrupted; send it again"))

    def _next_batch(self) -> tuple[Run | None, list[_Entry]]:
        with self._changed:
            while True:
                if self._is_closed and not self._waiting and not self._coming:
                    return None, []
                now = time.monotonic()
                starts = {run: self._start(run, now) for run in self._waiting}
                ready = [run for run, start in starts.items() if start <= now]
                if ready:  # of several, the one whose first request has waited longest: no model starves another
                    chosen = min(ready, key=lambda run: self._waiting[run][0].since)
                    if entries := self._take(chosen):
                        return chosen, entries
                else:
                    self._changed.wait(min(starts.values()) - now if starts else None)

    def _start(self, run: Run, now: float) -> float:
        """When the next batch of ``run`` is to begin; now, if there is nothing to wait for."""
        waiting = self._waiting[run]
        is_complete = len(waiting) >= self.max_batch or not self._coming[run]
        return now if is_complete else waiting[0].since + self.window_s

    def _take(self, run: Run) -> list[_Entry]:
        """The next batch, without the requests that were cancelled meanwhile; the rest stays waiting."""
        waiting, entries = self._waiting[run], []
        while waiting and len(entries) < self.max_batch:
            entry = waiting.popleft()
            if entry.result.set_running_or_notify_cancel():
                entries.append(entry)
        if not waiting:
            del self._waiting[run]
        return entries


def _run_together(run: Run, entries: list[_Entry]) -> bool:
    """Whether the batch went well; if so, everybody has got an answer."""
    if len(entries) == 1:
        return False
    try:
        results = run([entry.item for entry in entries])
    except Exception:
        return False
    if len(results) != len(entries):
        return False
    for entry, result in zip(entries, results, strict=True):
        entry.result.set_result(result)
    return True


def _run_alone(run: Run, entry: _Entry) -> None:
    try:
        (result,) = run([entry.item])
    except Exception as error:
        entry.result.set_exception(error)
    else:
        entry.result.set_result(result)
