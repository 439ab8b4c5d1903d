"""Training speed on the CPU: this project's loop against the plain one and timm's parts, side by side in one run.

    python benchmarks/training.py [--batch-size 128] [--rounds 5] [--parts] [--device cuda]

Each contestant is a process of its own (memory settings belong to a process) that trains ConvMixer-256/8, kernel 5,
patch 2, on 32-pixel pictures in memory, data loading and augmentation included: RandAugment, forward, backward and
AdamW's step. The contestants take turns, so that a change in the machine's speed meets all of them; the figure is the
median over the rounds.
"""

import argparse
import contextlib
import itertools
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # the repository, so that `benchmarks` is found

from benchmarks.harness import Process, print_machine, table, take_turns  # noqa: E402
from benchmarks.options import Parser, at_least_one  # noqa: E402

PICTURES = 4096  # drawn at random; the speed does not depend on what is in them
WORKERS = 1  # that augment for the loaders which need it; a second one made none of them faster on two cores

CONTESTANTS = {
    "plain": "the authors' loop: eager, NCHW, float32, DataLoader with torchvision's transforms",
    "channels_last": "the same with channels_last",
    "timm": "timm's network, loader, transforms and optimizer, eager, NCHW, float32",
    "timm channels_last": "the same with channels_last",
    "ours float32": "train/loop.py with --amp off",
    "ours": "train/loop.py as it comes (--amp auto)",
}


def pictures():
    """uint8 pictures (N, 32, 32, 3) and their labels."""
    import numpy as np

    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (PICTURES, 32, 32, 3), dtype=np.uint8), rng.integers(0, 10, PICTURES)


def in_memory(images, labels):
    """A data set as both torchvision and timm want it: a PIL image through ``transform``, and a label."""
    from PIL import Image
    from torch.utils.data import Dataset

    class InMemory(Dataset):
        transform = None

        def __len__(self):
            return len(labels)

        def __getitem__(self, index):
            return self.transform(Image.fromarray(images[index])), int(labels[index])

    return InMemory()


def contestant(name: str, batch_size: int, steps: int, device: str) -> Iterator[str]:
    """Takes ``steps`` training steps at each turn; the first turn is its warm-up. Yields the precision."""
    if name.startswith("ours"):
        from train.speed.memory import keep_memory

        keep_memory()
        return ours(name, batch_size, steps, device)
    return plain(name, batch_size, steps, device)


def ours(name: str, batch_size: int, steps: int, device: str) -> Iterator[str]:
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

    recipe = replace(RECIPES["cifar10"], batch_size=batch_size, micro_batch=batch_size, drop_last=True)
    world = World(torch.device(device))
    amp = "off" if name.endswith("float32") else choose_amp("auto", world.device)
    recipe = replace(recipe, memory_format=choose_layout(recipe, amp, world.device).memory_format)
    memory_format = FORMATS[recipe.memory_format]
    state = new_state(recipe, world.device, amp, memory_format)
    finish, watch = Finish(recipe, memory_format, world.device), Watch()
    batches = MemoryBatches(LabelledImages("drawn", *pictures(), CIFAR10_CLASSES), recipe, world)
    plan = Plan(steps * batch_size, batch_size, batch_size, True)
    parts = itertools.chain.from_iterable(batches.parts(epoch, 0) for epoch in itertools.count())
    while True:
        state.step, state.running = 0, NOTHING_YET.copy()
        train_epoch(state, state.network, lambda epoch, step: parts, plan, finish, world, amp, watch)
        yield amp


def plain(name: str, batch_size: int, steps: int, device: str) -> Iterator[str]:
    import torch
    from torch import nn

    memory_format = torch.channels_last if "channels_last" in name else torch.contiguous_format
    make = timm_parts if name.startswith("timm") else torchvision_parts
    network, optimizer, loader = make(batch_size, device)
    network = network.to(device, memory_format=memory_format)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    while True:
        for images, labels in itertools.islice(batches, steps):
            images = images.to(device).contiguous(memory_format=memory_format)
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(images), labels.to(device)).backward()
            optimizer.step()
        if device != "cpu":
            torch.cuda.synchronize()
        yield "off"


def torchvision_parts(batch_size: int, device: str):
    """The parts that the authors' CIFAR-10 script is made of, with its settings for 25 epochs."""
    import torch
    from torch.utils.data import DataLoader
    from torchvision import transforms

    from convmixer.model import build
    from convmixer.preprocessing import CIFAR10
    from train.recipes import RECIPES

    network = build(RECIPES["cifar10"].model).to(device)
    data = in_memory(*pictures())
    data.transform = transforms.Compose(
        [
            transforms.RandomHorizontalFlip(),
            transforms.RandAugment(num_ops=2, magnitude=12),
            transforms.ToTensor(),
            transforms.Normalize(CIFAR10.mean, CIFAR10.std),
        ]
    )
    loader = DataLoader(data, batch_size, shuffle=True, num_workers=WORKERS, drop_last=True, persistent_workers=True)
    return network, torch.optim.AdamW(network.parameters(), lr=0.05, weight_decay=0.005), loader


def timm_parts(batch_size: int, device: str):
    import torch
    from timm.data import create_loader
    from timm.models.convmixer import ConvMixer
    from timm.optim import create_optimizer_v2

    from convmixer.preprocessing import CIFAR10

    network = ConvMixer(256, 8, kernel_size=5, patch_size=2, num_classes=10).to(device)
    loader = create_loader(
        in_memory(*pictures()),
        (3, 32, 32),
        batch_size,
        is_training=True,
        scale=(1.0, 1.0),
        ratio=(1.0, 1.0),
        auto_augment="rand-m4-n2",
        mean=CIFAR10.mean,
        std=CIFAR10.std,
        num_workers=WORKERS,
        device=torch.device(device),
    )
    return network, create_optimizer_v2(network, "adamw", lr=0.05, weight_decay=0.005), loader


def serve(name: str, options: argparse.Namespace) -> None:
    """The contestant's process: warms up, then times a turn for every line that comes in."""
    turns = contestant(name, options.batch_size, options.steps, options.device)
    print(json.dumps(next(turns)), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        next(turns)
        print(options.batch_size * options.steps / (time.perf_counter() - start), flush=True)


def race(options: argparse.Namespace) -> dict[str, list[float]]:
    """Images a second of every contestant in every round."""
    settings = ["--device", options.device, "--batch-size", options.batch_size, "--steps", options.steps]
    with contextlib.ExitStack() as stack:
        processes = {}
        for name in options.only or CONTESTANTS:
            processes[name] = Process(name, [__file__, "--serve", name, *settings])
            stack.callback(processes[name].close)
            print(f"{name:<18} {CONTESTANTS[name]}, amp {processes[name].read()}", flush=True)
        return take_turns({name: process.turn for name, process in processes.items()}, options.rounds)


def parts(batch_size: int) -> None:
    """Milliseconds of a depthwise convolution's weight gradient: oneDNN's own, and as the diagonal of a grouped one."""
    import torch

    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(batch_size, 256, 16, 16).to(dtype, memory_format=torch.channels_last)
        grad = torch.randn_like(x)
        for group in (1, 4, 8, 16):
            weight = torch.empty(256, group, 5, 5, dtype=dtype)
            times = []
            for _ in range(7):
                start = time.perf_counter()
                torch.ops.aten.convolution_backward(
                    grad, x, weight, None, [1, 1], [2, 2], [1, 1], False, [0, 0], 256 // group, [False, True, False]
                )
                times.append(1000 * (time.perf_counter() - start))
            print(f"{dtype!s:<15} {group:>2} channels together: {statistics.median(times):6.1f} ms", flush=True)


def main() -> None:
    parser = Parser(prog="benchmarks/training.py", description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=at_least_one, default=128)
    parser.add_argument("--rounds", type=at_least_one, default=5)
    parser.add_argument("--steps", type=at_least_one, default=6, help="steps a turn: more than a loader keeps ready")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, help="some of them; the first is the measure")
    parser.add_argument("--parts", action="store_true", help="time the weight gradient of the depthwise convolution")
    parser.add_argument("--serve", choices=CONTESTANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(options.serve, options)
    if options.parts:
        return parts(options.batch_size)
    print_machine()
    rates = race(options)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    measure = next(iter(medians))
    print(f"\n{options.device}, batch {options.batch_size}, {options.rounds} rounds")
    rows = [[name, medians[name], min(v), max(v), medians[name] / medians[measure]] for name, v in rates.items()]
    print(table(["", "images/s", "slowest", "fastest", f"x {measure}"], rows))


if __name__ == "__main__":
    main()
