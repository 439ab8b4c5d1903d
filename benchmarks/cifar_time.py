"""How long training on CIFAR-10 takes to reach an accuracy on the hold-out, over several seeds.

    python benchmarks/cifar_time.py --data DIR [--recipe cifar10] [--seeds 0 1 2] [--targets 92.6 94 96]
        [--json FILE] [-- any option of train/run.py]
    python benchmarks/cifar_time.py --data DIR --recipe cifar10 -- --memory-format contiguous --compile off --ahead 1

Each run is train/run.py as it is. Its seconds are those of metrics.csv: training and the evaluation after each epoch.
"all" is the whole process. The top-1 is the last epoch's; a target is reached at the first epoch that measures it.
"""

import argparse
import csv
import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, so that the rest is found

from benchmarks.harness import ROOT, Failure, Parser, in_a_folder, run, table, write_json

TARGETS = (92.6, 94.0, 96.0)  # percent
FIELDS = ("seconds", "images_per_s", "held_out_top1")  # of metrics.csv


def train(options: argparse.Namespace, seed: int, out: Path) -> dict:
    """One training run: its figures by name; None for a target that it did not reach. Raises Failure."""
    words = ["--recipe", options.recipe, "--data", options.data, "--out", out, "--seed", seed, *options.rest]
    start = time.perf_counter()
    done = subprocess.run([sys.executable, ROOT / "train" / "run.py", *map(str, words)], check=False)
    everything = time.perf_counter() - start
    if done.returncode:
        raise Failure(f"the run with seed {seed} ended with {done.returncode}; see above")
    with open(out / "metrics.csv", newline="") as file:
        rows = [{name: float(row[name]) for name in FIELDS} for row in csv.DictReader(file)]
    clock, speed = list(itertools.accumulate(row["seconds"] for row in rows)), [row["images_per_s"] for row in rows]
    figures = {"top-1, %": rows[-1]["held_out_top1"], "images/s": statistics.median(speed)}
    figures |= {"seconds": clock[-1], "all": everything}
    for target in options.targets:
        reached = (at for at, row in zip(clock, rows, strict=True) if row["held_out_top1"] >= target)
        figures[f"to {target:g} %"] = next(reached, None)
    return figures


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--data", required=True, help="folder of CIFAR-10")
    parser.add_argument("--recipe", default="cifar10")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--targets", nargs="+", type=float, default=TARGETS, help="percent on the hold-out")
    parser.add_argument("--json", type=in_a_folder, metavar="FILE")
    words = [*sys.argv[1:], "--"]
    options, runs = parser.parse_args(words[: words.index("--")]), []
    options.rest = words[words.index("--") + 1 : -1]
    with tempfile.TemporaryDirectory() as folder:
        for seed in options.seeds:
            runs.append(train(options, seed, Path(folder, str(seed))))
            write_json(options.json, {"recipe": options.recipe, "options": options.rest, "runs": runs})
    rows = [[seed, *one.values()] for seed, one in zip(options.seeds, runs, strict=True)]
    columns = zip(*(one.values() for one in runs), strict=True)  # of a target only where all runs reached it
    rows.append(["median", *(None if None in column else statistics.median(column) for column in columns)])
    print("\n" + table(["seed", *runs[0]], rows))


if __name__ == "__main__":
    run(main)
