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
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a script
    sys.path[0] = str(ROOT)  # the repository, so that `benchmarks` is found

from benchmarks.options import Parser  # noqa: E402

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


def table(runs: list[dict]) -> list[str]:
    """Markdown: a row a run, and one of medians."""
    targets = list(runs[0]["reached_s"])
    heads = ["seed", "top-1", "images/s", "seconds", "all", *(f"to {target} %" for target in targets)]
    rows = [
        [str(run["seed"]), *_figures(run), *(_seconds(run["reached_s"][target]) for target in targets)] for run in runs
    ]
    middle = {
        name: statistics.median(run[name] for run in runs) for name in ("top1", "images_per_s", "seconds", "all_s")
    }
    ends = []
    for target in targets:  # a median of runs that all reached it
        times = [run["reached_s"][target] for run in runs]
        ends.append(_seconds(None if None in times else statistics.median(times)))
    rows.append(["median", *_figures(middle), *ends])
    return [_row(heads), "|---" * len(heads) + "|", *map(_row, rows)]


def _figures(run: dict) -> list[str]:
    return [f"{run['top1']:.2f} %", f"{run['images_per_s']:,.0f}", _seconds(run["seconds"]), _seconds(run["all_s"])]


def _seconds(value: float | None) -> str:
    return "not reached" if value is None else f"{value:.1f}"


def _row(values: list[str]) -> str:
    return f"| {' | '.join(values)} |"


def main() -> int:
    parser = Parser(prog="benchmarks/cifar_time.py", description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder of CIFAR-10")
    parser.add_argument("--recipe", default="cifar10")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--targets", nargs="+", type=float, default=TARGETS, help="percent on the hold-out")
    parser.add_argument("--out", type=Path, help="keep the run folders there")
    parser.add_argument("--json", type=Path, metavar="FILE")
    ours, rest = sys.argv[1:], []
    if "--" in ours:
        cut = ours.index("--")
        ours, rest = ours[:cut], ours[cut + 1 :]
    options = parser.parse_args(ours)
    options.rest = rest
    if options.json and not options.json.absolute().parent.is_dir():
        parser.error(f"there is no folder for {options.json}")
    runs = []
    with tempfile.TemporaryDirectory() as temporary:
        for seed in options.seeds:
            runs.append(run_once(options, seed, options.out or Path(temporary)))
            if options.json:
                options.json.write_text(json.dumps({"recipe": options.recipe, "options": rest, "runs": runs}, indent=1))
    print("", *table(runs), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
