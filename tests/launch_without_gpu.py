"""Launches the engine's Triton kernels as on a GPU of compute capability 9.0, with ahead.py's own stand-in driver.

    TRITON_CACHE_DIR=FOLDER python tests/launch_without_gpu.py

Networks as the published ones, narrower and not so deep. What is not in the cache fails: there is no compiler.
"""

import os
import sys
import tempfile
from pathlib import Path

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, so that `convmixer` is found

import numpy as np
import triton
from triton.backends.nvidia.driver import CudaUtils

from convmixer.config import ConvMixerConfig
from convmixer.gpu import ahead, ops
from convmixer.gpu.engine import GpuEngine
from convmixer.model import build, to_arrays

with tempfile.TemporaryDirectory() as folder:
    ahead.link_without_driver(Path(folder))
    os.environ["CC"] = "/bin/false"
    CudaUtils()
    triton.runtime.driver.set_active(ahead.Driver(90))
    ops.triton_runs = lambda x, kernel_size=1: True
    for patch, side, kernel_size, activation in [(14, 224, 9, "gelu"), (2, 32, 5, "gelu"), (1, 32, 9, "relu")]:
        config = ConvMixerConfig(8, 1, kernel_size, patch, 10, activation=activation)
        engine = GpuEngine(config, to_arrays(build(config)), "cpu")
        for count in (1, 64):
            engine.run(np.zeros((count, 3, side, side), np.float32))
