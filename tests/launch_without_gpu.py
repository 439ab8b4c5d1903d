"""Launches the Triton kernels as on a GPU, with Triton's own code but for the driver, which tests/stand_in_driver.c is.

    TRITON_CACHE_DIR=FOLDER LD_LIBRARY_PATH=WITH_libcuda.so.1 python tests/launch_without_gpu.py CAPABILITY networks|all

networks: engines of kernel 5, 7 and 9, GELU and ReLU, with one picture and more, through GpuEngine. all: also what
training launches, and sizes of one, which are constants to the compiler. The driver prints each launch; each kernel
that was not in the cache gives a line "compiled NAME".
"""

import sys
from pathlib import Path

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, so that `convmixer` is found

import numpy as np
import torch
import triton
from triton.backends.nvidia import driver as nvidia

from convmixer.config import ConvMixerConfig
from convmixer.gpu import ahead, kernels, ops
from convmixer.gpu.engine import GpuEngine
from convmixer.model import build, to_arrays


def say_what_is_compiled(*, src, cache_hit: bool, **others) -> None:
    if not cache_hit:
        print("compiled", src.name, flush=True)


def run_networks() -> None:
    # As the published ones: 1536/20, 768/32, 1024/20, and those for CIFAR-10; narrower and not so deep.
    for patch, side, kernel_size, activation in ((7, 224, 9, "gelu"), (7, 224, 7, "relu"), (14, 224, 9, "gelu")):
        run_network(ConvMixerConfig(8, 1, kernel_size, patch, activation=activation), side)
    for patch, kernel_size, activation in ((2, 5, "gelu"), (1, 9, "gelu"), (2, 7, "gelu"), (2, 9, "relu")):
        run_network(ConvMixerConfig(24, 1, kernel_size, patch, 10, activation=activation), 32)


def run_network(config: ConvMixerConfig, side: int) -> None:
    engine = GpuEngine(config, to_arrays(build(config)), "cpu")
    for count in (1, 3, 64):
        engine.run(np.zeros((count, 3, side, side), np.float32))


def run_everything() -> None:
    for shape, kernel_size in (((8, 64, 32, 32), 9), ((2, 1, 1, 1), 5)):  # (C, N, H, W)
        x, taps = torch.zeros(shape).bfloat16(), torch.zeros(shape[0], kernel_size, kernel_size)
        vector = torch.zeros(shape[0])
        kernels.convolve(x, taps, vector)
        kernels.convolve(x, taps, vector, "gelu", vector, vector)
        kernels.tap_gradient(x, x, kernel_size)
        kernels.activate(x.flatten(1), vector, vector, vector, "relu")


driver = ahead.Driver(int(sys.argv[1]))
driver.utils = nvidia.CudaUtils()
triton.runtime.driver.set_active(driver)
triton.knobs.compilation.listener = say_what_is_compiled
ops.triton_runs = lambda x, kernel_size=1: True
run_networks()
if sys.argv[2] == "all":
    run_everything()
