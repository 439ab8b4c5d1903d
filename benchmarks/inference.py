"""Inference on the CPU: this project against timm, torch.compile, ONNX Runtime and OpenVINO, side by side in one run.

    python benchmarks/inference.py [--models NAME ...] [--batches 1 16] [--only ours ...] [--json FILE] [--plot FILE]

For each model and batch size every contestant is a process of its own with the same weights (random ones, but for the
shipped model), the same pictures and all cores, as its library comes. They are alive together and take turns; the
figure is the median. Float32 logits that are off from timm's by more than 1e-4 of the largest end the run.

The ceiling is how fast this machine multiplies float32 matrices of the shapes of the network's own 1x1 convolutions, by
MKL (torch.mm) or oneDNN, whichever is faster: what beats float32's arithmetic can have more than 100 %. Memory is the
most that the process ever had (VmHWM) minus what it had before the model was loaded (VmRSS).
"""

import contextlib
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, so that the rest is found

from benchmarks import harness
from benchmarks.harness import ROOT, Failure, Parser, Process
from benchmarks.inference_contestants import CONTESTANTS, MEASURE, MODELS, PRODUCTS, ROUGH

PAUSE = 0.1  # seconds before a turn: ONNX Runtime's threads go on waiting for work, at full speed, for half of that
SECONDS = 40  # for the rounds of a batch size, but for the first three
TOLERANCE = 1e-4  # of the largest logit: between float32 contestants only rounding differs
HEADS = ("ms", "images/s", "x timm", "of the ceiling", "MB", "largest difference")


def check_logits(logits: dict) -> dict[str, float]:
    """The largest absolute difference of each contestant's logits from the measure's. Raises Failure."""
    import numpy as np

    reference, differences = logits[MEASURE], {}
    most = TOLERANCE * float(np.abs(reference).max())
    for name, own in logits.items():
        if own.shape != reference.shape or not np.isfinite(own).all():
            raise Failure(f"{name} gives logits of shape {own.shape}, or not finite ones, and not {reference.shape}")
        differences[name] = float(np.abs(own - reference).max())
        if name not in ROUGH and differences[name] > most:
            raise Failure(f"{name}: WRONG LOGITS, off by {differences[name]:.1e}; right would be {most:.1e} at most")
    return differences


def race(model: str, batch: int, folder: Path, names: list[str], rounds: int) -> dict[str, dict]:
    """All contestants with one model and batch size; prints a table, and gives its figures by contestant."""
    import numpy as np

    racing, rows = {}, []
    print(f"\n{model}, batch {batch}", flush=True)
    with contextlib.ExitStack() as stack:
        for name in names:  # one by one: their first calls need memory
            process = Process(name, ["-m", "benchmarks.inference_contestants", name, model, folder, batch])
            stack.callback(process.close)
            try:
                skipped = process.read()
            except Failure as error:
                if name == MEASURE or name.startswith("ours"):
                    raise
                skipped = str(error)  # a peer that fails does not cost the others their figures
            if skipped:
                print(f"{name} is left out: {skipped}", flush=True)
            else:
                racing[name] = process.turn
        differences = check_logits({name: np.load(folder / f"{name}.npy") for name in racing if name not in PRODUCTS})
        turns = harness.take_turns(racing, rounds, SECONDS, PAUSE)
    seconds = {name: statistics.median(time for time, _ in found) for name, found in turns.items()}
    floor = min((seconds[name] for name in PRODUCTS if name in seconds), default=None)
    for name, own in seconds.items():
        share, megabytes = floor and f"{100 * floor / own:.0f} %", turns[name][-1][1]
        rows.append([1000 * own, batch / own, seconds[MEASURE] / own, share, megabytes, differences.get(name)])
    print(harness.table(["", *HEADS], [[name, *row] for name, row in zip(seconds, rows, strict=True)]))
    return {name: dict(zip(HEADS, row, strict=True)) for name, row in zip(seconds, rows, strict=True)}


def main() -> None:
    parser = Parser(__doc__, rounds=15)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, metavar="NAME", help=", ".join(MODELS))
    parser.add_argument("--batches", nargs="+", type=harness.at_least_one, default=[1, 16], metavar="N")
    what = f"some of: {', '.join(CONTESTANTS)}; {MEASURE}, the measure, always takes part"
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=CONTESTANTS, metavar="NAME", help=what)
    parser.add_argument("--plot", type=harness.in_a_folder, metavar="FILE", help="draw images a second, as PNG")
    options, cells, panels = parser.parse_args(), {}, {}
    names = [name for name in CONTESTANTS if name in {MEASURE, *options.only}]
    harness.print_machine()
    with tempfile.TemporaryDirectory() as folder:
        for model in options.models:
            files = "onnx" if {"ONNX Runtime", "OpenVINO"} & {*names} else "files"
            words = ["-m", "benchmarks.inference_contestants", files, model, folder, str(max(options.batches))]
            if subprocess.run([sys.executable, *words], cwd=ROOT, check=False).returncode:
                raise Failure(f"the files of {model} could not be written; see above")
            for batch in options.batches:
                cell = f"{model}, batch {batch}"
                cells[cell] = found = race(model, batch, Path(folder), names, options.rounds)
                harness.write_json(options.json, cells)
                panels[cell] = {name: found[name]["images/s"] for name in found if name not in PRODUCTS}
    harness.plot(options.plot, "Images a second", panels)


if __name__ == "__main__":
    harness.run(main)
