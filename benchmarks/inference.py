"""Inference on the CPU: this project against timm, torch.compile, ONNX Runtime and OpenVINO, side by side in one run.

    python benchmarks/inference.py [--models NAME ...] [--batches 1 16] [--only ours ...] [--json FILE] [--plot FILE]

For each model and batch size every contestant is a process of its own with the same weights (random ones, but for the
shipped model), the same pictures in memory and all cores, as its library comes. They are alive together and take turns,
so that a change in the machine's speed meets all of them; the figure is the median over the rounds. A turn is as many
calls as fit into a tenth of a second, at least one.

Logits are compared with timm eager's. A float32 contestant that is off by more than 1e-4 of the largest logit ends the
run with exit code 1, after the tables of what was measured before; bfloat16 and 8 bits are off by more.

The ceiling is how fast this machine multiplies float32 matrices of the shapes of the network's own 1x1 convolutions, by
MKL (torch.mm) or oneDNN (whichever is faster), measured in turns with the rest. A contestant's share of it is the time
that these products alone take over the contestant's own: what beats float32's arithmetic can have more than 100 %.

Memory is the most that the process ever had (VmHWM, after its last turn) minus what it had before the model was loaded
(VmRSS): weights, feature maps, and what the library keeps; not the imports, the pictures, or the C++ compiler that
torch.compile starts.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # the repository, so that `benchmarks` is found

from benchmarks.inference_contestants import CEILING, CONTESTANTS, MEASURE, OURS, PRODUCTS  # noqa: E402
from benchmarks.inference_models import MODELS, Cell  # noqa: E402
from benchmarks.inference_report import cell_lines, machine, markdown, plot  # noqa: E402
from benchmarks.options import Parser, at_least_one  # noqa: E402

BATCHES = (1, 4, 16, 64)
LEFT_OUT = (("convmixer_1536_20", 64), ("convmixer_768_32", 64))  # unless --batches asks: as long as all the rest
LEAST_ROUNDS = 3  # taken however long they last
PAUSE = 0.1  # seconds before a turn: ONNX Runtime's threads go on waiting for work, at full speed, for half of that
QUIET = 0.5  # the load average up to which nothing is said about it
TOLERANCE = 1e-4  # of the largest logit: between float32 contestants only rounding differs


class Failure(Exception):
    """One line that says why the run cannot go on."""


class Ended(Failure):
    """A contestant's process ended where it should have answered."""


class Contestant:
    """The process of one contestant, and what is known about it."""

    def __init__(self, name: str, cell: Cell):
        self.name, self.precision, self.first, self.times = name, None, None, []
        words = ["-m", "benchmarks.inference_contestants", name, cell.model, cell.folder, cell.batch]
        words += ["--threads", cell.threads] if cell.threads else []
        command = [sys.executable, *map(str, words)]
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def read(self) -> dict:
        """The next answer. Raises Failure if the process has ended."""
        line = self.process.stdout.readline()
        if not line:
            raise Ended(f"{self.name} ended without an answer (exit status {self.process.wait()}); see above")
        return json.loads(line)

    def turn(self) -> float:
        """Seconds of one batch."""
        print(file=self.process.stdin, flush=True)
        return self.read()["seconds"]

    def finish(self) -> float | None:
        """Ends the process; gives its memory in MB."""
        self.process.stdin.close()
        return self.read()["megabytes"]

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()


def check_logits(logits: dict, precisions: dict[str, str]) -> dict[str, float]:
    """The largest absolute difference of each contestant's logits from the measure's.

    Raises Failure for logits that are not finite or of another shape, and for a float32 contestant that is off.
    """
    import numpy as np

    reference = logits[MEASURE]
    largest, differences = float(np.abs(reference).max()), {}
    for name, own in logits.items():
        if own.shape != reference.shape or not np.isfinite(own).all():
            raise Failure(f"{name} gives logits of shape {own.shape}, or not finite ones, and not {reference.shape}")
        differences[name] = float(np.abs(own - reference).max())
        if precisions[name] == "float32" and differences[name] > TOLERANCE * largest:
            off = f"{differences[name]:.1e}, where the largest is {largest:.3g}"
            raise Failure(f"{name}: WRONG LOGITS, off by {off}; right would be at most {TOLERANCE * largest:.1e}")
    return differences


def line_up(cell: Cell, names: list[str], stack: contextlib.ExitStack) -> tuple[list[Contestant], dict[str, str]]:
    """The contestants, each after its first call, and why others are left out. ``stack`` ends their processes."""
    racing, skipped = [], {}
    started = [Contestant(name, cell) for name in names]
    for contestant in started:
        stack.callback(contestant.close)
    for contestant in started:  # they load at the same time, and take their first turns one by one: that needs memory
        try:
            hello = contestant.read()
            if "skipped" in hello:
                skipped[contestant.name] = hello["skipped"]
                continue
            contestant.precision = hello["precision"]
            contestant.first = contestant.turn()
            racing.append(contestant)
        except Ended as error:
            if contestant.name in (MEASURE, *OURS):
                raise
            skipped[contestant.name] = str(error)  # a peer that fails does not cost the others their figures
    return racing, skipped


def race(cell: Cell, names: list[str], rounds: int, seconds: float) -> dict:
    """All contestants with one model and batch size; what is known of them, as JSON values.

    Stops after ``rounds`` rounds, or once ``seconds`` have gone by and LEAST_ROUNDS are done.
    """
    import numpy as np

    with contextlib.ExitStack() as stack:
        racing, skipped = line_up(cell, names, stack)
        networks = [contestant for contestant in racing if contestant.name not in PRODUCTS]
        logits = {contestant.name: np.load(cell.folder / f"{contestant.name}.npy") for contestant in networks}
        differences = check_logits(logits, {contestant.name: contestant.precision for contestant in networks})
        start = time.monotonic()
        for number in range(rounds):
            if number >= LEAST_ROUNDS and time.monotonic() - start > seconds:
                break
            for contestant in racing[:: -1 if number % 2 else 1]:  # nobody always follows the same one
                time.sleep(PAUSE)
                contestant.times.append(contestant.turn())
        megabytes = {contestant.name: contestant.finish() for contestant in racing}
    medians = {contestant.name: statistics.median(contestant.times) for contestant in racing}
    floor = min((medians[name] for name in CEILING if name in medians), default=None)
    contestants = {}
    for contestant in racing:
        median = medians[contestant.name]
        contestants[contestant.name] = {
            "precision": contestant.precision,
            "median_s": median,
            "images_per_s": cell.batch / median,
            "against_timm_eager": medians[MEASURE] / median,
            "share_of_ceiling": None if floor is None else floor / median,
            "megabytes": megabytes[contestant.name],
            "largest_difference": differences.get(contestant.name),
            "first_call_s": contestant.first if contestant in networks else None,  # with what happens only once
            "times_s": contestant.times,
        }
    largest = float(np.abs(logits[MEASURE]).max())
    counts = {"rounds": len(racing[0].times), "largest_logit": largest, "floor_s": floor}
    return {"model": cell.model, "batch": cell.batch, **counts, "contestants": contestants, "skipped": skipped}


def run(options: argparse.Namespace, result: dict) -> None:
    """Adds to ``result`` every model and batch size that was asked for. --json is written after each."""
    start = time.monotonic()
    chosen = {MEASURE, *(options.only or CONTESTANTS)}
    names = [name for name in CONTESTANTS if name in chosen]
    settings = {"rounds": options.rounds, "seconds": options.seconds, "threads": options.threads}
    result |= {"machine": machine(), "load_before": load_average(), **settings}
    told = set()
    if result["load_before"] and result["load_before"] > QUIET:
        print(f"The load average is {result['load_before']:.1f}: what else runs here takes its share of every figure.")
    with tempfile.TemporaryDirectory() as folder:
        for model in options.models:
            words = [sys.executable, "-m", "benchmarks.inference_models", model, folder]
            batches = options.batches or [batch for batch in BATCHES if (model, batch) not in LEFT_OUT]
            words += ["--pictures", str(max(batches))]
            words += ["--onnx"] if {"ONNX Runtime", "OpenVINO float32", "OpenVINO as it comes"} & chosen else []
            if subprocess.run(words, cwd=ROOT, check=False).returncode:
                raise Failure(f"the files of {model} could not be written; see above")
            for batch in sorted(set(batches)):
                cell = race(Cell(model, batch, Path(folder), options.threads), names, options.rounds, options.seconds)
                result["cells"].append(cell)
                result["total_s"] = time.monotonic() - start
                if options.json:
                    options.json.write_text(json.dumps(result, indent=1))
                for name, reason in cell["skipped"].items():
                    if (name, reason) not in told:
                        print(f"{name} is left out: {reason}", flush=True)
                    told.add((name, reason))
                print(*cell_lines(cell), sep="\n", flush=True)


def load_average() -> float | None:
    """Processes that wanted to run in the last minute; None where the system does not count them."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def parse(argv: list[str] | None) -> argparse.Namespace:
    sizes = f"default: {' '.join(map(str, BATCHES))}, without {' and '.join(f'{m} at {b}' for m, b in LEFT_OUT)}"
    parser = Parser(prog="benchmarks/inference.py", description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, metavar="NAME", help=", ".join(MODELS))
    parser.add_argument("--batches", nargs="+", type=at_least_one, metavar="N", help=sizes)
    what = f"some of: {', '.join(CONTESTANTS)}; {MEASURE}, the measure, always takes part"
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, metavar="NAME", help=what)
    parser.add_argument("--rounds", type=at_least_one, default=15, help="at most; default: 15")
    parser.add_argument("--seconds", type=float, default=40, help="for the rounds of a batch size; 3 are always taken")
    parser.add_argument("--threads", type=at_least_one, help="of every contestant; default: as each library chooses")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there, too")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw images a second against timm eager, as PNG")
    options = parser.parse_args(argv)
    for file in filter(None, (options.json, options.plot)):  # said now, and not after half an hour
        if not file.absolute().parent.is_dir():
            parser.error(f"there is no folder for {file}")
    if options.plot and options.plot.suffix.lower() != ".png":
        parser.error(f"--plot {options.plot}: the name must end in .png")
    for package, reason in (("timm", "the measure"), *([("matplotlib", "for --plot")] if options.plot else [])):
        if importlib.util.find_spec(package) is None:
            parser.error(f"{package} is not installed, which is needed ({reason}): pip install {package}")
    return options


def main(argv: list[str] | None = None) -> int:
    options, result = parse(argv), {"cells": []}
    try:
        try:
            run(options, result)
        finally:  # what was measured before a failure is not lost
            if result["cells"]:
                print(f"\n{markdown(result)}", flush=True)
                if options.plot:
                    plot(options.plot, result)
    except KeyboardInterrupt:
        return 130
    except (Failure, OSError) as error:
        print(f"benchmarks/inference.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
