"""A small process that ends Cog's server when the server's worker has died, so that both are started again.

Cog never replaces its worker: when that is killed, for lack of memory or by a fault in native code, the server goes on
and refuses every request. Whoever runs the server (serve.py, Docker, an orchestrator) starts it again once it is gone.

The process holds one end of a pipe whose other end only the worker has. Whatever happens to the worker, the kernel then
closes that end. What the worker wrote into it before tells an accident from the end of the server.
"""

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import weakref
from pathlib import Path

ARMED, DISMISSED = b"a", b"d"
GRACE_SECONDS = 0.3  # for the server to tell the client whose request it was
SECONDS_TO_LEAVE = 5.0


class Watchdog:
    """The worker's side. Nothing happens before `arm`: a setup that fails is for Cog to report, and not to repeat."""

    def __init__(self, folder: Path):
        """Start the process, if this one is a worker of Cog's server and the system is a Linux that can do it.

        folder: deleted if the worker dies: its temporary files.
        """
        self._process = None
        try:
            server = _server()
            if server is None:
                return
            try:
                # No other code than this file's and little of Python: it is there in a few milliseconds.
                command = [sys.executable, "-I", "-S", __file__, str(server), str(folder)]
                pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
                self._process = subprocess.Popen(command, pass_fds=[server], **pipes)
            finally:
                os.close(server)
        except (OSError, AttributeError) as error:  # AttributeError: not a Linux
            print(f"no watchdog: {error}; a worker that dies is not replaced", file=sys.__stderr__, flush=True)
            return
        self._finalizer = weakref.finalize(self, _dismiss, self._process)  # also when the worker exits as it should

    def arm(self) -> None:
        """From now on, the end of this process is an accident, unless Python exits in an orderly way."""
        if self._process:
            _tell(self._process, ARMED)

    def dismiss(self) -> None:
        """End the watchdog, and nothing else."""
        if self._process:
            self._finalizer()


def in_cogs_worker() -> bool:
    """Whether this process was started by Cog's server, to run a predictor."""
    with contextlib.suppress(OSError):  # no /proc
        return b"coglet" in Path("/proc/self/cmdline").read_bytes()
    return False


def leave_signals_to_the_server() -> None:
    """In Cog's worker, ignore the signals that ask a server to end, when they are sent to its whole process group.

    Ctrl-C does that. The server ends the worker once the last request is answered; a worker that SIGINT has ended
    before keeps it waiting for ten seconds.
    """
    if in_cogs_worker():
        with contextlib.suppress(ValueError):  # not in the main thread, where alone Python lets one do this
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)


def _server() -> int | None:
    """A descriptor (pidfd) of Cog's server if this is its worker, else None. Raises OSError, AttributeError."""
    if not in_cogs_worker():
        return None  # a test, or whatever else calls setup(): its parent must not be ended
    parent = os.getppid()
    server = os.pidfd_open(parent)
    # A number may have a new owner by now; but as long as the parent is the same, it has not ended.
    if b"cog.server" in Path(f"/proc/{parent}/cmdline").read_bytes() and os.getppid() == parent:
        return server
    os.close(server)
    return None


def _tell(process: subprocess.Popen, word: bytes) -> None:
    with contextlib.suppress(OSError):  # it is gone
        process.stdin.write(word)
        process.stdin.flush()


def _dismiss(process: subprocess.Popen) -> None:
    _tell(process, DISMISSED)
    with contextlib.suppress(OSError):
        process.stdin.close()
    process.wait()


def watch(worker: int, server: int, folder: str) -> None:
    """Wait for the end of the worker, and end the server if that was an accident.

    worker: the descriptor of a pipe from it. server: its pidfd.
    """
    heard = b""
    while word := os.read(worker, 100):
        heard += word
    if DISMISSED in heard or ARMED not in heard:
        return
    shutil.rmtree(folder, ignore_errors=True)
    if ended(server, GRACE_SECONDS):
        return
    # SIGINT, because after it the server puts its things in order, and its exit status still calls for a restart.
    for number in (signal.SIGINT, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(server, number)
        if ended(server, SECONDS_TO_LEAVE):
            return


def ended(process: int, seconds: float) -> bool:
    """Whether the process of a pidfd ends within so many seconds."""
    return bool(select.select([process], [], [], seconds)[0])


if __name__ == "__main__":
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # sent to the whole group: there may still be something to watch
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    watch(0, int(sys.argv[1]), sys.argv[2])
