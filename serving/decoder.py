"""Pictures decoded in processes of their own, so that no picture can end the process that holds the network.

Decoders are large C libraries that read what strangers send. A fault in one, or a lack of memory, ends the process in
which it happens, and Cog never replaces its worker. Here that costs one request: it gets one line, and another process
takes the place of the one that ended. This contains accidents; it is no sandbox for code that takes a process over.
"""

import contextlib
import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import TYPE_CHECKING

from .decoding import HELLO, MAX_MESSAGE, MESSAGE, PIXELS, REPLY, REQUEST, answer, task_of

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from convmixer.preprocessing import Preprocessing

ROOT = str(Path(__file__).resolve().parents[1])
# 64 million pixels take 0.7 to 1.5 GB, with the format (16-bit greys and lossless WebP the most).
MEMORY = 2 * 2**30
SECONDS = 30.0  # the slowest picture within the limits takes five on a core of its own
START_SECONDS = 30.0
RETRY_SECONDS = 10.0  # before a process that would not start is tried again
CLOSE_SECONDS = 5.0
POLL_SECONDS = 0.05  # how soon a request that is cancelled while it waits here notices
# One thread and one heap: many of either would count against the limit of memory, and gain nothing here. The heap keeps
# up to 128 MB between two pictures: fresh memory from the system costs as much time as the decoding of a photograph.
ENVIRONMENT = {
    "OPENBLAS_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(128 * 2**20),
}
CODE = "import sys; sys.path.insert(0, sys.argv[1]); from serving.decoding import main; main(*sys.argv[2:])"
ADVICE = "save it again in another format"


class Decoder:
    """A pool of processes that decode pictures. Its methods may be called from any number of threads.

    size: how many pictures are decoded at once.
    memory: bytes that one process may use.
    seconds: time for one picture, after which it is given up.

    A process that ends is replaced. Where none can be started, which one line in the server's log says, pictures are
    decoded in the calling process, as without a pool, and every RETRY_SECONDS it is tried again.
    """

    def __init__(self, size: int = 1, *, memory: int = MEMORY, seconds: float = SECONDS):
        self._children = [_Child(memory, seconds) for _ in range(size)]
        self._turns = itertools.count()
        self._finalizer = weakref.finalize(self, _close, self._children)

    def start(self) -> None:
        """Start the processes, and do not wait for them. Without this, the first requests start them."""
        for child in self._children:
            with child.lock:
                child.start()

    def close(self) -> None:
        """End the processes; a picture that is being decoded comes first if it takes less than CLOSE_SECONDS."""
        self._finalizer()

    def prepare(self, picture: bytes, preprocessing: "Preprocessing") -> "np.ndarray":
        """What Classifier.prepare makes of an encoded picture, bit for bit: normalised float32 (3, size, size).

        Raises ImageError, whose message is one line for whoever sent the picture.
        """
        import numpy as np

        from convmixer.preprocessing import normalise

        side = preprocessing.size
        _, _, pixels = self._decode(picture, preprocessing.resize, preprocessing)
        return normalise(np.frombuffer(pixels, np.uint8).reshape(side, side, 3), preprocessing)

    def load(self, picture: bytes, target_size: int | None = None) -> "Image.Image":
        """What load_image makes of an encoded picture, bit for bit: an RGB image. Raises ImageError as prepare does."""
        from PIL import Image

        width, height, pixels = self._decode(picture, target_size, None)
        return Image.frombytes("RGB", (width, height), pixels)

    def _decode(self, picture: bytes, target_size: int | None, preprocessing: "Preprocessing | None") -> tuple:
        """(width, height, RGB pixels): the whole picture, or what the network sees of it. Raises ImageError."""
        from convmixer.images import ImageError

        task, side = task_of(target_size, preprocessing), preprocessing and preprocessing.size
        turn = next(self._turns) % len(self._children)
        children = self._children[turn:] + self._children[:turn]
        child = next((each for each in children if not each.lock.locked()), children[0])
        try:
            kind, width, height, content = child.ask(task, side, picture)
        except _Ended as ended:
            raise ImageError(str(ended)) from None
        if kind == MESSAGE:
            raise ImageError(_one_line(content))
        return width, height, content


class _Ended(Exception):
    """The process ended before it answered; the message is the line for whoever sent the picture."""


class _NotStarted(Exception):
    """There is no process, and why."""


class _Child:
    """One place in the pool: its process, if there is one, and the lock that whoever talks to it holds.

    Cog cancels a request by an exception that can appear anywhere in its code. It must neither take the place out of
    the pool nor leave an answer for the next request. Hence the plain lock, which `with` always gives back, and
    ``busy``, which stays true unless a whole answer was read: the next request then starts with a new process.
    """

    def __init__(self, memory: int, seconds: float):
        self.memory, self.seconds = memory, seconds
        self.lock = threading.Lock()
        self.process: subprocess.Popen | None = None
        self.socket: socket.socket | None = None
        self.is_ready = self.busy = False
        self.retry_at = 0.0

    def ask(self, task: bytes, side: int | None, picture: bytes) -> tuple[int, int, int, bytearray]:
        """The reply, as in serving/decoding.py: (kind, width, height, content). Raises _Ended.

        side: of the square that was asked for, in pixels; None if the whole picture was.
        """
        with self.lock:
            try:
                self._make_ready()
            except _NotStarted as reason:
                self._give_up_for_now(reason)
                header, content = answer(task, picture)
                return *REPLY.unpack(header), bytearray(content)
            try:
                self.busy = True
                reply = self._exchange(task, side, picture)
                self.busy = False
                return reply
            except OSError as error:
                is_late = isinstance(error, TimeoutError)
                status = self.stop(patience=0 if is_late else 1)
                _log(f"decoder process: {_ending(status)} while it decoded a picture of {len(picture):,} bytes")
                self.start()
                raise _Ended(self._line(-signal.SIGALRM if is_late else status)) from None
            except BaseException:  # the request was cancelled: what the process is doing is of no use
                self.stop()
                self.start()
                raise

    def start(self) -> None:
        """Start the process; whether it could be is found out by the next request."""
        self.is_ready = self.busy = False
        with contextlib.suppress(OSError):
            self.socket, theirs = socket.socketpair()
            self.socket.settimeout(POLL_SECONDS)
            with theirs:
                arguments = [ROOT, str(theirs.fileno()), str(self.memory), str(self.seconds)]
                self.process = subprocess.Popen(
                    [sys.executable, "-c", CODE, *arguments],
                    stdin=subprocess.PIPE,  # by which it notices that this process has ended
                    stdout=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    env=os.environ | ENVIRONMENT,
                )

    def stop(self, patience: float = 0) -> int:
        """End the process, in ``patience`` seconds unless it does so itself. Gives its exit status, as Popen does."""
        process, self.process = self.process, None
        if self.socket:
            self.socket.close()
        if process is None:
            return 0
        with contextlib.suppress(subprocess.TimeoutExpired):
            if patience:
                process.wait(patience)
        process.kill()
        process.stdin.close()
        return process.wait()

    def _make_ready(self) -> None:
        """See to it that a process waits for a request. Raises _NotStarted."""
        is_gone = self.process is None or self.process.poll() is not None
        if is_gone and time.monotonic() < self.retry_at:
            raise _NotStarted
        if is_gone or self.busy:
            self.stop()
            self.start()
        if self.process is None:
            raise _NotStarted("it cannot be created")
        if self.is_ready:
            return
        try:
            self.is_ready = self._receive(len(HELLO), time.monotonic() + START_SECONDS) == HELLO
        except TimeoutError:
            self.stop()
            raise _NotStarted(f"it was not ready after {START_SECONDS:g} seconds") from None
        except OSError:
            raise _NotStarted(_ending(self.stop(patience=1))) from None

    def _give_up_for_now(self, reason: _NotStarted) -> None:
        if str(reason):
            self.retry_at = time.monotonic() + RETRY_SECONDS
            _log(f"decoder process: {reason}; pictures are decoded in the server's own process until it can be started")

    def _exchange(self, task: bytes, side: int | None, picture: bytes) -> tuple[int, int, int, bytearray]:
        """Send one request and read the whole reply. Raises OSError if the process ends or is of no use any more."""
        from convmixer.images import MAX_PIXELS

        deadline = time.monotonic() + self.seconds + 5  # its own alarm should come first
        for part in (REQUEST.pack(len(task), len(picture)) + task, picture):
            self._send(part, deadline)
        kind, width, height = REPLY.unpack(self._receive(REPLY.size, deadline))
        if kind == PIXELS:
            size, limit = width * height * 3, MAX_PIXELS * 3
        else:
            size, limit = width, MAX_MESSAGE
        # Who knows who speaks, after a picture that was made to take the process over.
        if not 0 < size <= limit or (kind == PIXELS and side and (width, height) != (side, side)):
            raise ConnectionError("a reply that is none")
        return kind, width, height, self._receive(size, deadline)

    def _send(self, content: bytes, deadline: float) -> None:
        view = memoryview(content)
        while view:
            try:
                view = view[self.socket.send(view) :]
            except TimeoutError:  # every POLL_SECONDS, when a cancelling exception may also appear
                if time.monotonic() > deadline:
                    raise

    def _receive(self, size: int, deadline: float) -> bytearray:
        content = bytearray(size)
        view = memoryview(content)
        while view:
            try:
                count = self.socket.recv_into(view)
            except TimeoutError:
                if time.monotonic() > deadline:
                    raise
                continue
            if count == 0:
                raise ConnectionResetError("closed")
            view = view[count:]
        return content

    def _line(self, status: int) -> str:
        """What whoever sent the picture is told."""
        if status == -signal.SIGALRM:
            return f"the picture took more than {self.seconds:g} seconds to decode; make it smaller or {ADVICE}"
        if status == -signal.SIGKILL:
            return f"the picture could not be decoded: memory ran out; make it smaller or {ADVICE}"
        return f"the picture could not be decoded: the decoder crashed; {ADVICE}"


def _ending(status: int) -> str:
    """An exit status in words."""
    if status >= 0:
        return f"ended with status {status}"
    with contextlib.suppress(ValueError):
        return f"ended by {signal.Signals(-status).name}"
    return f"ended by signal {-status}"


def _one_line(content: bytes) -> str:
    text = " ".join(content.decode(errors="replace").split())
    return "".join(character if character.isprintable() else "?" for character in text)


def _close(children: list[_Child]) -> None:
    for child in children:
        is_mine = child.lock.acquire(timeout=CLOSE_SECONDS)
        child.stop()
        if is_mine:
            child.lock.release()


def _log(line: str) -> None:
    # sys.stderr would be the log of one prediction, which Cog may send to the client.
    print(line, file=sys.__stderr__, flush=True)
