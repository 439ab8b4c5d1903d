"""The models of a server: the one that "auto" means, and the others by name, loaded at their first use."""

import asyncio
import contextvars
import os
import subprocess
import sys

from convmixer import CheckpointError, Classifier, zoo

from . import RequestError
from .watcher import log

DOWNLOAD_SECONDS = 60.0  # what has come by then is kept, and the next download goes on from there
REMEMBERED_SECONDS = 60.0  # a model that could not be loaded is not tried again before


class Models:
    """What "auto" is at the start stays "auto" as long as the server runs. Raises what zoo.load raises.

    together: how many pictures go through the network at once, for which the first model makes itself ready.
    """

    def __init__(self, together: int):
        name, _ = zoo.resolve("auto")
        first = Classifier("auto")
        first.warm_up(together)
        self._ready, self._loading = {"auto": first, name: first}, {}

    async def get(self, name: str) -> Classifier:
        """The model of this name; while one is loaded the others answer. Raises RequestError."""
        if name in self._ready:
            return self._ready[name]
        if name not in zoo.MODELS:
            raise RequestError(f"there is no such model; choose one of auto, {', '.join(zoo.MODELS)}")
        if name not in self._loading:
            if zoo.local_path(name) is None and os.environ.get("CONVMIXER_DOWNLOAD") != "1":
                raise _missing(name)
            self._loading[name] = asyncio.create_task(self._load(name), context=contextvars.Context())
        return await asyncio.shield(self._loading[name])  # several may wait for it, and one of them go away

    async def _load(self, name: str) -> Classifier:
        try:
            self._ready[name] = await asyncio.to_thread(_load, name)
            return self._ready[name]
        finally:
            asyncio.get_running_loop().call_later(REMEMBERED_SECONDS, self._loading.pop, name)


def _load(name: str) -> Classifier:
    """A model, downloaded if it is not here. Raises RequestError; the server's log has why."""
    try:
        if zoo.local_path(name) is None:
            # A process of its own can be ended, whatever it waits for.
            command = [sys.executable, "-m", "convmixer", "download", name]
            run = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS, check=False)
            if run.returncode:
                raise OSError(run.stderr.strip())
        return Classifier(name)
    except (CheckpointError, OSError, subprocess.TimeoutExpired) as error:
        log(f"{name}: {error}")
        raise _missing(name) from error


def _missing(name: str) -> RequestError:
    advice = f"whoever runs it can add it: python -m convmixer download {name}"
    return RequestError(f"{name} is not on this server; choose another model ({advice})")
