"""How long training on CIFAR-10 takes to reach an accuracy on the hold-out, over several seeds.

    python benchmarks/cifar_time.py --data DIR [--recipe cifar10] [--seeds 0 1 2] [--targets 92.6 94 96]
        [--json FILE] [-- any option of train/run.py]
    python benchmarks/cifar_time.py --data DIR --recipe cifar10 -- --memory-format contiguous --compile off --ahead 1

Each run is train/run.py as it is, a process of its own, one after the other. Its seconds are those of metrics.csv:
training and the evaluation after each epoch. "all" is the whole process, with starting, loading and compiling; the
first run of a machine compiles what later ones find in the caches. The top-1 is that of the weights which
a run ends with; a target is reached at the first epoch that measures it.
"""

import argparse
import csv
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a script
    sys.path[0] = str(ROOT)  # the repository, so that `benchmarks` is found

from benchmarks.harness import median_of, table, write_json  # noqa: E402
from benchmarks.options import Parser, in_a_folder  # noqa: E402

FIGURES = ("top1", "images_per_s", "seconds", "all_s")
TARGETS = (92.6, 94.0, 96.0)  # percent


def reached(rows: list[dict[str, str]], target: float) -> float | None:
    """Seconds up to the end of the first epoch that measured ``target`` percent; None if none did."""
    seconds = 0.0
    for row in rows:
        seconds += float(row["seconds"])
        if float(row["held_out_top1"]) >= target:
            return seconds
    return None


def run_once(options: argparse.Namespace, seed: int, folder: Path) -> dict:
    """One training run. Raises SystemExit where it failed."""
    out = folder / f"seed-{seed}"
    words = ["--recipe", options.recipe, "--data", options.data, "--out", out, "--seed", seed, *options.rest]
    start = time.perf_counter()
    done = subprocess.run([sys.executable, ROOT / "train" / "run.py", *map(str, words)], check=False)
    everything = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"benchmarks/cifar_time.py: the run with seed {seed} ended with {done.returncode}; see above")
    with open(out / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return {
        "seed": seed,
        "epochs": len(rows),
        "top1": float(rows[-1]["held_out_top1"]),
        "seconds": sum(float(row["seconds"]) for row in rows),
        "all_s": everything,
        "images_per_s": statistics.median(float(row["images_per_s"]) for row in rows),
        "reached_s": {f"{target:g}": reached(rows, target) for target in options.targets},
    }


def rows_of(runs: list[dict]) -> list[list[object]]:
    """A row a run, and one of medians; of a target only where all runs reached it."""
    middle = {name: statistics.median(run[name] for run in runs) for name in FIGURES}
    middle["reached_s"] = {t: median_of(run["reached_s"][t] for run in runs) for t in runs[0]["reached_s"]}
    rows = [[run.get("seed", "median"), *(run[name] for name in FIGURES)] for run in (*runs, middle)]
    for row, run in zip(rows, (*runs, middle), strict=True):
        row += ["not reached" if seconds is None else f"{seconds:.1f}" for seconds in run["reached_s"].values()]
        row[1] = f"{row[1]:.2f} %"
    return rows


def main() -> int:
    parser = Parser(prog="benchmarks/cifar_time.py", description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder of CIFAR-10")
    parser.add_argument("--recipe", default="cifar10")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--targets", nargs="+", type=float, default=TARGETS, help="percent on the hold-out")
    parser.add_argument("--out", type=Path, help="keep the run folders there")
    parser.add_argument("--json", type=in_a_folder, metavar="FILE")
    ours, rest = sys.argv[1:], []
    if "--" in ours:
        cut = ours.index("--")
        ours, rest = ours[:cut], ours[cut + 1 :]
    options = parser.parse_args(ours)
    options.rest = rest
    runs = []
    with tempfile.TemporaryDirectory() as temporary:
        for seed in options.seeds:
            runs.append(run_once(options, seed, options.out or Path(temporary)))
            write_json(options.json, {"recipe": options.recipe, "options": rest, "runs": runs})
    heads = ["seed", "top-1", "images/s", "seconds", "all", *(f"to {target} %" for target in runs[0]["reached_s"])]
    print("\n" + table(heads, rows_of(runs)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
