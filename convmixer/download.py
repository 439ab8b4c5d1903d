"""Resumable downloads with the standard library alone.

Bytes gather in ``NAME.part``. Beside it ``NAME.part.json`` says which version of which URL they belong to, so that a
later run, or another process, continues the same file and never joins pieces of two.
"""

import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

CHUNK_BYTES = 1 << 18
BACKOFF_SECONDS = 0.25  # before the first retry; doubled before each further one
REDRAW_SECONDS = 0.1
RETRIED_STATUSES = (408, 429, 500, 502, 503, 504)  # timeouts, too many requests, and servers in trouble

Progress = Callable[[int, int | None], object]


class DownloadError(RuntimeError):
    """One line that names every source that was tried and why each failed."""


class DiskError(DownloadError):
    """The file cannot be written here, so another source would not help."""


class _SourceError(Exception):
    """This source does not give the file, however often it is asked."""


class _TransferError(Exception):
    """The transfer failed or stopped early, and may succeed when tried again. What has arrived is kept."""


class _StaleError(_TransferError):
    """The part is not a piece of what the source has now."""


def fetch(
    urls: Sequence[str],
    destination: str | os.PathLike,
    *,
    progress: Progress | None = None,
    check: Callable[[Path], object] | None = None,
    timeout: float = 30,
    retries: int = 3,
) -> Path:
    """Download a file from the first of ``urls`` (http or https) that gives it whole; returns ``destination``.

    A file that is at ``destination`` already is returned as it is. What an earlier call left in ``destination.part`` is
    continued if the source still has the same version. Of several processes at once one downloads and the others wait.

    progress: called with the bytes that are here and the bytes expected (None if the source does not say), the last
        time with two equal numbers.
    check: called with the path of the finished file before it is moved into place; when it raises ValueError the file
        is discarded and the next source is tried.
    timeout: seconds to wait for a source to answer, or to send more.
    retries: how often a source is asked again, after a short pause, when the connection fails or is cut.

    Raises DownloadError when no source worked, DiskError when the file cannot be written. The part then stays for the
    next call, as it does after an interrupt.
    """
    destination = Path(destination)
    part = destination.with_name(f"{destination.name}.part")
    failures = []
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with _locked(destination.with_name(f"{destination.name}.lock")) as lock:
            if destination.is_file():
                return destination
            for url in urls:
                try:
                    _fetch_part(url, part, progress or _no_progress, timeout, retries)
                    _check_part(part, check)
                except (_SourceError, _TransferError) as error:
                    failures.append(f"{url}: {error}")
                    continue
                os.replace(part, destination)
                # Who waits for the lock now finds the file, so the lock is not needed by anyone any more.
                for leftover in (_origin_file(part), lock):
                    leftover.unlink(missing_ok=True)
                return destination
    except OSError as error:
        raise DiskError(f"cannot write to {destination.parent}: {error.strerror}") from error
    raise DownloadError(f"could not download {destination.name}: {'; '.join(failures) or 'it has no source'}")


def terminal_progress(name: str, stream: TextIO | None = None) -> Progress:
    """A ``progress`` for fetch that draws one updating line on a terminal, and else prints a first and a last line.

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


def _no_progress(done: int, total: int | None) -> None:
    pass


@contextmanager
def _locked(lock: Path) -> Iterator[Path]:
    """One process at a time; the system opens the lock of one that was killed."""
    if os.name == "nt":  # no flock there: two downloads of one file at the same time are the user's to avoid
        yield lock
        return
    import fcntl

    with open(lock, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield lock


def _check_part(part: Path, check: Callable[[Path], object] | None) -> None:
    if check is None:
        return
    try:
        check(part)
    except ValueError as error:
        part.unlink()
        raise _SourceError(error) from error


def _fetch_part(url: str, part: Path, progress: Progress, timeout: float, retries: int) -> None:
    """Complete ``part`` from ``url``, over as many connections as it takes."""
    for retry in range(retries + 1):
        try:
            return _transfer(url, part, progress, timeout)
        except _TransferError as error:
            if isinstance(error, _StaleError):
                part.unlink(missing_ok=True)
            if retry == retries:
                raise
        time.sleep(BACKOFF_SECONDS * 2**retry)


def _transfer(url: str, part: Path, progress: Progress, timeout: float) -> None:
    """Complete ``part`` over one connection, continuing it if it is a piece of what ``url`` has now."""
    origin = _read_origin(part)
    is_ours = origin.get("url") == url and origin.get("validator") is not None
    here = part.stat().st_size if is_ours and part.exists() else 0
    if here and here == origin["total"]:  # complete, but the process ended before it was moved into place
        progress(here, here)
        return
    headers = {"User-Agent": "convmixer", "Accept-Encoding": "identity"}
    if here:
        headers |= {"Range": f"bytes={here}-", "If-Range": origin["validator"]}
    with _open(url, headers, timeout) as response:
        now = {"url": url, "validator": _validator(response.headers), "total": _total_bytes(response)}
        if response.status == 206 and (now != origin or not _starts_at(response, here)):
            raise _StaleError("the file has changed since its first part arrived")
        if response.status != 206:  # the whole file: the first request, a newer version, or a server without ranges
            here = 0
            part.write_bytes(b"")  # first, so that bytes never stand beside another version's origin
            _origin_file(part).write_text(json.dumps(now))
        _append(response, part, here, now["total"], progress)


def _append(response, part: Path, here: int, total: int | None, progress: Progress) -> None:
    progress(here, total)
    # Unbuffered: what has arrived is in the file whatever happens next, and closing cannot fail.
    with open(part, "ab", buffering=0) as file:
        for chunk in _chunks(response):
            try:
                _write_all(file, chunk)
            except OSError as error:
                needed = "" if total is None else f" ({total / 1e6:.1f} MB are needed)"
                raise DiskError(f"cannot write to {part.parent}: {error.strerror}{needed}") from error
            here += len(chunk)
            progress(here, total)
        os.fsync(file.fileno())
    if total is None:
        progress(here, here)
    elif here != total:
        raise _TransferError(f"the connection ended after {here} of {total} bytes")


def _write_all(file, chunk: bytes) -> None:
    view = memoryview(chunk)
    while view:
        view = view[file.write(view) :]


def _chunks(response) -> Iterator[bytes]:
    from http.client import HTTPException

    try:
        while chunk := response.read1(CHUNK_BYTES):
            yield chunk
    except (OSError, HTTPException) as error:
        raise _TransferError(f"the connection was cut ({_reason(error)})") from error


def _open(url: str, headers: dict[str, str], timeout: float):
    """The answer, after redirects, with status 200 or 206; any other is an error."""
    from http.client import HTTPException
    from urllib import request
    from urllib.error import HTTPError

    # Not urlopen, which would also follow file: and ftp: addresses.
    opener = request.OpenerDirector()
    for handler in (
        request.ProxyHandler,
        request.HTTPHandler,
        request.HTTPSHandler,
        request.HTTPRedirectHandler,
        request.HTTPErrorProcessor,
        request.HTTPDefaultErrorHandler,
    ):
        opener.add_handler(handler())
    try:
        response = opener.open(request.Request(url, headers=headers), timeout=timeout)
    except HTTPError as error:
        error.close()
        raise _status_error(error.code)(f"HTTP {error.code} {error.reason}") from error
    except ValueError as error:  # not an address
        raise _SourceError(error) from error
    except (OSError, HTTPException) as error:
        raise _TransferError(_reason(error)) from error
    if response is None:  # no handler for this kind of address
        raise _SourceError("the address does not start with http: or https:")
    return response


def _status_error(status: int) -> type[Exception]:
    if status == 416:  # the part reaches beyond the end of the file
        return _StaleError
    return _TransferError if status in RETRIED_STATUSES else _SourceError


def _validator(headers) -> str | None:
    """What tells this version of the file from others: a strong ETag, else the date of its last change."""
    etag = headers.get("ETag")
    if etag and not etag.startswith("W/"):
        return etag
    return headers.get("Last-Modified")


def _total_bytes(response) -> int | None:
    if response.status == 206:
        text = response.headers.get("Content-Range", "").rpartition("/")[2]
    else:
        text = response.headers.get("Content-Length", "")
    return int(text) if text.isdecimal() else None


def _starts_at(response, offset: int) -> bool:
    match = re.match(r"bytes ([0-9]+)-", response.headers.get("Content-Range", ""))
    return match is not None and int(match[1]) == offset


def _origin_file(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _read_origin(part: Path) -> dict:
    """url, validator and total of the version that ``part`` is a piece of; empty if that is not known."""
    try:
        origin = json.loads(_origin_file(part).read_text())
    except (FileNotFoundError, ValueError):  # ValueError: cut while it was written
        return {}
    return origin if isinstance(origin, dict) and origin.keys() == {"url", "validator", "total"} else {}


def _reason(error: Exception) -> str:
    reason = getattr(error, "reason", None) or error  # URLError wraps what really happened
    return getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
