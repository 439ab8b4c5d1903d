"""A small process beside Cog's worker. It ends the server when that is of no use any more, so that it is started again.

Cog 0.23 never replaces its worker: when that dies, of a lack of memory or a fault in native code, the server goes on
and refuses every request. And it loses a slot for each prediction whose folder it cannot make, whose name the client
may choose: a server without slots says that it is busy, and is not. Whoever runs the server (python -m serving, Docker,
an orchestrator) starts it again once it is gone. The process also deletes what predictions leave in Cog's folder.

It holds one end of a pipe whose other end only the worker has. Whatever happens to the worker, the kernel then closes
that end; the worker writes into it when a request begins, when it ends, and when Python exits in an orderly way.
"""

import atexit
import contextlib
import json
import os
import re
import select
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

BEGINS, ENDS, LEAVES = b"+", b"-", b"."
FOLDER = "/tmp/coglet/predictions"  # Cog's, for which it has no setting; other servers of this machine use it, too
OLD = 600.0  # seconds; far more than any prediction takes
CLEAN_EVERY = 60.0
LOOK_EVERY = 5.0  # seconds without a word from the worker, after which the server is asked
STUCK = 30.0  # seconds for which a server may be busy with nothing: from a whole request to its begin in the worker
GRACE = 0.3  # for the server to tell the client whose request it was
SECONDS_TO_LEAVE = 5.0


class Watcher:
    """The worker's side. Outside a worker of Cog's server it does nothing."""

    def __init__(self):
        self._under_way = 0
        self._process: subprocess.Popen | None = None
        if in_cogs_worker():
            self._start()
            atexit.register(self._say, LEAVES)

    @contextlib.contextmanager
    def request(self) -> Iterator[None]:
        """While in this context, one more request is under way."""
        self._under_way += 1
        self._say(BEGINS)
        try:
            yield
        finally:
            self._under_way -= 1
            self._say(ENDS)

    def _start(self) -> None:
        server = os.getppid()
        address = address_of(Path(f"/proc/{server}/cmdline").read_bytes())
        try:
            pidfd = os.pidfd_open(server)
            # No other code than this file's and little of Python: it is there in a few milliseconds.
            command = [sys.executable, "-I", "-S", __file__, *map(str, (pidfd, *address, self._under_way))]
            self._process = subprocess.Popen(
                command, pass_fds=[pidfd], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
            )
            os.close(pidfd)
            os.set_blocking(self._process.stdin.fileno(), False)
        except (OSError, AttributeError) as error:  # AttributeError: not a Linux
            print(f"no watcher: {error}; a worker that dies is not replaced", file=sys.__stderr__, flush=True)

    def _say(self, word: bytes) -> None:
        if self._process is None:
            return
        try:
            os.write(self._process.stdin.fileno(), word)
        except OSError as error:  # it is gone, or has not read for 64 KiB
            line = f"the watcher does not listen ({error.strerror}); another one takes its place"
            print(line, file=sys.__stderr__, flush=True)
            self._process.kill()
            self._process.stdin.close()
            self._process.wait()
            self._process = None
            self._start()


def in_cogs_worker() -> bool:
    """Whether this process was started by Cog's server, to run a predictor."""
    try:
        words = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in (os.getpid(), os.getppid())]
    except OSError:  # no /proc
        return False
    return b"coglet" in words[0] and b"cog.server" in words[1]


def leave_signals_to_the_server() -> None:
    """In Cog's worker, ignore the signals that ask a server to end, when they are sent to its whole process group.

    Ctrl-C does that. The server ends the worker once the last request is answered; a worker that SIGINT has ended
    before keeps it waiting for ten seconds.
    """
    if in_cogs_worker():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)


def check_folder(folder: str = FOLDER) -> None:
    """Raises OSError, one line, where Cog could not keep its predictions: each of them would fail."""
    reason = "it belongs to another user"
    try:
        os.makedirs(folder, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            return
    except OSError as error:
        reason = error.strerror
    advice = "give the server a /tmp of its own; beside docker run --read-only that is --tmpfs /tmp"
    raise OSError(f"Cog needs the folder {folder} and cannot write there ({reason}); {advice}")


def address_of(command: bytes) -> tuple[str, int]:
    """Where the server with this command line, as /proc has it, can be asked from this machine."""
    host = (re.search(rb"--host[\0=]([^\0]+)", command) or [b"", b"0.0.0.0"])[1].decode().strip("[]")
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), int(os.environ.get("PORT", "5000"))


def status_of(host: str, port: int) -> str:
    """What the server at this address says of itself: READY, BUSY, STARTING, ...; "" if it says nothing."""
    answer = b""
    try:
        with socket.create_connection((host, port), timeout=2) as connection:
            connection.sendall(b"GET /health-check HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            while part := connection.recv(2**16):
                answer += part
        return str(json.loads(answer.partition(b"\r\n\r\n")[2])["status"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def watch(worker: int, server: int, host: str, port: int, under_way: int = 0) -> None:
    """Wait for the end of the worker, or of the server's use, and end the server unless that was meant.

    worker: the descriptor of a pipe from it. server: its pidfd.
    """
    busy_since, next_cleaning = None, 0.0
    while True:
        now = time.monotonic()
        if now > next_cleaning:
            delete_old(FOLDER)
            next_cleaning = now + CLEAN_EVERY
        if select.select([worker], [], [], LOOK_EVERY)[0]:
            words = os.read(worker, 2**16)
            if LEAVES in words:
                return
            if not words:
                break
            under_way += words.count(BEGINS) - words.count(ENDS)
            busy_since = None
        elif under_way or status_of(host, port) != "BUSY":
            busy_since = None
        else:
            busy_since = busy_since or now
            if now - busy_since > STUCK:
                print(f"Cog has been busy for {STUCK:g} s with no request under way; it is ended", file=sys.stderr)
                break
    if ended(server, GRACE):
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


def delete_old(folder: str, age: float = OLD) -> None:
    """Delete this user's files below ``folder`` that are older than ``age`` seconds, and such folders once empty."""
    for place, folders, files in os.walk(folder, topdown=False):
        for path in (os.path.join(place, name) for name in files + folders):
            with contextlib.suppress(OSError):  # it is not empty, or another server was first
                about = os.lstat(path)
                if about.st_uid == os.getuid() and about.st_mtime < time.time() - age:
                    (os.rmdir if stat.S_ISDIR(about.st_mode) else os.unlink)(path)


if __name__ == "__main__":
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # sent to the whole group: there may still be something to watch
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    watch(0, int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
