"""The text that a client sends as ``image``: a data URI, or an address, or it is refused. None leads to a file here."""

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor

from convmixer import web

from . import RequestError

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
    try:
        return web.fetch(url)
    except OSError as error:
        raise RequestError(f"image could not be fetched: {error}") from error
