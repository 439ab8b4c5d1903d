"""Time to the first answer of the command line, against `import torch` alone, side by side in one run.

    python benchmarks/startup.py [--rounds 9]

Whole processes, from start to exit, taking turns; the figures are medians.
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

COMMANDS = {
    "import torch": ["-c", "import torch"],
    "import convmixer": ["-c", "import convmixer"],
    "classify": ["-m", "convmixer", "classify", "--sample", "--model", "convmixer_256_8_cifar10"],
    "import timm": ["-c", "import timm"],
}


def seconds(arguments: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    for arguments in COMMANDS.values():  # once unmeasured: files into the page cache, bytecode written
        seconds(arguments)
    times = {name: [] for name in COMMANDS}
    for _ in range(rounds):
        for name, arguments in COMMANDS.items():
            times[name].append(seconds(arguments))
    base = statistics.median(times["import torch"])
    print(f"{rounds} rounds\n{'':<18} {'seconds':>8} {'fastest':>8} {'slowest':>8} {'above import torch':>19}")
    for name, values in times.items():
        median = statistics.median(values)
        print(f"{name:<18} {median:8.2f} {min(values):8.2f} {max(values):8.2f} {median - base:18.2f}s")


if __name__ == "__main__":
    main()
