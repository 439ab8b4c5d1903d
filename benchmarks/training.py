"""Training speed on the CPU: this project's loop against the plain one, side by side in one run.

    python benchmarks/training.py [--batch-size 128] [--rounds 5] [--steps 6] [--json FILE]

Each contestant is a process of its own (memory settings belong to a process) that trains ConvMixer-256/8, kernel 5,
patch 2, on 32-pixel pictures in memory, RandAugment included. They take turns; the figure is the median.
"""

import contextlib
import itertools
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, so that the rest is found

from benchmarks import harness

PICTURES = 4096  # drawn at random; the speed does not depend on what is in them
WORKERS = 1  # that augment for the loaders which need it; a second one made none of them faster on two cores

CONTESTANTS = {"plain": "the authors' loop: eager, NCHW, float32, DataLoader with torchvision's transforms"}
CONTESTANTS |= {"ours float32": "train/loop.py with --amp off", "ours": "train/loop.py as it comes (--amp auto)"}


def pictures():
    """uint8 pictures (N, 32, 32, 3) and their labels."""
    import numpy as np

    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (PICTURES, 32, 32, 3), dtype=np.uint8), rng.integers(0, 10, PICTURES)


class Transformed(list):
    """A data set of PIL images, through ``transform``, and labels."""

    transform = None

    def __getitem__(self, index: int):
        image, label = super().__getitem__(index)
        return self.transform(image), label


def ours(name: str, batch_size: int, steps: int) -> Iterator[str]:
    """Takes ``steps`` training steps at each turn; the first turn is its warm-up. Yields the precision."""
    from train.speed.memory import keep_memory

    keep_memory()
    from dataclasses import replace

    import torch

    from train.data.batches import MemoryBatches
    from train.data.cifar import CIFAR10_CLASSES, LabelledImages
    from train.distributed import World
    from train.loop import Finish, choose_amp, train_epoch
    from train.plan import Plan
    from train.recipes import RECIPES
    from train.speed.layout import FORMATS, choose_layout
    from train.state import NOTHING_YET, new_state
    from train.watch import Watch

    recipe, device = RECIPES["cifar10"], torch.device("cpu")
    recipe = replace(recipe, batch_size=batch_size, micro_batch=batch_size, drop_last=True)
    amp = "off" if name.endswith("float32") else choose_amp("auto", device)
    recipe = replace(recipe, memory_format=choose_layout(recipe, amp, device).memory_format)
    memory_format = FORMATS[recipe.memory_format]
    state, finish = new_state(recipe, device, amp, memory_format), Finish(recipe, memory_format, device)
    batches = MemoryBatches(LabelledImages("drawn", *pictures(), CIFAR10_CLASSES), recipe, World(device))
    parts = itertools.chain.from_iterable(batches.parts(epoch, 0) for epoch in itertools.count())
    rest = Plan(steps * batch_size, batch_size, batch_size, True), finish, World(device), amp, Watch()
    while True:
        state.step, state.running = 0, NOTHING_YET.copy()
        train_epoch(state, state.network, lambda epoch, step: parts, *rest)
        yield amp


def plain(name: str, batch_size: int, steps: int) -> Iterator[str]:
    """The parts that the authors' CIFAR-10 script is made of, with its settings for 25 epochs."""
    import torch
    from PIL import Image
    from torchvision import transforms

    from convmixer.model import build
    from convmixer.preprocessing import CIFAR10
    from train.recipes import RECIPES

    network = build(RECIPES["cifar10"].model)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.05, weight_decay=0.005)
    augment = transforms.RandomHorizontalFlip(), transforms.RandAugment(num_ops=2, magnitude=12)
    finish = transforms.ToTensor(), transforms.Normalize(CIFAR10.mean, CIFAR10.std)
    options = {"shuffle": True, "num_workers": WORKERS, "drop_last": True, "persistent_workers": True}
    data = Transformed((Image.fromarray(image), int(label)) for image, label in zip(*pictures(), strict=True))
    data.transform = transforms.Compose([*augment, *finish])
    loader = torch.utils.data.DataLoader(data, batch_size, **options)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    while True:
        for images, labels in itertools.islice(batches, steps):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(network(images), labels).backward()
            optimizer.step()
        yield "off"


def take_part(name: str, batch_size: int, steps: int) -> None:
    """Answers the precision after the warm-up, and images a second at each turn."""
    turns = (plain if name == "plain" else ours)(name, batch_size, steps)

    def turn() -> float:
        start = time.perf_counter()
        next(turns)
        return batch_size * steps / (time.perf_counter() - start)

    harness.serve(lambda: next(turns), turn)


def main() -> None:
    parser = harness.Parser(__doc__, rounds=5)
    parser.add_argument("--batch-size", type=harness.at_least_one, default=128)
    parser.add_argument("--steps", type=harness.at_least_one, default=6, help="a turn: more than a loader keeps ready")
    parser.add_argument("--take-part", choices=CONTESTANTS, help="for the contestants' processes")
    options = parser.parse_args()
    if options.take_part:
        return take_part(options.take_part, options.batch_size, options.steps)
    harness.print_machine()
    words = ["--batch-size", options.batch_size, "--steps", options.steps]
    with contextlib.ExitStack() as stack:
        turns = {}
        for name in CONTESTANTS:
            process = harness.Process(name, [__file__, "--take-part", name, *words])
            stack.callback(process.close)
            print(f"{name:<18} {CONTESTANTS[name]}, amp {process.read()}", flush=True)
            turns[name] = process.turn
        found = harness.take_turns(turns, options.rounds)
    medians = {name: statistics.median(rates) for name, rates in found.items()}
    rows = [[name, medians[name], min(v), max(v), medians[name] / medians["plain"]] for name, v in found.items()]
    print(f"\nbatch {options.batch_size}, {options.rounds} rounds")
    print(harness.table(["", "images/s", "slowest", "fastest", "x plain"], rows))
    harness.write_json(options.json, found)


if __name__ == "__main__":
    harness.run(main)
