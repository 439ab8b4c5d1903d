"""What is at an http or https address, within limits."""

import time

MAX_BYTES = 100 * 2**20
SILENCE = 10.0  # seconds without a byte, after which a host is given up
SECONDS = 60.0  # for everything


def fetch(address: str) -> bytes:
    """The content of an address, after redirects to others of its kind. Raises OSError, whose text is one line."""
    import http.client  # takes as long as half of what a first answer imports
    import urllib.error
    import urllib.request

    web = urllib.request.build_opener()
    for scheme in ("file", "ftp", "data"):  # into none of which a host can lead it by a redirect
        del web.handle_open[scheme]
    end, content = time.monotonic() + SECONDS, bytearray()
    try:
        with web.open(urllib.request.Request(address, headers={"User-Agent": "convmixer"}), timeout=SILENCE) as answer:
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
        text = " ".join(str(getattr(reason, "strerror", None) or reason).split()) or type(error).__name__
        raise OSError("".join(character if character.isprintable() else "?" for character in text)) from error
    return bytes(content)
