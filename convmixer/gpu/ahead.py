"""Compiles the engine's kernels into Triton's cache, for GPUs that need not be here.

    TRITON_CACHE_DIR=FOLDER python -m convmixer.gpu.ahead [--capabilities 8.0 9.0] [--kernel-sizes 5 7 9]

A process that starts later with the same FOLDER, under the same path, on such a GPU finds them, and what Triton
launches them with, and needs no C compiler. Maps whose width is no multiple of 16 are left out.

The kernels are launched as ever, at pictures without memory, through a stand-in for the GPU's driver: so Triton itself
makes the keys of its cache.
"""

import argparse
import re
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime import build

from ..config import ACTIVATIONS
from . import kernels

CAPABILITIES = ("8.0", "8.6", "8.9", "9.0", "10.0")
KERNEL_SIZES = (5, 7, 9)


class Driver:
    """What Triton asks of a GPU's driver, for a GPU that is not here. Loads nothing and launches nothing."""

    launcher_cls = nvidia.CudaLauncher  # makes and compiles the C code that launches a kernel

    def __init__(self, capability: int):
        self.capability, self.utils = capability, self

    def get_current_device(self) -> int:
        return self.capability  # Triton keeps what it compiled in a process by this number

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 2**20}

    def load_binary(self, name: str, code: bytes, shared: int, device: int) -> tuple:
        registers, spills, threads = 0, 0, 1024
        return None, None, registers, spills, threads


class NotLoaded:
    """Stands for a compiled C module: it cannot be loaded where there is no driver."""

    def __init__(self, name: str, path: str):
        pass

    def __getattr__(self, name: str):
        return lambda *arguments: None


def link_without_driver(folder: Path) -> None:
    """Puts a library into ``folder`` that has the names of the driver's functions, for Triton's C code to link with."""
    code = Path(nvidia.dirname, "driver.c").read_text() + nvidia.make_launcher({}, {}, None)
    names = sorted(set(re.findall(r"\b(cu[A-Z]\w+)\(", code)))
    source = folder / "driver.c"
    source.write_text("".join(f"void {name}(void) {{}}\n" for name in names))
    library = build._build("libcuda", str(source), str(folder), [], [], [], ["-Wl,-soname,libcuda.so.1"])
    Path(library).rename(folder / "libcuda.so.1")
    triton.knobs.nvidia.libcuda_path = str(folder)
    build._load_module_from_path = NotLoaded


def compile_kernels(capabilities: list[int], kernel_sizes: list[int]) -> None:
    """Fills the cache. capabilities: 90 for 9.0. For a process that does nothing else: Triton loses its driver."""
    with tempfile.TemporaryDirectory() as folder:
        link_without_driver(Path(folder))
        nvidia.CudaUtils()
        for capability in capabilities:
            triton.runtime.driver.set_active(Driver(capability))
            for activation in ACTIVATIONS:
                launch(kernel_sizes, activation)


def launch(kernel_sizes: list[int], activation: str, device: str = "meta") -> None:
    """The launches of a network's blocks."""
    x = torch.empty(16, 1, 16, 16, dtype=torch.bfloat16, device=device)
    vectors = torch.empty(3, 16, device=device).unbind()
    for size in kernel_sizes:
        kernels.convolve(x, torch.empty(16, size, size, device=device), vectors[0], activation, *vectors[1:])
    kernels.activate(x.flatten(1), *vectors, activation)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m convmixer.gpu.ahead", description=__doc__.splitlines()[0])
    parser.add_argument("--capabilities", nargs="+", default=CAPABILITIES, metavar="X.Y", help="of the GPUs")
    parser.add_argument("--kernel-sizes", nargs="+", type=int, default=KERNEL_SIZES, choices=(1, 3, 5, 7, 9))
    options = parser.parse_args()
    wrong = [name for name in options.capabilities if not re.fullmatch(r"([89]|1\d)\.\d", name)]
    if wrong:
        parser.error(f"{wrong[0]!r} is no compute capability of 8.0 or more, such as 9.0")
    compile_kernels([int(name.replace(".", "")) for name in options.capabilities], options.kernel_sizes)
    print(f"compiled for {', '.join(options.capabilities)} into {triton.knobs.cache.dir}")


if __name__ == "__main__":
    main()
