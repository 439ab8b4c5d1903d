"""Keeps a client that goes away at a bad moment from blocking Cog's worker for ever.

For each request Cog 0.23 starts a thread that fetches or decodes the picture. It cancels a request by an exception that
Python raises in the thread with the number of the request's own, and until a new thread runs, Python lists it with the
number of the thread that started it. An exception that hits the new thread in that moment ends it before it has said
that it runs, which the other one waits for without end: the server stays busy until it is killed. Clients that
closed their connections right after a request found that moment within a few tries, on a busy machine.

Here such threads are started by a thread that is no request's.
"""

import concurrent.futures
import queue
import threading

_tasks: queue.SimpleQueue = queue.SimpleQueue()


class _Executor(concurrent.futures.ThreadPoolExecutor):
    """A ThreadPoolExecutor whose threads another thread starts. Each task has one of its own."""

    def submit(self, function, /, *arguments, **options) -> concurrent.futures.Future:
        future = concurrent.futures.Future()
        _tasks.put((future, function, arguments, options))
        return future


def start_threads_elsewhere() -> None:
    """From now on executors, Cog's among them, start no thread in the thread that uses them. To be called once."""
    if concurrent.futures.ThreadPoolExecutor is _Executor:
        return
    threading.Thread(target=_start_threads, name="starts threads", daemon=True).start()
    concurrent.futures.ThreadPoolExecutor = _Executor


def _start_threads() -> None:
    while True:
        threading.Thread(target=_run, args=_tasks.get(), daemon=True).start()


def _run(future: concurrent.futures.Future, function, arguments: tuple, options: dict) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(function(*arguments, **options))
    except BaseException as error:
        future.set_exception(error)
