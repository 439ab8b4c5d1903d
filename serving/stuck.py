"""Ends a server that is busy with nothing.

Cog 0.23 loses a slot when it cannot make the folder of a prediction, whose name the client may choose: a name of more
than 255 bytes is enough. A server that has lost all its slots says that it is busy until it is started again. The
worker can tell: no request of its own is under way. It ends itself, and the watchdog and the supervisor do the rest.
"""

import functools
import http.client
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import CodeType

SECONDS = 120.0  # how long a picture may take to arrive from the address that a client named
EVERY = 5.0


class Unsticker:
    """Watches one worker. ``begun`` is to be counted up by each call of the function ``run``.

    is_under_way: whether a request is; by default, whether a thread is in ``run``, which says nothing of coroutines.
    """

    def __init__(
        self,
        run: Callable,
        seconds: float = SECONDS,
        every: float = EVERY,
        is_under_way: Callable[[], bool] | None = None,
    ):
        self.begun = 0
        self._is_under_way = is_under_way or functools.partial(is_running, run.__code__)
        self._seconds, self._every = seconds, every

    def start(self) -> None:
        """From now on this process is killed once the server was busy for long without a request in ``run``."""
        threading.Thread(target=self._watch, name="ends a stuck server", daemon=True).start()

    def _watch(self) -> None:
        since, begun = time.monotonic(), self.begun
        while True:
            time.sleep(self._every)
            if self.begun != begun or self._is_under_way() or not is_busy(int(os.environ.get("PORT", "5000"))):
                since, begun = time.monotonic(), self.begun
            elif time.monotonic() - since > self._seconds:
                line = f"Cog has been busy for {self._seconds:g} s with no request under way; the worker ends itself"
                print(line, file=sys.__stderr__, flush=True)
                os.kill(os.getpid(), signal.SIGKILL)


def is_running(code: CodeType) -> bool:
    """Whether a thread of this process is in the function of this code."""
    for frame in sys._current_frames().values():
        while frame is not None:
            if frame.f_code is code:
                return True
            frame = frame.f_back
    return False


def is_busy(port: int) -> bool:
    """Whether the server on this machine's ``port`` says so; False if it says nothing."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("GET", "/health-check")
        return json.loads(connection.getresponse().read()).get("status") == "BUSY"
    except (OSError, http.client.HTTPException, ValueError, AttributeError):
        return False
    finally:
        connection.close()
