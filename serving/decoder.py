"""Pictures decoded in processes of their own, so that no picture can end the process that holds the network.

Decoders are large C libraries that read what strangers send. A fault in one, or a lack of memory, ends the process in
which it happens, and Cog never replaces its worker. Here that costs one request: it gets one line, and another process
takes the place of the one that ended. This contains accidents; it is no sandbox for code that takes a process over.
"""

import asyncio
import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from convmixer.images import ImageError
from convmixer.preprocessing import Preprocessing

from . import RequestError, one_line
from .decoding import MAX_MESSAGE, MAX_SHOWN_SIDE, MESSAGE, REPLY
from .watcher import log

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


class Decoder:
    """A pool of ``size`` processes that decode pictures; each starts when it is needed, the first one at once.

    memory: bytes that one process may use. seconds: time for one picture, after which it is given up.
    """

    def __init__(self, size: int = 1, *, memory: int = MEMORY, seconds: float = SECONDS):
        self.children = [_Child(memory, seconds) for _ in range(size)]
        self._free: asyncio.LifoQueue[_Child] = asyncio.LifoQueue()  # the last one used is the first used again
        for child in reversed(self.children):
            self._free.put_nowait(child)
        with contextlib.suppress(OSError):  # the first picture says so
            self.children[0].start()

    async def decode(
        self, picture: str | bytes, preprocessing: Preprocessing, shown_at: int | None = None
    ) -> tuple[np.ndarray, Image.Image | None]:
        """What the network sees of an encoded picture, or of a data URI: uint8 (size, size, 3), by resize_and_crop; and
        with ``shown_at`` what load_image gives for that ``target_size``, scaled to MAX_SHOWN_SIDE.

        Raises ImageError, one line for whoever sent the picture, and RequestError where no process can be started. A
        caller that is cancelled leaves its picture to be decoded to the end.
        """
        child = await self._free.get()
        task = asyncio.create_task(child.ask(picture, preprocessing, shown_at))
        task.add_done_callback(lambda _: self._free.put_nowait(child))
        width, height, content = await asyncio.shield(task)
        side = preprocessing.size
        pixels = np.frombuffer(content, np.uint8, side * side * 3).reshape(side, side, 3)
        return pixels, shown_at and Image.frombytes("RGB", (width, height), memoryview(content)[pixels.size :])

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
            command = [sys.executable, "-c", CODE, ROOT, *map(str, (theirs.fileno(), self.memory, self.seconds))]
            pipes = {"stdin": subprocess.PIPE, "pass_fds": [theirs.fileno()]}  # by the first it notices our end
            self.process = subprocess.Popen(command, env=os.environ | ENVIRONMENT, **pipes)

    def stop(self, patience: float = 0) -> int:
        """End the process, in ``patience`` seconds unless it does so itself. Gives its exit status, as Popen does."""
        process, self.process = self.process, None
        if process is None:
            return 0
        self.socket.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
        process.kill()
        process.stdin.close()
        return process.wait()

    async def ask(self, *request) -> tuple[int, int, bytearray]:
        """(width, height, content) of the reply to the arguments of `decoding.answer`. Raises as `Decoder.decode`."""
        if self.process is None or self.process.poll() is not None:
            self.stop()
            try:
                self.start()
            except OSError as error:
                log(f"decoder process: it cannot be started: {error}")
                raise RequestError("the server has no room for a picture at the moment; send it again") from error
        try:
            async with asyncio.timeout(self.seconds + PATIENCE):
                await asyncio.get_running_loop().sock_sendall(self.socket, pickle.dumps(request))
                kind, width, height = REPLY.unpack(await self._receive(REPLY.size))
                size = width if kind == MESSAGE else 3 * (request[1].size ** 2 + width * height)
                # Who knows who speaks, after a picture that was made to take the process over.
                if size > MAX_MESSAGE if kind == MESSAGE else max(width, height) > MAX_SHOWN_SIDE:
                    raise ConnectionError("a reply that is none")
                content = await self._receive(size)
        except OSError as error:
            is_late = isinstance(error, TimeoutError)
            status = await asyncio.to_thread(self.stop, 0 if is_late else 1)
            ending = f"signal {-status}, {signal.strsignal(-status)}," if status < 0 else f"status {status}"
            log(f"decoder process: ended by {ending} while it decoded {len(request[0]):,} bytes")
            with contextlib.suppress(OSError):  # the next picture says so
                self.start()
            reason = "could not be decoded: the decoder crashed;"
            if is_late or status == -signal.SIGALRM:
                reason = f"took more than {self.seconds:g} seconds to decode; make it smaller or"
            elif status == -signal.SIGKILL:
                reason = "could not be decoded: memory ran out; make it smaller or"
            raise ImageError(f"the picture {reason} save it again in another format") from None
        if kind == MESSAGE:
            raise ImageError(one_line(content.decode(errors="replace")))
        return width, height, content

    async def _receive(self, size: int) -> bytearray:
        content = bytearray(size)
        view = memoryview(content)
        while view:
            count = await asyncio.get_running_loop().sock_recv_into(self.socket, view)
            if count == 0:
                raise ConnectionResetError("closed")
            view = view[count:]
        return content
