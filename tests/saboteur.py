"""train/run.py with a bomb in it: a real signal, sent by the process to itself at a moment that can be named.

As a script it is what torchrun starts instead of train/run.py. With --serve it imports all that a run needs once and
forks a process for every line of JSON on its standard input: as real a process as any, without seconds of imports.
"""

import functools
import gc
import json
import os
import pkgutil
import resource
import runpy
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RUN = str(ROOT / "train" / "run.py")


def plant(at: str, call: int = 1, signal: int = signal.SIGKILL, to: str = "", whom: str = "me") -> None:
    """Has the ``call``-th call of ``at``, such as torch.optim.AdamW.step, send ``signal`` before it begins.

    With ``to`` only calls count whose last argument ends so: the file that os.replace makes. ``whom`` is this process,
    its "group", or its "parent", which is given a second.
    """
    place, _, name = at.rpartition(".")
    holder, calls = pkgutil.resolve_name(place), 0
    original = getattr(holder, name)

    @functools.wraps(original)
    def wrapped(*args, **kwargs):
        nonlocal calls
        if not to or str(args[-1]).endswith(to):
            calls += 1
            if calls == call:
                os.kill({"me": os.getpid(), "group": 0, "parent": os.getppid()}[whom], signal)
                time.sleep(whom == "parent")
        return original(*args, **kwargs)

    setattr(holder, name, wrapped)


def serve() -> bool:
    """Forks a process a request, or waits for one; True in the child, which is then what was asked for."""
    sys.path[0] = str(ROOT)
    import train.session

    # Two thirds of a small run's time, and drawn in tests/test_train_run.py.
    train.session.draw_curves = train.session.draw_confusion = lambda *_: None
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
            sys.argv = request["words"]
            return True
        print(child, flush=True)
    return False


if __name__ == "__main__":
    serving = sys.argv[1:] == ["--serve"]
    if not serving or serve():
        start = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
        for bomb in json.loads(os.environ["BOMBS"]):
            if bomb.pop("start", start) == start and bomb.pop("rank", 0) == int(os.environ.get("RANK", 0)):
                plant(**bomb)
        runpy.run_path(sys.argv[0] if serving else RUN, run_name="__main__")
