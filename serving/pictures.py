"""The text that a client sends as ``image``, to the bytes of a picture.

No text leads to a file of the server: it is decoded, or it is fetched from another host, or it is refused.
"""

import asyncio
import binascii
import http.client
import os
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from concurrent.futures import Future

from . import RequestError, one_line

MAX_BYTES = 100 * 2**20  # what Cog takes in a request; an address could lead to more
SILENCE = 10.0  # seconds without a byte, after which a host is given up
SECONDS = 60.0  # for a whole picture
AT_ONCE = 2**20  # characters that are decoded without a thread, in a few milliseconds
ADVICE = "send a data URI (data:image/png;base64,...) or an http or https URL"

# Unlike urllib's own, this one knows no file:, data: and ftp: addresses, into which a host could lead it.
_web = urllib.request.OpenerDirector()
for _kind in "ProxyHandler HTTPHandler HTTPSHandler HTTPRedirectHandler UnknownHandler HTTPErrorProcessor".split():
    _web.add_handler(getattr(urllib.request, _kind)())
_web.add_handler(urllib.request.HTTPDefaultErrorHandler())


async def read(text: str) -> bytes:
    """The encoded picture that ``text`` holds or names. Raises RequestError."""
    scheme = text[:8].lower() if isinstance(text, str) else ""
    if scheme.startswith("data:"):
        return decode(text) if len(text) < AT_ONCE else await asyncio.to_thread(decode, text)
    if scheme.startswith(("http://", "https://")):
        if os.environ.get("CONVMIXER_FETCH") == "0":
            raise RequestError("image is an address, and this server fetches none; send a data URI")
        return await _in_thread(fetch, text)
    raise RequestError(f"image is neither; {ADVICE}")


def decode(uri: str) -> bytes:
    """The content of a data URI, percent-encoded or in base64 of any kind: padded or not, URL-safe, in lines."""
    head, comma, payload = uri.partition(",")
    if not comma:
        raise RequestError(f"image is a data URI without a comma; {ADVICE}")
    content = urllib.parse.unquote_to_bytes(payload)
    if not head.rstrip().lower().endswith(";base64"):
        return content
    try:
        return binascii.a2b_base64(content, strict_mode=True)
    except binascii.Error:
        content = content.translate(bytes.maketrans(b"-_", b"+/"), b" \t\r\n").rstrip(b"=")
    try:
        return binascii.a2b_base64(content + b"=" * (-len(content) % 4), strict_mode=True)
    except binascii.Error as error:
        raise RequestError(f"image is damaged base64 ({error}); send it again") from error


def fetch(url: str) -> bytes:
    """What is at an http or https address, after redirects. Raises RequestError."""
    end = time.monotonic() + SECONDS
    content = bytearray()
    try:
        with _web.open(urllib.request.Request(url, headers={"User-Agent": "convmixer"}), timeout=SILENCE) as answer:
            while chunk := answer.read1(2**16):
                content += chunk
                if len(content) > MAX_BYTES:
                    raise RequestError(f"image has more than the {MAX_BYTES:,} bytes that can be read; make it smaller")
                if time.monotonic() > end:
                    raise RequestError(f"image did not arrive within {SECONDS:g} seconds")
            if answer.length:
                raise RequestError("image was cut off on its way; send it again")
    except RequestError:
        raise
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) if not isinstance(error, urllib.error.HTTPError) else error
        reason = getattr(reason, "strerror", None) or reason or error
        raise RequestError(f"image could not be fetched: {one_line(str(reason)) or type(error).__name__}") from error
    return bytes(content)


def _in_thread(function, *arguments) -> asyncio.Future:
    """The result of a call in a thread that nobody waits for when the process ends: a host may never answer."""
    future: Future = Future()

    def work() -> None:
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(function(*arguments))
            except BaseException as error:
                future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return asyncio.wrap_future(future)
