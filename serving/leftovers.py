"""The folders that Cog leaves behind, one with two empty ones in it for every prediction."""

import contextlib
import os
import threading
import time
from pathlib import Path

# Cog 0.23 has no setting for it, and names no prediction to its predictor. Other servers on this machine use it, too.
FOLDER = Path("/tmp/coglet/predictions")
MAX_AGE = 600.0  # seconds; far more than any prediction takes
EVERY = 60.0  # seconds


def start_deleting() -> None:
    """From now on delete, once a minute, what predictions left more than ten minutes ago; files are never deleted."""
    threading.Thread(target=_keep_deleting, name="delete what Cog leaves", daemon=True).start()


def delete_empty(folder: Path, max_age: float) -> int:
    """Delete the folders in ``folder`` that are older than ``max_age`` seconds and hold no file; gives their number."""
    deleted = 0
    with contextlib.suppress(OSError):
        for prediction in os.scandir(folder):
            with contextlib.suppress(OSError):  # it holds files, or another server was first
                if prediction.stat(follow_symlinks=False).st_mtime < time.time() - max_age:
                    for inner in os.scandir(prediction):
                        os.rmdir(inner)
                    os.rmdir(prediction)
                    deleted += 1
    return deleted


def _keep_deleting() -> None:
    while True:
        delete_empty(FOLDER, MAX_AGE)
        time.sleep(EVERY)
