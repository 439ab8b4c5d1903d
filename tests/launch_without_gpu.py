"""Launches the Triton kernels as on a GPU, with Triton's own code but for the driver, which tests/stand_in_driver.c is.

    TRITON_CACHE_DIR=FOLDER LD_LIBRARY_PATH=WITH_libcuda.so.1 python tests/launch_without_gpu.py CAPABILITY

Engines shaped as the published networks, narrower and not so deep, with one picture and more, through GpuEngine. The
driver prints each launch; what is not in the cache must be compiled.
"""

import sys
from pathlib import Path

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, so that `convmixer` is found

import numpy as np
import triton
from triton.backends.nvidia import driver as nvidia

from convmixer.config import ConvMixerConfig
from convmixer.gpu import ahead, ops
from convmixer.gpu.engine import GpuEngine
from convmixer.model import build, to_arrays

driver = ahead.Driver(int(sys.argv[1]))
driver.utils = nvidia.CudaUtils()
triton.runtime.driver.set_active(driver)
ops.triton_runs = lambda x, kernel_size=1: True
NETWORKS = [(14, 224, 9, "gelu"), (2, 32, 5, "gelu"), (1, 32, 9, "gelu"), (2, 32, 9, "relu")]
for patch, side, kernel_size, activation in NETWORKS:
    config = ConvMixerConfig(8, 1, kernel_size, patch, 10, activation=activation)
    engine = GpuEngine(config, to_arrays(build(config)), "cpu")
    for count in (1, 64):
        engine.run(np.zeros((count, 3, side, side), np.float32))
