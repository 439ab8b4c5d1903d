"""What can interrupt a run from outside: signals, and the time for the next checkpoint."""

import atexit
import multiprocessing.util  # before atexit.register below, so that its own joining of children comes after ours
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

# SIGTERM: preemption, and what torchrun sends; SIGUSR1: what SLURM can send ahead of it; SIGINT: Ctrl-C.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
PATIENCE = 15  # seconds from a signal until pictures are no longer waited for; torchrun kills after 30


class Stuck(BaseException):  # no Exception, which reading a picture turns into a broken picture
    """After a signal the pictures for the step under way did not come. ``code``: the run's exit code."""

    def __init__(self, received: signal.Signals):
        self.code = 128 + received
        super().__init__(
            f"stopped by {received.name}; no pictures came for {PATIENCE} s: is one a pipe, or on a dead disk?"
        )


class Watch:
    """Notices signals, the passing of time, and pictures that were left out."""

    def __init__(self, save_every: float = 10.0, note: Callable[[str], None] | None = None):
        """``save_every``: minutes between checkpoints within an epoch. ``note`` prints a line for the user."""
        self.seconds, self.note = 60.0 * save_every, note or (lambda text: print(text, file=sys.stderr, flush=True))
        self.received: signal.Signals | None = None
        self.reading = False  # whether pictures are waited for
        self.saved_at = time.monotonic()
        self.named: set[str] = set()

    @property
    def stopping(self) -> bool:
        return self.received is not None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within it a signal asks the loop to save and stop; Ctrl-C a second time stops at once."""
        before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        before[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._lose_patience)
        try:
            yield
        finally:
            signal.alarm(0)
            if self.stopping:
                end_workers()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame) -> None:
        if number == signal.SIGINT and self.received is not None:
            end_workers()
            raise KeyboardInterrupt
        if self.received is None:
            signal.alarm(PATIENCE)
        self.received = signal.Signals(number)

    def _lose_patience(self, number: int, frame) -> None:
        if not self.reading:  # a slow step, or a save: let it end
            signal.alarm(1)
            return
        end_workers()
        raise Stuck(self.received)

    def read(self, items: Iterable) -> Iterator:
        """The items as they come. Raises Stuck where one does not come after a signal."""
        items, end = iter(items), object()
        while True:
            self.reading = True
            try:
                item = next(items, end)
            finally:
                self.reading = False
            if item is end:
                return
            yield item

    def save_due(self) -> bool:
        """Whether it is time for a checkpoint."""
        return time.monotonic() - self.saved_at >= self.seconds

    def saved(self) -> None:
        """Says that a checkpoint was written just now."""
        self.saved_at = time.monotonic()

    def skipped(self, message: str) -> None:
        """Names a broken picture, once."""
        if message not in self.named:
            self.named.add(message)
            self.note(f"left out: {message}")


def leave_signals_to_the_parent(worker: int) -> None:
    """For a loader's worker process: the parent notices the signal, finishes its step with the worker, and ends it."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def end_workers() -> None:
    """Python and the loader would ask each of them, and wait: for ever for one that is stuck. They only read."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # the loader's own handler would call it a failure
    for child in multiprocessing.active_children():
        child.kill()
