"""Keeps Cog's server running, as an orchestrator does with a container: what ends by itself is started again."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
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
    server, deaths, status = 0, 0, 0

    def forward(number: int, _) -> None:
        asked.append(number)
        if server:
            with contextlib.suppress(ProcessLookupError):
                os.kill(server, number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, forward)
    prctl = getattr(ctypes.CDLL(None), "prctl", lambda *_: None)  # which only Linux has
    # A worker outlives its server by a moment, and its helpers outlive both: they become children of this process
    # then, which waits for them, so that no dead process stays behind where init does not care.
    prctl(_PR_SET_CHILD_SUBREAPER, 1)
    while not asked:
        started = time.monotonic()
        end_with_us = {"preexec_fn": lambda: prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)}
        process = subprocess.Popen(command, cwd=folder, env=environment, **end_with_us)
        server = process.pid
        for number in asked:  # in the meantime
            os.kill(server, number)
        pid = 0
        while pid != server:  # whatever else ends
            pid, status = os.wait()
        server, status = 0, os.waitstatus_to_exitcode(status)
        process.returncode = status  # it would look for the process itself otherwise
        if asked:
            break
        deaths = 1 if time.monotonic() - started > STEADY_SECONDS else deaths + 1
        how = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
        pause = 0.0 if deaths == 1 else min(LONGEST_PAUSE, 2.0 ** min(deaths - 2, 9))
        print(f"Cog's server ended by itself ({how}); it is started again in {pause:g} s", file=sys.stderr)
        until = time.monotonic() + pause
        while not asked and time.monotonic() < until:
            time.sleep(0.1)
        if asked:
            status = 0 if asked[-1] == signal.SIGTERM else -asked[-1]
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return status
