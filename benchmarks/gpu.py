"""ConvMixer on a GPU: this project against timm's network in every layout, eager, compiled and as CUDA graphs.

    python benchmarks/gpu.py [--models cifar10 imagenet_1536_20] [--modes inference training] [--batches 1 8 64 256]
        [--only NAME ...] [--rounds 3] [--minutes 8] [--json FILE]
    python benchmarks/gpu.py --device cpu --models cifar10 --batches 1      a rehearsal: its figures mean nothing

All contestants of a model and a batch size have the same weights and random pictures, in bfloat16 (timm under
autocast). They take turns; the figure is the median over the rounds, by CUDA events, after the calls in which they
compile and record. Logits are compared with float32. The share of the ceiling is the time that this GPU needs for
nothing but the 1x1 convolutions as one large product, or for nothing but reading and writing each feature map once,
whichever is longer. --minutes ends the run early, where a GPU is borrowed: what was measured until then is kept.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, so that the rest is found

import torch

from benchmarks.cost import multiply_adds
from benchmarks.gpu_clock import ceilings, peak_memory, seconds, start_counting_memory, wait
from benchmarks.gpu_contestants import CONTESTANTS, MEASURE, OURS, Contest, Skip
from benchmarks.options import Parser, at_least_one
from convmixer.config import ConvMixerConfig
from convmixer.engine import find_device
from train.recipes import RECIPES
from train.session import device_name

MODELS = ("imagenet_1536_20", "imagenet_768_32", "imagenet_1024_20", "cifar10", "cifar10_paper")
BATCHES = (256, 64, 8, 1)  # the largest first, while there is time
MODES = ("inference", "training")
LARGEST_DIFFERENCE = 0.2  # of the logits, relative: more is no rounding of bfloat16
FAILED = "failed"


def floors(config: ConvMixerConfig, size: int, batch: int, mode: str, ceiling: dict[str, float]) -> dict[str, float]:
    """Seconds of the 1x1 convolutions at the product's ceiling, and of the feature maps at the copy's."""
    positions = batch * (size // config.patch_size) ** 2
    products = 2 * positions * config.depth * config.dim**2
    # Inference reads and writes a map in each half of a block. Training has the gradients of weights and inputs, too,
    # and reads and writes about three times as much.
    maps = 4 * config.depth * positions * config.dim * 2
    passes = 1 if mode == "inference" else 3
    return {
        "product_s": passes * products / ceiling["product_flops"],
        "copy_s": passes * maps / ceiling["copy_bytes"],
    }


class Clock:
    """The time that is left."""

    def __init__(self, minutes: float | None):
        self.end = None if minutes is None else time.monotonic() + 60 * minutes

    def is_over(self) -> bool:
        return self.end is not None and time.monotonic() > self.end


def race(contest: Contest, mode: str, names: list[str], rounds: int, clock: Clock) -> tuple[dict, dict]:
    """What each contestant did, and why others did nothing."""
    device, calls, about, skipped = contest.device, {}, {}, {}
    exact = contest.exact() if mode == "inference" else None
    for name in names:
        if clock.is_over():
            skipped[name] = "the time was over"
            continue
        before, start = start_counting_memory(device), time.perf_counter()
        try:
            call = getattr(contest, mode)(CONTESTANTS[name])
            for _ in range(3):  # compiling, recording
                result = call()
            wait(device)
            difference = None if exact is None else off(result, exact)
        except Skip as reason:
            skipped[name] = str(reason)
            continue
        except Exception as error:  # of whatever kind: the others go on
            skipped[name] = f"{FAILED} ({type(error).__name__}: {next(iter(str(error).splitlines()), '')})"
            continue
        first, peak = time.perf_counter() - start, peak_memory(device, before)
        calls[name] = call
        about[name] = {"first_s": first, "peak_mb": peak, "difference": difference, "times_s": []}
    for _ in range(rounds):
        for name, call in calls.items():
            about[name]["times_s"].append(seconds(call, device))
    for values in about.values():
        values["images_per_s"] = contest.batch / statistics.median(values["times_s"])
    return about, skipped


def off(logits: torch.Tensor, exact: torch.Tensor) -> float:
    """How far the first logits are from the exact ones, of their norm. Raises ArithmeticError where that is too far."""
    difference = float((logits[: len(exact)].float().cpu() - exact).norm() / exact.norm())
    if not difference < LARGEST_DIFFERENCE:
        raise ArithmeticError(f"WRONG LOGITS, off by {difference:.1e} of their norm")
    return difference


def lines(cell: dict) -> list[str]:
    """A Markdown table of one model, mode and batch size."""
    heads = ("", "images/s", f"x {MEASURE}", "of the ceiling", "peak MB", "difference", "first calls, s")
    rows = [f"\n{cell['model']}, {cell['mode']}, batch {cell['batch']}\n", _row(heads), "|---" * len(heads) + "|"]
    measure = cell["contestants"].get(MEASURE, {}).get("images_per_s")
    floor = max(cell["product_s"], cell["copy_s"])
    for name, about in cell["contestants"].items():
        rate = about["images_per_s"]
        values = (
            f"**{name}**" if name in OURS else name,
            f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}",
            f"{rate / measure:.2f}" if measure else "",
            f"{100 * floor * rate / cell['batch']:.0f} %",
            "" if about["peak_mb"] is None else f"{about['peak_mb']:,.0f}",
            "" if about["difference"] is None else f"{about['difference']:.1e}",
            f"{about['first_s']:.1f}",
        )
        rows.append(_row(values))
    return [*rows, *(f"\n{name}: {reason}" for name, reason in cell["skipped"].items())]


def _row(values: tuple[str, ...]) -> str:
    return f"| {' | '.join(values)} |"


def run(options: argparse.Namespace) -> bool:
    """Whether nobody failed."""
    device, clock = options.device, Clock(options.minutes)
    names = [name for name in CONTESTANTS if name in {MEASURE, *(options.only or CONTESTANTS)}]
    ceiling = ceilings(device)
    result = {
        "device": device_name(device),
        "torch": torch.__version__,
        "rounds": options.rounds,
        **ceiling,
        "cells": [],
    }
    product, copy = ceiling["product_flops"] / 1e12, ceiling["copy_bytes"] / 1e12
    print(
        f"{result['device']}, PyTorch {torch.__version__}; at most {product:.1f} TFLOP/s, {copy:.2f} TB/s", flush=True
    )
    for model in options.models:
        recipe = RECIPES[model]
        for mode in options.modes:
            for batch in options.batches:
                if clock.is_over():
                    print(f"\n{model}, {mode}, batch {batch}: the time was over", flush=True)
                    continue
                torch.compiler.reset()
                contest = Contest(recipe, batch, device)
                contestants, skipped = race(contest, mode, names, options.rounds, clock)
                floor = floors(recipe.model, recipe.preprocessing.size, batch, mode, ceiling)
                gflop = 2 * multiply_adds(recipe.model, recipe.preprocessing.size) / 1e9
                cell = {"model": model, "mode": mode, "batch": batch, "gflop_an_image": gflop, **floor}
                result["cells"].append(cell | {"contestants": contestants, "skipped": skipped})
                if options.json:
                    options.json.write_text(json.dumps(result, indent=1))
                print(*lines(result["cells"][-1]), sep="\n", flush=True)
    return not any(why.startswith(FAILED) for cell in result["cells"] for why in cell["skipped"].values())


def main() -> int:
    parser = Parser(prog="benchmarks/gpu.py", description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, metavar="NAME", help=", ".join(MODELS))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--batches", nargs="+", type=at_least_one, default=BATCHES, metavar="N")
    what = f"some of: {', '.join(CONTESTANTS)}; {MEASURE}, the measure, always takes part"
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, metavar="NAME", help=what)
    parser.add_argument("--rounds", type=at_least_one, default=3)
    parser.add_argument("--minutes", type=float, help="after which nothing new is begun")
    parser.add_argument("--device", default="cuda", help="cpu to rehearse")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there, after each table")
    options = parser.parse_args()
    if options.json and not options.json.absolute().parent.is_dir():
        parser.error(f"there is no folder for {options.json}")
    try:
        options.device = torch.device(find_device(options.device))
    except ValueError as error:
        parser.error(str(error))
    try:
        return 0 if run(options) else 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
