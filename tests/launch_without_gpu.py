"""Launches the Triton kernels as on an H200, through a stand-in for the driver, which is all that is missing here.

    TRITON_CACHE_DIR=FOLDER python tests/launch_without_gpu.py

Binding of arguments, specialisation, compilation to machine code, tuning and its cache are Triton's own. The stand-in
loads nothing and runs nothing: it prints what it is told to launch, a line each: kernel, grid, shared memory.
"""

import sys
import time
from pathlib import Path

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, so that `convmixer` is found

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from convmixer.gpu import kernels

# (C, N, H, W), and the side of the kernel; sizes of one are constants to the compiler
SHAPES = (((8, 64, 32, 32), 9), ((2, 1, 1, 1), 5))


class Launcher:
    def __init__(self, source, metadata):
        self.metadata = metadata

    def __call__(self, x, y, z, *arguments, **options):
        print(self.metadata.name, x, y, z, self.metadata.shared)


class Utilities:
    def get_device_properties(self, device: int) -> dict:
        return {"max_shared_mem": 227 * 1024}

    def load_binary(self, name: str, code: bytes, shared: int, device: int) -> tuple:
        registers, spills, threads = 0, 0, 1024
        return None, None, registers, spills, threads


class StandIn:
    launcher_cls, utils = Launcher, Utilities()

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_benchmarker(self):
        def benchmark(call, quantiles) -> list[float]:
            call()
            return [time.perf_counter()] * len(quantiles)  # the first one always wins

        return benchmark


driver.set_active(StandIn())
for shape, kernel_size in SHAPES:
    x, taps, vector = (
        torch.zeros(shape).bfloat16(),
        torch.zeros(shape[0], kernel_size, kernel_size),
        torch.zeros(shape[0]),
    )
    for _ in range(2):
        kernels.convolve(x, taps, vector, "gelu", vector, vector)
        kernels.tap_gradient(x, x, kernel_size)
        kernels.activate(x.flatten(1), vector, vector, vector, "relu")
