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
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # the repository, so that `benchmarks` is found

from benchmarks.harness import Failure, Process, plot, print_machine, table, take_turns, write_json  # noqa: E402
from benchmarks.inference_contestants import CEILING, CONTESTANTS, MEASURE, OURS, PRODUCTS  # noqa: E402
from benchmarks.inference_models import MODELS, Cell  # noqa: E402
from benchmarks.options import Parser, at_least_one, in_a_folder  # noqa: E402

BATCHES = (1, 4, 16, 64)
LEFT_OUT = (("convmixer_1536_20", 64), ("convmixer_768_32", 64))  # unless --batches asks: as long as all the rest
PAUSE = 0.1  # seconds before a turn: ONNX Runtime's threads go on waiting for work, at full speed, for half of that
TOLERANCE = 1e-4  # of the largest logit: between float32 contestants only rounding differs
HEADS = ("", "ms", "images/s", "x timm", "of the ceiling", "MB", "largest difference", "first call, s")


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


def line_up(cell: Cell, names: list[str], stack: contextlib.ExitStack) -> tuple[dict[str, Process], dict, dict]:
    """The contestants, each after its first call; its precision and first seconds; and why others are left out."""
    words = [cell.model, cell.folder, cell.batch, *filter(None, [cell.threads])]
    started = [Process(name, ["-m", "benchmarks.inference_contestants", name, *words]) for name in names]
    racing, firsts, skipped = {}, {}, {}
    for process in started:
        stack.callback(process.close)
    for process in started:  # they load at the same time, and take their first turns one by one: that needs memory
        try:
            hello = process.read()
            if "skipped" in hello:
                skipped[process.name] = hello["skipped"]
                continue
            firsts[process.name] = {"precision": hello["precision"], "first_s": process.turn()["seconds"]}
            racing[process.name] = process
        except Failure as error:
            if process.name in (MEASURE, *OURS):
                raise
            skipped[process.name] = str(error)  # a peer that fails does not cost the others their figures
    return racing, firsts, skipped


def race(cell: Cell, names: list[str], rounds: int, seconds: float) -> dict:
    """All contestants with one model and batch size; what is known of them, as JSON values."""
    import numpy as np

    with contextlib.ExitStack() as stack:
        racing, about, skipped = line_up(cell, names, stack)
        logits = {name: np.load(cell.folder / f"{name}.npy") for name in racing if name not in PRODUCTS}
        differences = check_logits(logits, {name: about[name]["precision"] for name in racing})
        calls = {name: lambda process=process: process.turn()["seconds"] for name, process in racing.items()}
        times = take_turns(calls, rounds, seconds, PAUSE)
        for name, process in racing.items():
            process.process.stdin.close()
            about[name]["megabytes"] = process.read()["megabytes"]
    medians = {name: statistics.median(values) for name, values in times.items()}
    floor = min((medians[name] for name in CEILING if name in medians), default=None)
    for name, median in medians.items():
        about[name] |= {"times_s": times[name], "median_s": median, "images_per_s": cell.batch / median}
        about[name] |= {"against_timm_eager": medians[MEASURE] / median, "largest_difference": differences.get(name)}
        about[name]["share_of_ceiling"] = floor and floor / median
    largest = float(np.abs(logits[MEASURE]).max())
    result = {"model": cell.model, "batch": cell.batch, "rounds": len(times[MEASURE]), "largest_logit": largest}
    return result | {"contestants": about, "skipped": skipped}


def report(cell: dict) -> str:
    """A table, and ours against the best peer of the same precision."""
    rows, best = [], []
    for name, about in cell["contestants"].items():
        text = name if about["precision"] in (*name.split(), "float32") else f"{name} ({about['precision']})"
        share = about["share_of_ceiling"] and f"{100 * about['share_of_ceiling']:.0f} %"
        speeds = [1000 * about["median_s"], about["images_per_s"], about["against_timm_eager"]]
        network = None if name in PRODUCTS else about["first_s"]
        rows.append([text, *speeds, share, about["megabytes"], about["largest_difference"], network])
        peers = {
            about["images_per_s"] / other["images_per_s"]: peer
            for peer, other in cell["contestants"].items()
            if peer not in (*OURS, *PRODUCTS) and other["precision"] == about["precision"]
        }
        if name in OURS and peers:
            best.append(f"{name}: {min(peers):.2f} x {peers[min(peers)]}, the best peer of its precision")
    head = f"\n{cell['model']}, batch {cell['batch']}, {cell['rounds']} rounds, the largest logit is "
    left_out = (f"{name} is left out: {reason}" for name, reason in cell["skipped"].items())
    return "\n".join([f"{head}{cell['largest_logit']:.3g}", table(HEADS, rows), *best, *left_out])


def run(options: argparse.Namespace, cells: list[dict]) -> None:
    """Adds to ``cells`` every model and batch size that was asked for. --json is written after each."""
    chosen = {MEASURE, *(options.only or CONTESTANTS)}
    names = [name for name in CONTESTANTS if name in chosen]
    with tempfile.TemporaryDirectory() as folder:
        for model in options.models:
            words = [sys.executable, "-m", "benchmarks.inference_models", model, folder]
            batches = options.batches or [batch for batch in BATCHES if (model, batch) not in LEFT_OUT]
            words += [
                str(max(batches)),
                *(["onnx"] if any(name.startswith(("ONNX", "Open")) for name in names) else []),
            ]
            if subprocess.run(words, cwd=ROOT, check=False).returncode:
                raise Failure(f"the files of {model} could not be written; see above")
            for batch in sorted(set(batches)):
                cell = Cell(model, batch, Path(folder), options.threads)
                cells.append(race(cell, names, options.rounds, options.seconds))
                write_json(options.json, cells)
                print(report(cells[-1]), flush=True)


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
    parser.add_argument("--json", type=in_a_folder, metavar="FILE", help="write every figure there, too")
    parser.add_argument("--plot", type=in_a_folder, metavar="FILE", help="draw images a second, as PNG")
    return parser.parse_args(argv)


def main() -> int:
    options, cells = parse(None), []
    print_machine()
    try:
        run(options, cells)
    except (Failure, OSError) as error:
        print(f"benchmarks/inference.py: {error}", file=sys.stderr)
        return 1
    panels = {
        f"{cell['model']}, batch {cell['batch']}": {
            name: about["images_per_s"] for name, about in cell["contestants"].items() if name not in PRODUCTS
        }
        for cell in cells
    }
    plot(options.plot, "Images a second", panels)
    return 0


if __name__ == "__main__":
    sys.exit(main())
