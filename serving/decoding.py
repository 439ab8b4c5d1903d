"""The process that decodes pictures, until the one that started it ends; serving/decoder.py says why there is one.

It reads requests from a socket, each a pickle of the arguments of `answer`, and sends a reply for each:

    REPLY: kind, width, height; then for PIXELS what the network sees, size * size RGB pixels, and after it
    width * height RGB pixels to show; for MESSAGE width bytes of text
"""

import binascii
import contextlib
import fcntl
import os
import pickle
import resource
import signal
import socket
import struct
from urllib.parse import unquote_to_bytes

from convmixer.images import ImageError, load_image
from convmixer.preprocessing import Preprocessing, resize_and_crop

REPLY = struct.Struct("<BII")
PIXELS, MESSAGE = 0, 1  # kinds of reply
MAX_MESSAGE = 1000  # bytes
MAX_SHOWN_SIDE = 2048  # of a picture to show, in pixels


def main(descriptor: str, memory: str, seconds: str) -> None:
    """Answer the requests that come from a socket, by its number, until there are no more. See Decoder for the rest."""
    confine(int(memory))
    connection = socket.socket(fileno=int(descriptor))
    for output in (1, 2):  # what native decoders print about broken pictures
        os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    with contextlib.suppress(ConnectionError, EOFError), connection.makefile("rb") as stream:
        while request := pickle.load(stream):
            # The kernel ends this process when the time is up, whatever code it is in.
            signal.setitimer(signal.ITIMER_REAL, float(seconds))
            reply = answer(*request)
            signal.setitimer(signal.ITIMER_REAL, 0)
            del request
            connection.sendall(reply)


def confine(memory: int) -> None:
    """Give this process its limits."""
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


def answer(picture: str | bytes, preprocessing: Preprocessing, shown_at: int | None) -> bytes:
    """The reply about an encoded picture, or a data URI of one; to be shown, it is read at the side ``shown_at``."""
    try:
        picture = content_of(picture) if isinstance(picture, str) else picture
        pixels = resize_and_crop(load_image(picture, target_size=preprocessing.resize), preprocessing).tobytes()
        if shown_at is None:
            return REPLY.pack(PIXELS, 0, 0) + pixels
        shown = load_image(picture, target_size=shown_at)
        shown.thumbnail((MAX_SHOWN_SIDE, MAX_SHOWN_SIDE))
        return REPLY.pack(PIXELS, *shown.size) + pixels + shown.tobytes()
    except ImageError as error:
        text = str(error)
    except MemoryError:
        text = "the picture needs too much memory to decode; make it smaller and try again"
    message = text.encode(errors="replace")[:MAX_MESSAGE]
    return REPLY.pack(MESSAGE, len(message), 0) + message


def content_of(uri: str) -> bytes:
    """What is in a data URI, in base64 of any kind (padded or not, URL-safe, in lines) or not. Raises ImageError."""
    head, comma, payload = uri.partition(",")
    if not comma:
        raise ImageError("image is a data URI without a comma; send data:image/png;base64,...")
    content = unquote_to_bytes(payload)
    if not head.rstrip().lower().endswith(";base64"):
        return content
    content = content.translate(bytes.maketrans(b"-_", b"+/"), b" \t\r\n").rstrip(b"=")
    try:
        return binascii.a2b_base64(content + b"=" * (-len(content) % 4), strict_mode=True)
    except binascii.Error as error:
        raise ImageError(f"image is damaged base64 ({error}); send it again") from error
