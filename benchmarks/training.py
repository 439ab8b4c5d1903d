"""Training speed on the CPU: this project's step against the plain one, side by side in one run.

    python benchmarks/training.py [--batch-size 128] [--rounds 5] [--parts]

Each contestant is a process of its own (memory settings belong to a process) that trains ConvMixer-256/8, kernel 5,
patch 2, on random 32-pixel pictures: forward, backward and AdamW's step. The contestants take turns, so that a change
in the machine's speed meets all of them; the figure is the median over the rounds.
"""

import argparse
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

CONTESTANTS = {
    "plain": "eager, NCHW, float32",
    "channels_last": "eager, channels_last, float32",
    "ours float32": "train/loop.py with --amp off",
    "ours": "train/loop.py as it comes (--amp auto)",
}


def contestant(name: str, batch_size: int):
    """A generator that takes one training step at each turn; the first turns are its warm-up."""
    sys.path[0] = str(ROOT)
    if name.startswith("ours"):
        from train.memory import keep_memory

        keep_memory()
    import torch
    from torch import nn

    from convmixer.model import build
    from convmixer.preprocessing import CIFAR10
    from train import loop
    from train.data import normalise
    from train.recipes import RECIPES

    recipe = RECIPES["cifar10"]
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (batch_size, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 10, (batch_size,), generator=generator)
    cpu = torch.device("cpu")
    if name.startswith("ours"):
        amp = "off" if name.endswith("float32") else loop.choose_amp("auto", cpu)
        state = loop.new_state(recipe, cpu, amp)
        batch = (images.contiguous(memory_format=torch.channels_last), labels, torch.zeros(batch_size, 4))
        while True:
            loop.train_epoch(state, [batch], 100, recipe, CIFAR10, amp)
            yield amp
    memory_format = torch.channels_last if name == "channels_last" else torch.contiguous_format
    network = build(recipe.model).to(memory_format=memory_format)
    optimizer = torch.optim.AdamW(network.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    while True:
        x = normalise(images, CIFAR10).contiguous(memory_format=memory_format)
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x), labels).backward()
        optimizer.step()
        yield "off"


def serve(name: str, batch_size: int, warm_up: int, steps: int) -> None:
    """The contestant's process: warms up, then times ``steps`` steps for every line that comes in."""
    turns = contestant(name, batch_size)
    for _ in range(warm_up):
        amp = next(turns)
    print(amp, flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        for _ in range(steps):
            next(turns)
        print(batch_size * steps / (time.perf_counter() - start), flush=True)


def race(batch_size: int, rounds: int, warm_up: int, steps: int) -> dict[str, list[float]]:
    """Images a second of every contestant in every round."""
    processes = {}
    for name in CONTESTANTS:
        command = [sys.executable, __file__, "--serve", name, "--batch-size", batch_size]
        command += ["--warm-up", warm_up, "--steps", steps]
        process = subprocess.Popen(list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        print(f"{name:<14} {CONTESTANTS[name]}, amp {process.stdout.readline().strip()}", flush=True)
        processes[name] = process
    rates = {name: [] for name in CONTESTANTS}
    for _ in range(rounds):
        for name, process in processes.items():
            print(file=process.stdin, flush=True)
            rates[name].append(float(process.stdout.readline()))
    for process in processes.values():
        process.stdin.close()
        process.wait()
    return rates


def parts(batch_size: int) -> None:
    """Milliseconds of a depthwise convolution's weight gradient: oneDNN's own, and as the diagonal of a grouped one."""
    sys.path[0] = str(ROOT)
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=6, help="steps before the clock runs")
    parser.add_argument("--steps", type=int, default=2, help="steps a round")
    parser.add_argument("--parts", action="store_true", help="time the weight gradient of the depthwise convolution")
    parser.add_argument("--serve", choices=CONTESTANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(options.serve, options.batch_size, options.warm_up, options.steps)
    if options.parts:
        return parts(options.batch_size)
    rates = race(options.batch_size, options.rounds, options.warm_up, options.steps)
    plain = statistics.median(rates["plain"])
    print(f"\n{platform.processor() or platform.machine()}, batch {options.batch_size}, {options.rounds} rounds")
    print(f"{'':<14} {'images/s':>9} {'slowest':>9} {'fastest':>9} {'x plain':>8}")
    for name, values in rates.items():
        median = statistics.median(values)
        print(f"{name:<14} {median:9.1f} {min(values):9.1f} {max(values):9.1f} {median / plain:8.2f}")


if __name__ == "__main__":
    main()
