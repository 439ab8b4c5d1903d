"""A small process beside Cog's worker. It ends the server when that is of no use any more, so that it is started again.

Cog 0.23 never replaces a worker that died: the server goes on, and refuses every request. And it loses a slot for each
prediction whose folder it cannot make, whose name the client may choose: at last it says that it is busy, and is not.
Whoever runs the server (python -m serving, Docker, ...) starts it again. What is left in Cog's folder is deleted, too.

The process holds one end of a pipe from the worker. Whatever happens to that, the kernel then closes the other end. The
worker writes into it when a request begins, when it ends, and when Python exits in an orderly way.
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
        with contextlib.suppress(OSError):  # no /proc
            own, server = (Path(f"/proc/{pid}/cmdline").read_bytes() for pid in (os.getpid(), os.getppid()))
            if b"coglet" in own and b"cog.server" in server:
                # Ctrl-C is sent to all processes of a group. The server ends the worker once the last request is
                # answered; for a worker that has ended before, it would wait for ten seconds.
                for number in (signal.SIGINT, signal.SIGTERM):
                    signal.signal(number, signal.SIG_IGN)
                self._address = address_of(server)
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
        try:
            pidfd = os.pidfd_open(os.getppid())
            # No other code than this file's and little of Python: it is there in a few milliseconds.
            command = [sys.executable, "-I", "-S", __file__, *map(str, (pidfd, *self._address, self._under_way))]
            self._process = subprocess.Popen(command, pass_fds=[pidfd], stdin=subprocess.PIPE)
            os.close(pidfd)
            os.set_blocking(self._process.stdin.fileno(), False)
        except (OSError, AttributeError) as error:  # AttributeError: not a Linux
            log(f"no watcher: {error}; a worker that dies is not replaced")

    def _say(self, word: bytes) -> None:
        if self._process is None:
            return
        try:
            os.write(self._process.stdin.fileno(), word)
        except OSError as error:  # it is gone, or has not read for 64 KiB
            log(f"the watcher does not listen ({error.strerror}); another one takes its place")
            process, self._process = self._process, None
            process.kill()
            process.stdin.close()
            process.wait()
            self._start()


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
    try:
        with socket.create_connection((host, port), timeout=2) as connection:
            connection.sendall(b"GET /health-check HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            answer = connection.makefile("rb").read()
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
        if not select.select([worker], [], [], LOOK_EVERY)[0]:
            is_stuck = not under_way and status_of(host, port) == "BUSY"
            busy_since = (busy_since or now) if is_stuck else None
            if busy_since and now - busy_since > STUCK:
                log(f"Cog has been busy for {STUCK:g} s with no request under way; it is ended")
                break
            continue
        words, busy_since = os.read(worker, 2**16), None
        if LEAVES in words:
            return
        if not words:
            break
        under_way += words.count(BEGINS) - words.count(ENDS)
    # SIGINT, because after it the server puts its things in order, and its exit status still calls for a restart.
    for number, seconds in ((0, GRACE), (signal.SIGINT, SECONDS_TO_LEAVE), (signal.SIGKILL, SECONDS_TO_LEAVE)):
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(server, number)
        if ended(server, seconds):
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


def log(line: str) -> None:
    """Tell whoever runs the server. sys.stderr would be the log of one prediction, which Cog may send to its client."""
    print(line, file=sys.__stderr__, flush=True)


if __name__ == "__main__":
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # sent to the whole group: there may still be something to watch
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    watch(0, int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
