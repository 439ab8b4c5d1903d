"""Pictures decoded in processes of their own, so that no picture can end the process that holds the network.

Decoders are large C libraries that read what strangers send. A fault in one, or a lack of memory, ends the process in
which it happens, and Cog never replaces its worker. Here that costs one request: it gets one line, and another process
takes the place of the one that ended. This contains accidents; it is no sandbox for code that takes a process over.
"""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from . import RequestError, one_line
from .decoding import MAX_MESSAGE, MAX_SHOWN_SIDE, MESSAGE, REPLY, REQUEST, task_of

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from convmixer.preprocessing import Preprocessing

ROOT = str(Path(__file__).resolve().parents[1])
# 64 million pixels take 0.7 to 1.5 GB, with the format (16-bit greys and lossless WebP the most).
MEMORY = 2 * 2**30
SECONDS = 30.0  # the slowest picture within the limits takes five on a core of its own
PATIENCE = 5.0  # seconds more, in which the process should have ended itself
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
    """A pool of processes that decode pictures; each starts when it is needed, the first one at once.

    size: how many pictures are decoded at once.
    memory: bytes that one process may use.
    seconds: time for one picture, after which it is given up.
    """

    def __init__(self, size: int = 1, *, memory: int = MEMORY, seconds: float = SECONDS):
        self.children = [_Child(memory, seconds) for _ in range(size)]
        self._free: asyncio.LifoQueue[_Child] = asyncio.LifoQueue()  # the last one used is the first used again
        for child in reversed(self.children):
            self._free.put_nowait(child)
        with contextlib.suppress(OSError):  # the first picture says so
            self.children[0].start()

    async def decode(
        self, picture: bytes, preprocessing: "Preprocessing", shown_at: int | None = None
    ) -> tuple["np.ndarray", "Image.Image | None"]:
        """What the network sees of an encoded picture, as resize_and_crop gives it: uint8 (size, size, 3); and, with
        ``shown_at``, what load_image gives for that ``target_size``, scaled to MAX_SHOWN_SIDE.

        Raises ImageError, whose message is one line for whoever sent the picture, and RequestError where no process can
        be started. A caller that is cancelled leaves its picture to be decoded to the end.
        """
        child = await self._free.get()
        return await asyncio.shield(asyncio.create_task(self._ask(child, picture, preprocessing, shown_at)))

    async def _ask(self, child: "_Child", picture: bytes, preprocessing: "Preprocessing", shown_at: int | None):
        import numpy as np
        from PIL import Image

        try:
            side = preprocessing.size
            width, height, content = await child.ask(task_of(preprocessing, shown_at), picture, side)
        finally:
            self._free.put_nowait(child)
        pixels = np.frombuffer(content, np.uint8, side * side * 3).reshape(side, side, 3)
        if shown_at is None:
            return pixels, None
        return pixels, Image.frombytes("RGB", (width, height), memoryview(content)[side * side * 3 :])

    def close(self) -> None:
        """End the processes."""
        for child in self.children:
            child.stop()


class _Child:
    """One place in the pool, with its process if there is one."""

    def __init__(self, memory: int, seconds: float):
        self.memory, self.seconds = memory, seconds
        self.process: subprocess.Popen | None = None
        self.socket: socket.socket | None = None

    def start(self) -> None:
        """Start a process, and do not wait for it. Raises OSError."""
        self.socket, theirs = socket.socketpair()
        self.socket.setblocking(False)
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

    async def ask(self, task: bytes, picture: bytes, side: int) -> tuple[int, int, bytearray]:
        """(width, height, content) of the reply. Raises ImageError and RequestError."""
        from convmixer.images import ImageError

        if self.process is None or self.process.poll() is not None:
            self.stop()
            try:
                self.start()
            except OSError as error:
                _log(f"decoder process: it cannot be started: {error}")
                raise RequestError("the server has no room for a picture at the moment; send it again") from error
        try:
            async with asyncio.timeout(self.seconds + PATIENCE):
                kind, width, height, content = await self._exchange(task, picture, side)
        except OSError as error:
            is_late = isinstance(error, TimeoutError)
            status = await asyncio.to_thread(self.stop, 0 if is_late else 1)
            _log(f"decoder process: {_ending(status)} while it decoded a picture of {len(picture):,} bytes")
            with contextlib.suppress(OSError):  # the next picture says so
                self.start()
            raise ImageError(self._line(-signal.SIGALRM if is_late else status)) from None
        if kind == MESSAGE:
            raise ImageError(one_line(content.decode(errors="replace")))
        return width, height, content

    async def _exchange(self, task: bytes, picture: bytes, side: int) -> tuple[int, int, int, bytearray]:
        """Send one request and read the whole reply. Raises OSError if the process ends or is of no use any more."""
        loop = asyncio.get_running_loop()
        for part in (REQUEST.pack(len(task), len(picture)) + task, picture):
            await loop.sock_sendall(self.socket, part)
        kind, width, height = REPLY.unpack(await self._receive(REPLY.size))
        size = width if kind == MESSAGE else 3 * (side * side + width * height)
        # Who knows who speaks, after a picture that was made to take the process over.
        if size > MAX_MESSAGE if kind == MESSAGE else max(width, height) > MAX_SHOWN_SIDE:
            raise ConnectionError("a reply that is none")
        return kind, width, height, await self._receive(size)

    async def _receive(self, size: int) -> bytearray:
        content = bytearray(size)
        view = memoryview(content)
        while view:
            count = await asyncio.get_running_loop().sock_recv_into(self.socket, view)
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


def _log(line: str) -> None:
    # sys.stderr would be the log of one prediction, which Cog may send to the client.
    print(line, file=sys.__stderr__, flush=True)
