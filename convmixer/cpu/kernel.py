"""Loads the compiled kernel.cpp: one that is here already, or one that is compiled now, at the first use on a machine.

Needs Linux or macOS, and g++ or clang++ (or another compiler that takes their options, named by ``CXX``) where nothing
was compiled ahead. Where it cannot be had, `load` says why.
"""

import contextlib
import ctypes
import functools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from . import compiler
from .compiler import PRECISIONS, KernelError

MAX_KERNEL_SIZE = 15  # larger ones are unrolled into very much code


class Stage(ctypes.Structure):
    """`Stage` of stages.h."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("weight", "bias", "scale", "shift", "weight_scale", "weight_sum")]


class Network(ctypes.Structure):
    """`Network` of kernel.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("in_chans", "patch", "dim", "blocks", "depth", "relu")),
        ("stem", Stage),
        ("depthwise", ctypes.POINTER(Stage)),
        ("pointwise", ctypes.POINTER(Stage)),
    ]


@functools.cache
def load(kernel_size: int, precision: str) -> ctypes.CDLL:
    """The kernel for depthwise convolutions of ``kernel_size`` and a key of PRECISIONS.

    The first call on a machine compiles it, in three seconds or so, and keeps it beside Python's compiled files, or in
    the user's cache where those cannot be written; unless it was compiled ahead. Raises KernelError.
    """
    from ..zoo import cache_dir

    flags = processor()
    missing = [flag for flag in PRECISIONS[precision] if flag not in flags]
    if missing:
        raise KernelError(f"{precision} needs a processor with {' and '.join(missing)}, which this one has not")
    if kernel_size > MAX_KERNEL_SIZE:
        raise KernelError(f"kernel_size is {kernel_size}; the CPU kernel is made for {MAX_KERNEL_SIZE} at most")
    options = compiler.options_for(kernel_size, precision, compiler.NATIVE)
    # The processor is part of the name: a folder may be shared by several machines.
    name = compiler.file_name(kernel_size, precision, options, " ".join(flags))
    package = compiler.SOURCE.parent
    folders = [package / "__pycache__", cache_dir() / "kernels"]
    # A container keeps them in its cache: `cog run` mounts the project over the package.
    made_ahead = compiler.ahead(kernel_size, precision, flags)
    ahead = [folder / file for folder in (package / compiler.AHEAD, folders[1]) for _, file in made_ahead]
    for file in (*(folder / name for folder in folders), *ahead):
        if _is_ours(file):
            with contextlib.suppress(OSError):  # damaged: it is made again
                return _declared(file)
    for folder in folders[sys.dont_write_bytecode :]:  # who wants no files beside the source wants none of this kind
        with contextlib.suppress(OSError):  # not writable, or full
            folder.mkdir(parents=True, exist_ok=True)
            compiler.compile_kernel(options, folder / name)
            return _declared(folder / name)
    try:
        with tempfile.TemporaryDirectory(prefix="convmixer-kernel-") as folder:
            compiler.compile_kernel(options, Path(folder, name))
            return _declared(Path(folder, name))  # stays loaded without its file
    except OSError as error:
        raise KernelError(f"the CPU kernel cannot be stored ({error.strerror or error})") from error


def _declared(file: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(file))
    pointer, number, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    network = ctypes.POINTER(Network)
    library.convmixer_memory.argtypes = [network, size, number, number, number]
    library.convmixer_memory.restype = size
    pictures, results = [pointer, size, number, number], [pointer, pointer, size]
    library.convmixer_forward.argtypes = [network, *pictures, *results, number, pointer]
    library.convmixer_forward.restype = None
    return library


def _is_ours(file: Path) -> bool:
    """Whether ``file`` exists and nobody but its owner, who is this user or root, could have written it."""
    try:
        status = file.stat()
    except OSError:
        return False
    return status.st_uid in (0, os.getuid()) and not status.st_mode & 0o022


@functools.cache
def processor() -> tuple[str, ...]:
    """What the processor can do, as /proc/cpuinfo puts it; on macOS its name. Raises KernelError."""
    try:
        if sys.platform == "darwin":
            command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
            return tuple(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
        if sys.platform == "linux":
            with open("/proc/cpuinfo") as file:
                flags = next(line for line in file if line.startswith(("flags", "Features")))
            return tuple(flags.split(":", 1)[1].split())
    except (OSError, StopIteration, subprocess.CalledProcessError) as error:
        raise KernelError("the CPU kernel cannot run: the system does not say which processor this is") from error
    raise KernelError(f"the CPU kernel is made for Linux and macOS; this is {sys.platform}")
