"""Runs of train/run.py as processes of their own, and what is left of them: for the tests that kill them."""

import contextlib
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from conftest import ROOT
from safetensors.torch import load_file

SABOTEUR = str(ROOT / "tests" / "saboteur.py")
# One thread: the sums do not depend on the machine's cores then, and small networks are faster.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


class Run:
    """A process that the server forked, the leader of a session of its own; once it has ended, its code and output."""

    def __init__(self, server: "Server", pid: int, log: Path):
        self.server, self.pid, self.log = server, pid, log

    def wait_until_stopped(self) -> None:
        """Until a SIGSTOP has come."""
        while fields_of(self.pid)[:1] != ["T"]:
            time.sleep(0.002)

    def wait(self, *codes: int) -> "Run":
        """Until it has ended with one of the codes, by default 0; a signal that kills is minus its number."""
        self.code = int(self.server.ask(wait=self.pid))
        self.output = self.log.read_text()  # standard output and error
        assert self.code in (codes or (0,)), self.output
        assert "Traceback" not in self.output and "terminate called" not in self.output, self.output
        return self

    @property
    def complaint(self) -> str:
        """The only line that says what went wrong."""
        (line,) = [line for line in self.output.splitlines() if line.startswith("train/run.py: ")]
        return line

    def left_over(self) -> list[int]:
        """Processes of the run that are still there after a while."""
        return wait_until_gone(lambda pid: fields_of(pid)[3:4] == [str(self.pid)])


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

    def start(self, *arguments: object, bombs=(), limit: int = 0, script="train/run.py", env=None) -> Run:
        """``script`` with bombs in it, a ``limit`` of bytes a file, and more environment."""
        self.started += 1
        log, env = self.folder / f"log-{self.started}", {"BOMBS": json.dumps(bombs)} | (env or {})
        words = [str(script), *map(str, arguments)]
        return Run(self, int(self.ask(log=str(log), words=words, limit=limit, env=env)), log)

    def run_two(self, *arguments: object, code: int = 0) -> list[Run]:
        """Two processes on one run, which find each other as those that torchrun starts do."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        places = [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in (0, 1)]
        runs = [self.start(*arguments, env=place) for place in places]
        return [run.wait(code) for run in runs]

    def close(self) -> None:
        self.process.terminate()  # the end of its input would wait for all that inherited the pipe
        self.process.wait()


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


def torchrun(*arguments: object, bombs: list[dict]) -> subprocess.CompletedProcess:
    """train/run.py as two processes on this machine, which torchrun starts, and once more when one is killed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", "1", SABOTEUR, *map(str, arguments)]
    environment = os.environ | ENVIRONMENT | {"BOMBS": json.dumps(bombs)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.run(command, cwd=ROOT, env=environment, text=True, timeout=800, check=False, **pipes)


def read(path: Path) -> dict:
    return torch.load(path, map_location="cpu", weights_only=True)


def differences(a: Path, b: Path) -> list[tuple[str, str]]:
    """Where the last checkpoints and models of two run folders differ; but for times, to the last bit."""

    def digest(tensor: torch.Tensor) -> str:
        content = repr((tensor.dtype, tensor.shape)).encode() + tensor.numpy().tobytes()
        return hashlib.sha256(content).hexdigest()

    lines = []
    for folder in (a, b):
        content = [read(folder / "last.pt"), load_file(folder / "model.safetensors")]
        for row in content[0]["history"]:
            del row["seconds"], row["images_per_s"]
        lines.append(json.dumps(content, default=digest, indent=1).splitlines())
    return [pair for pair in zip(*lines, strict=True) if pair[0] != pair[1]]


def left_over(folder: Path) -> list[str]:
    """Files of a run folder that should not outlast the run."""
    return [path.name for path in folder.iterdir() if path.name.endswith(".tmp") or path.name == "next.pt"]
