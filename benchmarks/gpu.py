"""ConvMixer on a GPU: this project against timm's network in both layouts, eager and compiled.

    python benchmarks/gpu.py [--models NAME ...] [--modes inference training] [--batches 1 8 64 256] [--minutes 8]
    python benchmarks/gpu.py --device cpu --models cifar10 --batches 1      a rehearsal: its figures mean nothing

All contestants of a model and a batch size have the same weights and random pictures, in bfloat16 (timm under
autocast). They take turns; the figure is the median over the rounds, after the calls in which they compile and record.
Logits are compared with float32. The share of the ceiling is the time that this GPU needs for nothing but the 1x1
convolutions as one large product, or for nothing but reading and writing each feature map once, whichever is longer.
--minutes ends the run early, where a GPU is borrowed: what was measured until then is kept.
"""

import copy
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, so that the rest is found

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from benchmarks import harness
from benchmarks.harness import Parser
from benchmarks.networks import random_network, timm_network
from convmixer.config import ConvMixerConfig
from convmixer.engine import find_device
from convmixer.gpu.engine import GpuEngine
from convmixer.model import to_arrays
from train.recipe import Recipe
from train.recipes import RECIPES
from train.session import device_name
from train.speed.channel_major import use_channel_major

MODELS = ("imagenet_1536_20", "imagenet_768_32", "imagenet_1024_20", "cifar10", "cifar10_paper")
MODES = ("inference", "training")
MEASURE = "timm NCHW"  # what the others are compared with
TRAINING_ONLY = ("ours compiled", "ours fused", "ours fused compiled")
CONTESTANTS = (MEASURE, "ours", *TRAINING_ONLY)  # in this order, while there is time
CONTESTANTS += ("timm NHWC", "timm NCHW compiled", "timm NHWC compiled")
LARGEST_DIFFERENCE = 0.2  # of the logits, relative: more is no rounding of bfloat16
HEADS = ("", "images/s", f"x {MEASURE}", "of the ceiling", "difference")


def seconds(call: Callable[[], object]) -> float:
    """Of one call: as many, one after the other, as take 0.2 seconds, and what they leave to the device."""
    timer = Timer("call()", globals={"call": call})
    return timer.timeit(max(1, round(0.2 / timer.timeit(1).mean))).mean


def ceilings(device: torch.device) -> tuple[float, float]:
    """At most, here: FLOP a second of a bfloat16 product, and bytes a second, read and written, of a copy."""
    side, size = (8192, 2**30) if device.type == "cuda" else (1024, 2**26)
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    out, source = torch.empty_like(a), torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    product = min(seconds(lambda: torch.mm(a, b, out=out)) for _ in range(3))
    copied = min(seconds(lambda: target.copy_(source)) for _ in range(3))
    return 2 * side**3 / product, 2 * size / copied


def floor(config: ConvMixerConfig, size: int, batch: int, mode: str, ceilings: tuple[float, float]) -> float:
    """Seconds of the 1x1 convolutions at the product's ceiling, or of the feature maps at the copy's."""
    numbers = batch * (size // config.patch_size) ** 2 * config.dim * config.depth
    # Each half of a block reads and writes a map of 16 bits. Training takes about three times of both, for gradients.
    once = max(2 * numbers * config.dim / ceilings[0], 2 * 2 * 2 * numbers / ceilings[1])
    return once if mode == "inference" else 3 * once


class Contest:
    """One recipe's network at one batch size, its input, and what is right."""

    def __init__(self, recipe: Recipe, batch: int, device: torch.device):
        self.config, self.batch, self.device = recipe.model, batch, device
        self.size = recipe.preprocessing.size
        self.network = random_network(recipe.model, self.size)
        self.pictures = torch.randn(batch, recipe.model.in_chans, self.size, self.size).to(device)
        self.labels = torch.randint(recipe.model.num_classes, (batch,)).to(device)
        with torch.inference_mode():
            self.exact = self.network(self.pictures[:4].cpu())

    def call(self, name: str, mode: str) -> Callable[[], Tensor]:
        """What gives the logits, or takes a step, forward, backward and AdamW's, and gives the loss."""
        if mode == "inference" and name == "ours":
            engine = GpuEngine(self.config, to_arrays(self.network), self.device)
            return lambda: engine.run_tensors(self.pictures)[0]
        layout = torch.channels_last if "NHWC" in name else torch.contiguous_format
        network = timm_network(self.config, self.network.state_dict())
        if name.startswith("ours"):
            network = copy.deepcopy(self.network).train()
            use_channel_major(network, fused="fused" in name)
        network, pictures = network.to(self.device, memory_format=layout), self.pictures.to(memory_format=layout)
        if "compiled" in name:
            network = torch.compile(network, dynamic=False, options={"layout_optimization": "NHWC" in name})
        autocast = torch.autocast(self.device.type, torch.bfloat16)
        if mode == "inference":
            return torch.inference_mode()(autocast(lambda: network(pictures)))
        optimizer = torch.optim.AdamW(network.train().parameters(), lr=1e-4, fused=True)

        def step() -> Tensor:
            with autocast:
                loss = nn.functional.cross_entropy(network(pictures), self.labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        return step

    def off(self, logits: Tensor) -> float:
        """How far the first logits are from the exact ones, of their norm. Raises ArithmeticError: too far."""
        difference = float((logits[: len(self.exact)].float().cpu() - self.exact).norm() / self.exact.norm())
        if not difference < LARGEST_DIFFERENCE:
            raise ArithmeticError(f"WRONG LOGITS, off by {difference:.1e} of their norm")
        return difference


def race(contest: Contest, mode: str, names: list[str], rounds: int, end: float, least: float) -> dict[str, dict]:
    """Prints a table of what each did, and gives it. end: by time.monotonic(); least: the ceiling's seconds."""
    calls, found, rows = {}, {}, []
    for name in names:
        if time.monotonic() > end:
            print(f"{name}: the time was over")
            continue
        try:
            call = contest.call(name, mode)
            for _ in range(3):  # compiling, recording
                result = call()
            found[name] = {"difference": contest.off(result) if mode == "inference" else None}
            calls[name] = partial(seconds, call)
        except Exception as error:  # of whatever kind: the others go on
            found[name] = {"failed": f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"}
            print(f"{name} failed ({found[name]['failed']})")
    for name, times in harness.take_turns(calls, rounds).items():
        rate = contest.batch / statistics.median(times)
        found[name] |= {"times_s": times, "images_per_s": rate}
        measure, share = found.get(MEASURE, {}).get("images_per_s"), f"{100 * least * rate / contest.batch:.0f} %"
        rows.append([name, rate, measure and rate / measure, share, found[name]["difference"]])
    print("\n" + harness.table(HEADS, rows), flush=True)
    return found


def main() -> int:
    parser = Parser(__doc__, rounds=3)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, metavar="NAME", help=", ".join(MODELS))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--batches", nargs="+", type=harness.at_least_one, default=(256, 64, 8, 1), metavar="N")
    what = f"some of: {', '.join(CONTESTANTS)}; {MEASURE}, the measure, always takes part"
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=CONTESTANTS, metavar="NAME", help=what)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="after which nothing new is begun")
    parser.add_argument("--device", default="cuda", help="cpu to rehearse")
    options = parser.parse_args()
    try:
        device = torch.device(find_device(options.device))
    except ValueError as error:
        parser.error(str(error))
    cells, end, (product, copied) = {}, time.monotonic() + 60 * options.minutes, ceilings(device)
    most = f"at most {product / 1e12:.1f} TFLOP/s, {copied / 1e12:.2f} TB/s"
    print(f"{device_name(device)}, PyTorch {torch.__version__}; {most}", flush=True)
    for model, mode, batch in itertools.product(options.models, options.modes, options.batches):
        names = [name for name in CONTESTANTS if name in {MEASURE, *options.only}]
        if mode == "inference":
            names = [name for name in names if name not in TRAINING_ONLY]
        torch.compiler.reset()
        contest = Contest(RECIPES[model], batch, device)
        least = floor(contest.config, contest.size, batch, mode, (product, copied))
        cell = f"{model}, {mode}, batch {batch}"
        print(f"\n{cell}", flush=True)
        cells[cell] = race(contest, mode, names, options.rounds, end, least)
        harness.write_json(options.json, {"device": device_name(device), "most": most, "cells": cells})
    return int(any("failed" in each for found in cells.values() for each in found.values()))


if __name__ == "__main__":
    harness.run(main)
