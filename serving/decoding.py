"""The process that decodes pictures: started by serving/decoder.py, which also says why there is one.

It reads requests from a socket and answers each in turn:

    request  REQUEST: the length of the task and of the picture; the task, from task_of; the picture as it came
    reply    REPLY: kind, width, height; then width * height RGB pixels, or width bytes of a message

It does not import PyTorch, and ends as soon as the process that started it does.
"""

import contextlib
import fcntl
import functools
import json
import os
import resource
import signal
import socket
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from convmixer.preprocessing import Preprocessing

REQUEST = struct.Struct("<IQ")
REPLY = struct.Struct("<BII")
PIXELS, MESSAGE = 0, 1  # kinds of reply
MAX_MESSAGE = 1000  # bytes
HELLO = b"!"  # sent once, when it can take requests


def main(descriptor: str, memory: str, seconds: str) -> None:
    """Answer the requests that come from a socket, by its number, until there are no more. See Decoder for the rest."""
    confine(int(memory))
    from convmixer import images, preprocessing  # noqa: F401  the slow part, before the first request

    connection = socket.socket(fileno=int(descriptor))
    connection.sendall(HELLO)
    silence()
    with contextlib.suppress(ConnectionError), connection.makefile("rb") as stream:
        while header := stream.read(REQUEST.size):
            task_size, picture_size = REQUEST.unpack(header)
            task = stream.read(task_size)
            picture = stream.read(picture_size)
            # The kernel ends this process when the time is up, whatever code it is in.
            signal.setitimer(signal.ITIMER_REAL, float(seconds))
            head, content = answer(task, picture)
            signal.setitimer(signal.ITIMER_REAL, 0)
            del picture
            connection.sendall(head)
            connection.sendall(content)
            del content  # up to 192 MB, which nobody needs while this process waits


def confine(memory: int) -> None:
    """Give this process its limits."""
    for ending in (signal.SIGALRM, signal.SIGIO):
        signal.signal(ending, signal.SIG_DFL)
    for ignored in (signal.SIGINT, signal.SIGTERM):  # sent to a whole group, while a request is still to be answered
        signal.signal(ignored, signal.SIG_IGN)
    # Standard input is a pipe into which nobody writes: all that happens to it is that its other end, the parent,
    # goes away. The kernel then sends SIGIO, which ends this process in the middle of a picture, too.
    with contextlib.suppress(OSError):
        fcntl.fcntl(0, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(0, fcntl.F_SETFL, fcntl.fcntl(0, fcntl.F_GETFL) | os.O_ASYNC)
    # Not RLIMIT_AS: that also counts addresses that were only set aside, which grow with the number of cores.
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a dump would hold somebody's picture
    # If the whole machine or container runs out of memory, this process goes first and not the one with the network.
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")


def silence() -> None:
    """Keep what native decoders print about broken pictures out of the server's log."""
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)


def answer(task: bytes, picture: bytes) -> tuple[bytes, bytes]:
    """The two parts of a reply to what `task_of` gave and an encoded picture."""
    from convmixer.images import ImageError, load_image
    from convmixer.preprocessing import resize_and_crop

    target_size, preprocessing = _read_task(task)
    try:
        image = load_image(picture, target_size=target_size)
        if preprocessing:
            image = resize_and_crop(image, preprocessing)
        return REPLY.pack(PIXELS, *image.size), image.tobytes()
    except ImageError as error:
        text = str(error)
    except MemoryError:
        text = "the picture needs too much memory to decode; make it smaller and try again"
    message = text.encode(errors="replace")[:MAX_MESSAGE]
    return REPLY.pack(MESSAGE, len(message), 0), message


@functools.lru_cache
def task_of(target_size: int | None, preprocessing: "Preprocessing | None") -> bytes:
    """What is to be done with pictures, as JSON: how load_image reads them, and what they are resized and cropped to.

    Without ``preprocessing`` it is the whole picture that is asked for.
    """
    return json.dumps([target_size, preprocessing and preprocessing.to_dict()]).encode()


@functools.lru_cache
def _read_task(task: bytes) -> tuple[int | None, "Preprocessing | None"]:
    """The inverse of task_of. Both are kept, because all pictures of one model have the same."""
    from convmixer.preprocessing import Preprocessing

    target_size, preprocessing = json.loads(task)
    return target_size, preprocessing and Preprocessing.from_dict(preprocessing)
