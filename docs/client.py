"""Ask the server about pictures; Python's standard library is all that it needs.

    python docs/client.py dog.jpg cat.jpg [--server http://127.0.0.1:5000]

The server has no queue: while all its slots are busy it answers 409, and the client has to come back. A server that is
still starting, or starting again, refuses the connection or answers 503, which is treated the same.
"""

import argparse
import base64
import contextlib
import http.client
import json
import random
import re
import sys
import time
import urllib.error
import urllib.request

FIRST_PAUSE, LONGEST_PAUSE = 0.005, 0.25  # seconds; an answer of a small model takes about the first
# What Cog says, with no reason behind it, of a request that was hit by the cancellation of another one.
STRAY = ("CancelationException: ", "Input validation error: ")


class ServerError(Exception):
    """No answer; one line that says why."""


def classify(picture: bytes, server: str = "http://127.0.0.1:5000", *, within: float = 60, **inputs) -> dict:
    """The server's output for one encoded picture: {"model": ..., "predictions": [...], "heatmap": ...}.

    within: seconds after which to give up, over all attempts. inputs: model, top_k and heatmap. Raises ServerError.
    """
    uri = "data:application/octet-stream;base64," + base64.b64encode(picture).decode()
    return ask(json.dumps({"input": {"image": uri} | inputs}).encode(), server, within=within)


def ask(body: bytes, server: str, *, within: float = 60) -> dict:
    """`classify` for a request that is already written as JSON."""
    address = (server if "://" in server else f"http://{server}").rstrip("/")
    request = urllib.request.Request(f"{address}/predictions", body, {"Content-Type": "application/json"})
    opener = urllib.request.build_opener(_Handler)
    end, pause = time.monotonic() + within, FIRST_PAUSE
    while True:
        try:
            with opener.open(request, timeout=max(0.001, end - time.monotonic())) as response:
                answer = json.load(response)
            reason = answer.get("error") or f"the prediction was {answer['status']}"
            if answer["status"] != "canceled" and not reason.endswith(STRAY):
                break
        except urllib.error.HTTPError as error:
            reason = f"{error.code} {' '.join(error.read().decode(errors='replace').split())[:300]}"
            if error.code not in (409, 503):
                raise ServerError(f"the server refuses the request: {reason}") from None
        except (OSError, http.client.HTTPException) as error:  # refused, cut off, or silent for too long
            reason = str(error) or type(error).__name__
        # Clients that were turned away together must not come back together: hence a random part of the pause.
        wait = pause * random.uniform(0.5, 1)
        if time.monotonic() + wait > end:
            raise ServerError(f"no answer from {address} within {within:g} seconds, at last: {reason}")
        time.sleep(wait)
        pause = min(1.5 * pause, LONGEST_PAUSE)
    if answer["status"] != "succeeded":  # a prediction that failed comes with the code 200
        raise ServerError(re.sub(r"^((Async p|P)rediction failed: )*(\w+Error: )?", "", reason))
    return answer["output"]


class _Connection(http.client.HTTPConnection):
    """Goes on to the answer where the server closes before it has read the whole request: it says 413 then."""

    def endheaders(self, message_body=None, **options) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            super().endheaders(message_body, **options)


class _Handler(urllib.request.HTTPHandler):
    def http_open(self, request):
        return self.do_open(_Connection, request)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pictures", nargs="+", metavar="PICTURE")
    parser.add_argument("--server", default="http://127.0.0.1:5000", help="default: http://127.0.0.1:5000")
    options = parser.parse_args()
    for path in options.pictures:
        try:
            with open(path, "rb") as file:
                best, *_ = classify(file.read(), options.server)["predictions"]
            print(f"{path}: {best['label']}, {best['score']:.2%}")
        except (OSError, ServerError) as error:
            sys.exit(f"client.py: {path}: {error}")


if __name__ == "__main__":
    main()
