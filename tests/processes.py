"""Runs of train/run.py as processes of their own, and what is left of them: for the tests that kill them."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from conftest import ROOT
from safetensors.torch import load_file

SABOTEUR = str(ROOT / "tests" / "saboteur.py")
TIMES = ("seconds", "images_per_s")  # of a history row: what differs from run to run
# One thread: the sums do not depend on the machine's cores then, and small networks are faster.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


@dataclass(frozen=True)
class Ended:
    """What is known of a run that ended."""

    code: int  # minus the number of the signal that killed it
    output: str  # standard output and error


class Run:
    """A run under way, in a process that the server forked; the leader of a session of its own."""

    def __init__(self, server: "Server", pid: int, log: Path):
        self.server, self.pid, self.log = server, pid, log

    def wait_for(self, text: str) -> None:
        """Until the run has printed ``text``, or its process is no more."""
        while text not in self.log.read_text() and fields_of(self.pid)[:1] not in ([], ["Z"]):
            time.sleep(0.002)

    def wait(self) -> Ended:
        return Ended(int(self.server.ask(wait=self.pid)), self.log.read_text())

    def left_over(self, seconds: float = 10) -> list[int]:
        """Processes of the run that are still there after a while."""
        return wait_until_gone(lambda pid: fields_of(pid)[3:4] == [str(self.pid)], seconds)


class Server:
    """Starts runs by forking a process that has imported everything: tests/saboteur.py."""

    def __init__(self, folder: Path):
        self.folder, self.started = folder, 0
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        command = [sys.executable, SABOTEUR, "--serve"]
        self.process = subprocess.Popen(command, cwd=ROOT, env=os.environ | ENVIRONMENT, text=True, **pipes)

    def ask(self, **request: object) -> str:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline()

    def start(
        self,
        *arguments: object,
        bombs: list[dict] | None = None,
        limit: int = 0,
        script: Path | str = "",
        env: dict[str, str] | None = None,
    ) -> Run:
        """train/run.py, or another ``script``, with bombs in it and a ``limit`` of bytes a file."""
        self.started += 1
        log = self.folder / f"log-{self.started}"
        log.touch()
        env = {"BOMBS": json.dumps(bombs or [])} | (env or {})
        words = [*map(str, arguments)]
        return Run(self, int(self.ask(log=str(log), arguments=words, limit=limit, script=str(script), env=env)), log)

    def run(self, *arguments: object, **options) -> Ended:
        return self.start(*arguments, **options).wait()

    def run_two(self, *arguments: object, **options) -> tuple[Ended, Ended]:
        """Two processes on one run, which find each other as those that torchrun starts do."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        places = [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in (0, 1)]
        runs = [self.start(*arguments, env=place, **options) for place in places]
        first, second = (run.wait() for run in runs)
        return first, second

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(30)


def fields_of(pid: int) -> list[str]:
    """State, parent, group, session, ... of a process, as /proc gives them; none where there is no process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def speaks_of(pid: int, word: str) -> bool:
    """Whether a process's command line has ``word``, such as a test's own folder."""
    with contextlib.suppress(OSError):
        return word.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def children(pid: int) -> list[int]:
    numbers = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
    return [number for number in numbers if fields_of(number)[1:2] == [str(pid)]]


def child(pid: int, word: str, seconds: float = 60) -> int:
    """The one child of a process whose command line has ``word``, as soon as there is one."""
    end = time.monotonic() + seconds
    while not (found := [number for number in children(pid) if speaks_of(number, word)]):
        assert time.monotonic() < end
        time.sleep(0.01)
    (number,) = found
    return number


def wait_until_gone(belongs: Callable[[int], bool], seconds: float = 10) -> list[int]:
    """The processes that are still there after a while; it ends them."""
    end = time.monotonic() + seconds
    while True:
        pids = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
        found = [pid for pid in pids if pid != os.getpid() and belongs(pid) and fields_of(pid)[:1] != ["Z"]]
        if not found:
            return []
        if time.monotonic() > end:
            for pid in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return found
        time.sleep(0.05)


def torchrun(
    *arguments: object, bombs: list[dict] | None = None, restarts: int = 0, script: Path | str = SABOTEUR
) -> Ended:
    """train/run.py as two processes on this machine, started by torchrun. Gives what is known once they have ended."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", str(restarts), SABOTEUR, *map(str, arguments)]
    environment = os.environ | ENVIRONMENT | {"BOMBS": json.dumps(bombs or [])}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, text=True, start_new_session=True, **pipes)
    try:
        output = process.communicate(timeout=200 * (1 + restarts))[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)  # torchrun hands it on
        raise
    return Ended(process.returncode, output)


def read(path: Path) -> dict:
    return torch.load(path, map_location="cpu", weights_only=True)


def without_times(rows: list[dict]) -> list[dict]:
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def differences(a: Path, b: Path) -> list[str]:
    """What differs between the last checkpoints and the models of two run folders, but times: each bit counts."""
    one, two = read(a / "last.pt"), read(b / "last.pt")
    for content in (one, two):
        content["history"] = without_times(content["history"])
        content["running"].pop("seconds")
        content.pop("commit")  # of the code, which may go on while the tests run
    found = list(compare(one, two))
    return found + list(compare(load_file(a / "model.safetensors"), load_file(b / "model.safetensors"), "model"))


def compare(a, b, name: str = "") -> Iterator[str]:
    """Yields the places where two nested values differ; NaN equals NaN."""
    if type(a) is not type(b):
        yield f"{name}: {type(a)} and {type(b)}"
    elif isinstance(a, dict):
        if a.keys() != b.keys():
            yield f"{name}: {a.keys() ^ b.keys()}"
        for key in a.keys() & b.keys():
            yield from compare(a[key], b[key], f"{name}.{key}")
    elif isinstance(a, list | tuple):
        if len(a) != len(b):
            yield f"{name}: {len(a)} and {len(b)} entries"
        for i, (x, y) in enumerate(zip(a, b, strict=False)):
            yield from compare(x, y, f"{name}[{i}]")
    elif isinstance(a, torch.Tensor):
        if a.dtype != b.dtype or a.shape != b.shape or not torch.equal(a, b):
            yield f"{name}: another tensor"
    elif a != b and not (a != a and b != b):
        yield f"{name}: {a!r} and {b!r}"


def left_over(folder: Path) -> list[str]:
    """Files of a run folder that should not outlast the run."""
    return [path.name for path in folder.iterdir() if path.name.endswith(".tmp") or path.name == "next.pt"]
