"""Keeps Cog's server running, as an orchestrator does with a container: what ends by itself is started again."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

LONGEST_PAUSE = 30.0  # seconds between the end of a server and the start of the next
STEADY_SECONDS = 60.0  # a server that ran for this long starts the pauses from 0 again

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # <linux/prctl.h>


def supervise(command: list[str], folder: Path, environment: Mapping[str, str]) -> int:
    """Run a server until SIGTERM or SIGINT, which it gets, too. Returns its exit status then.

    If it ended by a signal, this process ends by the same one. A server that ends unasked is started again: the first
    time at once, then after 1, 2, 4 and at last 30 seconds. One whose setup failed does not end, and is left alone.
    """
    asked: list[int] = []
    server = 0

    def forward(number: int, _) -> None:
        asked.append(number)
        if server:
            with contextlib.suppress(ProcessLookupError):
                os.kill(server, number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, forward)
    # A worker outlives its server by a moment, and its helpers outlive both: they become children of this process
    # then, which waits for them, so that no dead process stays behind where init does not care.
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    before_start = _ends_with(os.getpid())
    deaths = 0
    while True:
        started = time.monotonic()
        # Should this process be killed, the server gets SIGTERM.
        process = subprocess.Popen(command, cwd=folder, env=environment, preexec_fn=before_start)
        server = process.pid
        for number in asked:  # in the meantime
            os.kill(server, number)
        status = process.returncode = _wait_for(server)  # it would look for the process itself otherwise
        server = 0
        if asked:
            break
        deaths = 1 if time.monotonic() - started > STEADY_SECONDS else deaths + 1
        pause = pause_before(deaths)
        print(
            f"Cog's server ended by itself ({_in_words(status)}); it is started again in {pause:g} s", file=sys.stderr
        )
        _sleep(pause, asked)
        if asked:
            status = 0 if asked[-1] == signal.SIGTERM else -asked[-1]
            break
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return status


def pause_before(deaths: int) -> float:
    """Seconds to wait after so many ends in a row."""
    return 0.0 if deaths == 1 else min(LONGEST_PAUSE, 2.0 ** min(deaths - 2, 9))


def _wait_for(server: int) -> int:
    """The exit status of the server, minus a signal's number if one ended it. Waits for whatever else ends, too."""
    while True:
        pid, status = os.wait()
        if pid == server:
            return os.waitstatus_to_exitcode(status)


def _sleep(seconds: float, asked: list[int]) -> None:
    """Wait, but not once a signal has come."""
    until = time.monotonic() + seconds
    while not asked and (left := until - time.monotonic()) > 0:
        time.sleep(min(left, 0.1))


def _ends_with(parent: int) -> Callable[[], None]:
    """What a new process does to get SIGTERM when its parent ends, whatever ends it. Only Linux can do that."""

    def tell_the_kernel() -> None:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it has ended already
            os._exit(1)

    return tell_the_kernel


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _in_words(status: int) -> str:
    return f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
