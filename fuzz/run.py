"""Fuzzing: damaged pictures, damaged checkpoints and damaged requests, of which none may break a promise.

    python fuzz/run.py --target pictures|checkpoints|http|all --seconds 60 --seed 0 [--cases N]
    python fuzz/run.py --target pictures --seed 0 --case 1234          # one case again
    python fuzz/run.py --target pictures --file FILE                   # the bytes of a file

A case is made of the seed and its number alone, so it is the same on every machine with the same versions of the
libraries that make the valid pictures. Pictures and checkpoints are read in a process of their own, under a limit of
memory and of time; one that crashes or hangs is a failure like any other, and the next case has a new process. Requests
go to Cog's own server, which `python -m serving` starts. Each failure is one line with the file of the offending bytes
and the command that repeats it. The exit code is 1 if there was a failure.
"""

import sys
from pathlib import Path

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, so that `fuzz` and `convmixer` are found

import argparse
import importlib
import os
import time
from collections import Counter

from fuzz.child import ROOT, Child, Result

TARGETS = ("pictures", "checkpoints", "http")
FAILURES_SHOWN = 50  # then a target is broken, and more lines say nothing new


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    failures = 0
    for target in TARGETS if options.target == "all" else (options.target,):
        failures += fuzz(target, options)
    return 1 if failures else 0


def fuzz(name: str, options: argparse.Namespace) -> int:
    """Runs the cases of one target, prints its failures and a summary, and gives the number of failures."""
    runner = _runner(name, options.seed)
    outcomes, failures, slowest, largest = Counter(), 0, (0.0, 0), (0, 0)
    first = options.first if options.case is None else options.case
    last = first + 1 if options.case is not None or options.file else first + (options.cases or sys.maxsize)
    start, number, memory = time.monotonic(), first, 0
    try:
        while number < last and (
            options.cases or options.case is not None or time.monotonic() < start + options.seconds
        ):
            result: Result = runner.run(number, options.file)
            memory = memory or runner.memory()
            outcomes[result.outcome] += 1
            slowest, largest = max(slowest, (result.seconds, number)), max(largest, (result.peak, number))
            if result.failure:
                failures += 1
                _report(name, options, number, result, runner.content())
                if failures == FAILURES_SHOWN:
                    break
            number += 1
        seconds, grown = time.monotonic() - start, runner.memory() - memory
    finally:
        runner.close()
    print(
        f"{name}: {number - first:,} cases in {seconds:.0f} s, {(number - first) / max(seconds, 1e-9):.0f} cases/s; "
        + ", ".join(f"{count:,} {outcome}" for outcome, count in outcomes.most_common())
        + f"; {failures} failures; slowest {slowest[0]:.1f} s (case {slowest[1]}), "
        f"most memory {largest[0] / 2**20:.0f} MiB (case {largest[1]}), "
        f"left in memory {grown / 2**20:+.0f} MiB",
        flush=True,
    )
    return failures


def _runner(name: str, seed: int):
    if name == "http":
        return importlib.import_module("fuzz.server").Runner(seed)
    return Child(f"fuzz.{name}", seed)


def _report(name: str, options: argparse.Namespace, number: int, result: Result, content: bytes) -> None:
    if options.file:
        return print(f"{name}: {options.file}: {result.failure}", flush=True)
    file = options.save / f"{name}-{options.seed}-{number}"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    again = f"python fuzz/run.py --target {name} --seed {options.seed} --case {number}"
    print(f"{name}: case {number} of seed {options.seed}: {result.failure}\n    {file}\n    {again}", flush=True)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = _Parser(prog="fuzz/run.py", description=__doc__.splitlines()[0])
    parser.add_argument("--target", choices=(*TARGETS, "all"), default="all")
    parser.add_argument("--seconds", type=_positive(float), default=60.0, help="for each target; default: 60")
    parser.add_argument("--seed", type=_natural, default=0, help="default: 0")
    parser.add_argument("--cases", type=_positive(int), help="so many cases, however long they take")
    parser.add_argument("--first", type=_natural, default=0, help="number of the first case; default: 0")
    parser.add_argument("--case", type=_natural, help="only the case of this number")
    parser.add_argument("--file", type=Path, help="only the bytes of this file")
    parser.add_argument("--save", type=Path, default=ROOT / "runs" / "fuzz", help="where offending bytes are written")
    options = parser.parse_args(arguments)
    if (options.file or options.case is not None) and options.target == "all":
        parser.error("--case and --file need one --target: pictures, checkpoints or http")
    if options.file and not os.path.isfile(options.file):
        parser.error(f"there is no file {str(options.file)!r:.200}")
    return options


def _positive(kind: type):
    def convert(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not 0 < value < 1e9:
            raise argparse.ArgumentTypeError(f"{text!r:.50} is not a positive number")
        return value

    return convert


def _natural(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        raise argparse.ArgumentTypeError(f"{text!r:.50} is not a whole number of at least 0")
    return int(text)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        """One line, where argparse would also print the usage."""
        self.exit(2, f"{self.prog}: {message}\n")


if __name__ == "__main__":
    sys.exit(main())
