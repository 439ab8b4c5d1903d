"""The text that a client sends as ``image``: a data URI, or an address, or it is refused. None leads to a file here."""

import asyncio
import http.client
import os
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

from . import RequestError, one_line

MAX_BYTES = 100 * 2**20  # what Cog takes in a request; an address could lead to more
SILENCE = 10.0  # seconds without a byte, after which a host is given up
SECONDS = 60.0  # for a whole picture

_web = urllib.request.build_opener()
for _scheme in ("file", "ftp", "data"):  # into none of which a host can lead it by a redirect
    del _web.handle_open[_scheme]
_fetchers = ThreadPoolExecutor(64, thread_name_prefix="fetch")


async def read(text: str) -> str | bytes:
    """What Decoder.decode takes: a data URI as it is, or what is at an address. Raises RequestError."""
    scheme = text[:8].lower() if isinstance(text, str) else ""
    if scheme.startswith("data:"):
        return text
    if scheme.startswith(("http://", "https://")):
        if os.environ.get("CONVMIXER_FETCH") == "0":
            raise RequestError("image is an address, and this server fetches none; send a data URI")
        return await asyncio.get_running_loop().run_in_executor(_fetchers, fetch, text)
    raise RequestError("image is no data URI (data:image/png;base64,...) and no http or https URL; send one of them")


def fetch(url: str) -> bytes:
    """What is at an http or https address, after redirects. Raises RequestError."""
    end = time.monotonic() + SECONDS
    content = bytearray()
    try:
        with _web.open(urllib.request.Request(url, headers={"User-Agent": "convmixer"}), timeout=SILENCE) as answer:
            while chunk := answer.read1(2**16):
                content += chunk
                if len(content) > MAX_BYTES:
                    raise OSError(f"it has more than the {MAX_BYTES:,} bytes that can be read; make it smaller")
                if time.monotonic() > end:
                    raise OSError(f"it did not arrive within {SECONDS:g} seconds")
            if answer.length:
                raise OSError("it was cut off on its way; send it again")
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = error if isinstance(error, urllib.error.HTTPError) else getattr(error, "reason", error)
        reason = one_line(str(getattr(reason, "strerror", None) or reason))
        raise RequestError(f"image could not be fetched: {reason or type(error).__name__}") from error
    return bytes(content)
