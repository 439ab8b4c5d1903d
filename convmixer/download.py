"""Resumable downloads with the standard library alone.

Bytes gather in ``NAME.part``. Beside it, ``NAME.part.json`` says which version of which URL they belong to, so that a
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

CHUNK_BYTES = 1 << 18
BACKOFF_SECONDS = 0.25  # before the first retry; doubled before each further one
REDRAW_SECONDS = 0.1

Progress = Callable[[int, int | None], None]


class DownloadError(RuntimeError):
    """One line that names every source that was tried and why it failed."""


class DiskError(DownloadError):
    """The file cannot be written here: another source would not help."""


class _SourceError(Exception):
    """This source will not give the file, however often it is asked."""


class _CutError(Exception):
    """The transfer stopped early; what has arrived is kept."""


def fetch(
    urls: Sequence[str],
    destination: str | os.PathLike,
    *,
    progress: Progress | None = None,
    check: Callable[[Path], object] | None = None,
    timeout: float = 30,
    retries: int = 3,
) -> Path:
    """Download one file, from the first of ``urls`` (http or https) that gives it whole; returns ``destination``.

    A file that is at ``destination`` already is returned as it is. What an earlier call left in ``destination.part`` is
    continued if the source still has the same version. Of several processes at once one downloads, the others wait.

    progress: called with the bytes that are here and those that are expected, None if the source does not say.
    check: called with the path of the finished file before it is moved into place; a ValueError from it discards the
        file and moves on to the next source.
    timeout: seconds to wait for the source to answer or to send more.
    retries: how often a source is asked again, after a short pause, when the connection fails or is cut.

    Raises DownloadError when no source worked, DiskError when the file cannot be written. After these, and after an
    interrupt, the part stays for the next call.
    """
    destination = Path(destination)
    failures = []
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with _locked(destination):
            if destination.is_file():
                return destination
            part = _Part(destination)
            for url in urls:
                try:
                    _fetch_from(url, part, progress or (lambda done, total: None), timeout, retries)
                    if check:
                        check(part.path)
                    part.finish(destination)
                    return destination
                except (_SourceError, _CutError) as error:
                    failures.append(f"{url}: {error}")
                except ValueError as error:
                    part.discard()
                    failures.append(f"{url}: {error}")
    except OSError as error:
        raise DiskError(f"cannot write to {destination.parent}: {error.strerror}") from error
    raise DownloadError(f"could not download {destination.name}: {'; '.join(failures) or 'it has no source'}")
