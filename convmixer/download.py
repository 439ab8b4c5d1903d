"""Fetching a file from an address, and showing how far it is."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from .readers import error_summary

REDRAW_SECONDS = 0.1

Progress = Callable[[int, int | None], object]  # called with the bytes that are here, and all of them, if known


class DownloadError(RuntimeError):
    """One line that says what could not be fetched from where, and why."""


def fetch(
    url: str, destination: Path, progress: Progress | None = None, check: Callable[[Path], object] | None = None
) -> Path:
    """Download a file (http or https) to ``destination``, and give that; one that is there already is not fetched.

    What an earlier call left in ``destination.part`` is continued. Of several processes one downloads, and the others
    wait. check: called with the complete file before it is moved into place; when it raises ValueError the file is
    discarded. Raises DownloadError.
    """
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import WeakFileLock

    part = destination.with_name(f"{destination.name}.part")
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(destination.with_name(f"{destination.name}.lock")):
            if destination.is_file():
                return destination
            with open(part, "ab") as file:
                http_get(url, file, resume_size=file.tell(), tqdm_class=progress_bar(progress))
            if check:
                check(part)
            os.replace(part, destination)
            return destination
    except Exception as error:  # of the disk, of the check, and whatever huggingface_hub's HTTP library raises
        is_http = isinstance(error, HfHubHTTPError)
        if (is_http and error.response.status_code == 416) or isinstance(error, ValueError):  # 416: beyond the end
            part.unlink(missing_ok=True)
        raise DownloadError(f"{url}: {reason(error)}") from error


def reason(error: Exception) -> str:
    """Why a download failed, in a few words."""
    response = getattr(error, "response", None)
    if response is not None:
        return f"HTTP {response.status_code} {response.reason_phrase}"
    if isinstance(error, OSError) and error.strerror:  # of the disk: the network's come in another library's classes
        return f"cannot write to {os.path.dirname(error.filename or '') or 'the cache'}: {error.strerror}"
    return error_summary(error)


def progress_bar(progress: Progress | None) -> type:
    """A class that huggingface_hub takes for that of its progress bars, and that draws none but calls ``progress``."""
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options | {"disable": True})
            self.update(0)

        def update(self, n: float | None = 1) -> None:
            self.n += n
            if progress:
                progress(int(self.n), self.total)

        def update_transfer(self, n: int) -> None:
            """What Xet reports beside the bytes in the file: the compressed ones that came over the network."""

        def set_transfer_postfix_str(self, *_, **__) -> None:
            """Their speed."""

    return Bar


def terminal_progress(name: str, stream: TextIO | None = None) -> Progress:
    """A Progress that draws one updating line on a terminal, and else prints a first and a last line.

    ``stream`` is standard error by default.
    """
    stream = stream or sys.stderr
    is_terminal = stream.isatty()
    drawn_at = None

    def report(done: int, total: int | None) -> None:
        nonlocal drawn_at
        is_first, is_last = drawn_at is None, done == total
        if not is_first and not is_last and (not is_terminal or time.monotonic() - drawn_at < REDRAW_SECONDS):
            return
        drawn_at = time.monotonic()
        of_total = f" of {total / 1e6:.1f} MB, {done / (total or 1):4.0%}" if total is not None else " MB"
        line = f"{name}: {done / 1e6:.1f}{of_total}"
        if is_terminal:
            # The cursor goes back to the start, so that an error message is not appended to a half-done line.
            stream.write(f"{line:<70}" + ("\n" if is_last else "\r"))
        else:
            stream.write(f"{line}\n")
        stream.flush()

    return report
