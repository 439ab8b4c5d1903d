"""Runs cases in a process of their own, which may crash, hang or run out of memory without harm to the others.

Linux only: memory is measured through /proc.
"""

import contextlib
import importlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 40.0  # seconds until a case counts as hanging; the machine may be busy with something else
CPU_SECONDS = 10.0  # of the processor, for one case
START_SECONDS = 300.0
HARD_LIMIT = 6 * 2**30  # bytes that a case may take before the system refuses more; the target's own limit is smaller


@dataclass(frozen=True)
class Result:
    """What became of one case; ``failure`` is empty unless a promise was broken."""

    outcome: str
    failure: str = ""
    seconds: float = 0.0  # of the processor
    peak: int = 0  # bytes above what the process had before


class Child:
    """A process that runs the cases of one target (a module such as fuzz.pictures), started again when it has died."""

    def __init__(self, target: str, seed: int):
        self.target, self.seed = target, seed
        self.process: subprocess.Popen | None = None
        self.folder = tempfile.TemporaryDirectory(prefix="convmixer-fuzz-")
        self.starts = 0

    def run(self, number: int, file: Path | None = None) -> Result:
        """One case: number ``number``, or the bytes of ``file``."""
        if self.process is None:
            self._start()
        request = {"number": number, "file": None if file is None else str(file)}
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        self.process.stdin.flush()
        return self._answer(PATIENCE)

    def content(self) -> bytes:
        """The bytes of the case that ran last."""
        return Path(self.folder.name, "case").read_bytes()

    def memory(self) -> int:
        """Bytes that the process has in memory; 0 when there is none."""
        return _status(self.process.pid, "VmRSS") if self.process else 0

    def close(self) -> None:
        self._stop()
        self.folder.cleanup()

    def _start(self) -> None:
        self.starts += 1
        command = [sys.executable, "-m", "fuzz.child", self.target, str(self.seed), self.folder.name]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)
        ready = self._answer(START_SECONDS)
        if ready.outcome != "ready":
            raise RuntimeError(f"the process for {self.target} does not start: {ready.failure}")

    def _stop(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()
            for pipe in (self.process.stdin, self.process.stdout):
                with contextlib.suppress(OSError):
                    pipe.close()
            self.process = None

    def _answer(self, patience: float) -> Result:
        readable, _, _ = select.select([self.process.stdout], [], [], patience)
        line = self.process.stdout.readline() if readable else b""
        if line:
            return Result(**json.loads(line))
        if not readable:
            self._stop()
            return Result("hang", f"no answer after {patience:.0f} seconds")
        code = self.process.wait()
        self._stop()
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return Result("crash", f"the process died: {how}")


def _status(pid: int | str, field: str) -> int:
    """A field of /proc/PID/status in bytes."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/status") as file:
        for line in file:
            if line.startswith(field):
                return 1024 * int(line.split()[1])
    return 0


def _serve(target_name: str, seed: int, folder: Path) -> None:
    """The process's side: a request a line on standard input, a result a line on what was standard output."""
    answers, said = os.dup(1), folder / f"said-{os.getpid()}"
    target = importlib.import_module(target_name)
    target.warm_up()
    # What a library prints would stand between the answers of the command line; the length of this file gives it away.
    descriptor = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(
        os.open(os.devnull, os.O_WRONLY), 2
    )  # libtiff says there what is wrong with a file, and cannot be told not to
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    limit = _status("self", "VmSize") + HARD_LIMIT
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    _send(answers, Result("ready"))
    for line in sys.stdin.buffer:
        request = json.loads(line)
        is_number = request["file"] is None
        try:
            content = target.make(seed, request["number"]) if is_number else Path(request["file"]).read_bytes()
        except Exception as error:
            _send(answers, Result("not made", f"a fault in the fuzzing itself: {error!r}"))
            continue
        valid = is_number and target.is_valid(request["number"])
        Path(folder, "case").write_bytes(content)  # for whoever has to say what this process died of
        before_said = os.fstat(descriptor).st_size
        result = _measured(target, content, folder, valid)
        sys.stdout.flush()
        if not result.failure and os.fstat(descriptor).st_size > before_said:
            text = said.read_bytes()[before_said:].decode(errors="replace")
            result = Result(
                result.outcome, f"something was printed: {text.strip()!r:.300}", result.seconds, result.peak
            )
        _send(answers, result)


def _measured(target, content: bytes, folder: Path, valid: bool) -> Result:
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from what is in memory now
    before, start = _status("self", "VmRSS"), time.process_time()
    outcome, failure = "broken", ""
    try:
        outcome = target.check(content, folder, valid)
    except AssertionError as error:
        failure = str(error)
    except BaseException as error:  # a promise is that nothing else is raised, whatever its class
        where = traceback.extract_tb(error.__traceback__)[-1]
        failure = f"{type(error).__name__} out of {Path(where.filename).name}:{where.lineno}: {error!s:.300}"
    seconds, peak = time.process_time() - start, max(0, _status("self", "VmHWM") - before)
    if not failure and seconds > CPU_SECONDS:
        failure = f"it took {seconds:.1f} seconds of the processor"
    if not failure and peak > target.EXTRA_MEMORY:
        failure = f"it took {peak / 2**20:,.0f} MiB of memory"
    return Result(outcome, failure, seconds, peak)


def _send(descriptor: int, result: Result) -> None:
    os.write(descriptor, json.dumps(vars(result)).encode() + b"\n")


if __name__ == "__main__":
    _serve(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
