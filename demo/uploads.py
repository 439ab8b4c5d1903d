"""The folder of visitors' files: each running demo has its own."""

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, where what a killed demo left stays
    fcntl = None

PREFIX = "convmixer-demo-"


def make_folder() -> str:
    """A new folder, which the caller deletes at the end. Those of demos that were killed are deleted now.

    This process holds a lock on its folder, which the system lets go of when the process is dead.
    """
    for left in Path(tempfile.gettempdir()).glob(f"{PREFIX}*") if fcntl else ():
        with contextlib.suppress(OSError):  # another user's, or a running demo's
            held = _lock(left, fcntl.LOCK_NB)
            shutil.rmtree(left, ignore_errors=True)
            os.close(held)
    while True:
        folder = tempfile.mkdtemp(prefix=PREFIX)
        with contextlib.suppress(FileNotFoundError):  # a demo that starts at this moment has taken it for one left
            if fcntl is None or os.path.samestat(os.fstat(_lock(folder)), os.stat(folder)):
                return folder


def _lock(folder: str | Path, options: int = 0) -> int:
    """The open folder. Raises OSError where it is locked, another user's, or none."""
    held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        if os.fstat(held).st_uid != os.getuid():
            raise PermissionError(folder)
        fcntl.flock(held, fcntl.LOCK_EX | options)
    except OSError:
        os.close(held)
        raise
    return held
