"""train/run.py with a bomb in it: a real signal, sent by the process to itself at a moment that can be named.

As a script it is what torchrun starts instead of train/run.py. With --serve it imports all that a run needs once and
forks a process for every line of JSON on its standard input: as real a process as any, without seconds of imports.
"""

import functools
import gc
import importlib
import json
import os
import resource
import runpy
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RUN = str(ROOT / "train" / "run.py")


def find(path: str) -> tuple[object, str]:
    """The object that holds what ``path`` names, and the name in it: torch.optim.AdamW.step is (AdamW, "step")."""
    words = path.split(".")
    for i in range(len(words) - 1, 0, -1):
        try:
            holder = importlib.import_module(".".join(words[:i]))
        except ImportError:
            continue
        return functools.reduce(getattr, words[i:-1], holder), words[-1]
    raise ImportError(path)


def plant(at: str, call: int = 1, signal: int = signal.SIGKILL, to="", after=False, half=False, whom="me") -> None:
    """Has the ``call``-th call of ``at`` send ``signal`` to this process.

    Before the call, ``after`` it, or when ``half`` of what torch.save writes is in the file. With ``to`` only calls
    count whose last argument ends so: the file that os.replace makes. ``whom`` may also be the process's "group", or
    its "parent", which is given a second before the call goes on.
    """
    holder, name = find(at)
    original, calls = getattr(holder, name), 0

    def explode() -> None:
        os.kill({"me": os.getpid(), "group": 0, "parent": os.getppid()}[whom], signal)
        time.sleep(whom == "parent")

    @functools.wraps(original)
    def wrapped(*args, **kwargs):
        nonlocal calls
        calls += not to or str(args[-1]).endswith(to)
        if calls != call or (to and not str(args[-1]).endswith(to)):
            return original(*args, **kwargs)
        if half:  # of torch.save(content, file)
            import io

            whole = io.BytesIO()
            original(args[0], whole)
            args[1].write(whole.getvalue()[: len(whole.getvalue()) // 2])
            args[1].flush()
        if not after:
            explode()
        result = original(*args, **kwargs)
        if after:
            explode()
        return result

    setattr(holder, name, wrapped)


def plant_mine() -> None:
    """Plants the bombs in the variable BOMBS that are meant for this process."""
    place = {"rank": int(os.environ.get("RANK", 0)), "start": int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))}
    for bomb in json.loads(os.environ.get("BOMBS", "[]")):
        if all(bomb.pop(name, here) == here for name, here in place.items()):
            plant(**bomb)


def serve() -> bool:
    """Forks a process a request, or waits for one; True in the child, which is then what was asked for."""
    sys.path[0] = str(ROOT)
    import matplotlib.backends.backend_agg
    import matplotlib.figure  # noqa: F401  what the end of a run imports late

    import train.run  # noqa: F401

    gc.collect()
    gc.freeze()  # or the end of each process takes two seconds: it would look at all these objects again
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            print(os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1]), flush=True)
            continue
        child = os.fork()
        if not child:
            os.setsid()
            log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.environ.update(request["env"])
            if request["limit"]:  # of a file's size, in bytes; Python ignores the signal, and gets an OSError
                resource.setrlimit(resource.RLIMIT_FSIZE, (request["limit"], request["limit"]))
            sys.argv = [request["script"] or RUN, *request["arguments"]]
            return True
        print(child, flush=True)
    return False


if __name__ == "__main__" and (sys.argv[1:] != ["--serve"] or serve()):
    plant_mine()
    if "--serve" not in sys.orig_argv:
        sys.argv[0] = RUN
    runpy.run_path(sys.argv[0], run_name="__main__")
