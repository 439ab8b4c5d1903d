"""Compiles kernel.cpp for this machine, once, and loads it.

Needs Linux on x86-64 with AVX2, and g++ (or another compiler that takes its options, named by ``CXX``). Where any of
them is missing, `load` says so and the classifier runs the network through PyTorch's own operators.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("kernel.cpp")
# The number formats of the 1x1 convolutions, and what the processor must have for each.
PRECISIONS = {"float32": ("avx2", "fma"), "bfloat16": ("avx512_bf16",), "int8": ("avx512_vnni",)}
MAX_KERNEL_SIZE = 15  # larger ones are unrolled into very much code
OPTIONS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-pthread",
    "-shared",
    "-fPIC",
)
COMPILERS = ("g++", "c++", "clang++")
TIMEOUT_S = 120


class KernelError(RuntimeError):
    """There is no kernel here: one line that says why."""


class Stage(ctypes.Structure):
    """`Stage` of kernel.cpp."""

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

    The first call on a machine compiles it, in two seconds or so, and keeps it beside Python's compiled files, or in
    the user's cache where those cannot be written. Raises KernelError.
    """
    flags = _cpu_flags()
    missing = [flag for flag in PRECISIONS[precision] if flag not in flags]
    if missing:
        raise KernelError(f"{precision} needs a processor with {' and '.join(missing)}, which this one has not")
    if kernel_size > MAX_KERNEL_SIZE:
        raise KernelError(f"kernel_size is {kernel_size}; the CPU kernel is made for {MAX_KERNEL_SIZE} at most")
    options = [*OPTIONS, f"-DKERNEL={kernel_size}", f"-DNUMBER={list(PRECISIONS).index(precision)}"]
    # The processor is part of the name: a folder may be shared by several machines.
    key = hashlib.sha256(b"\0".join([SOURCE.read_bytes(), " ".join(options).encode(), " ".join(flags).encode()]))
    name = f"kernel-{precision}-{kernel_size}-{key.hexdigest()[:16]}.so"
    from ..zoo import cache_dir

    folders = [SOURCE.parent / "__pycache__", cache_dir() / "kernels"]
    for folder in folders:
        if _is_ours(folder / name):
            with contextlib.suppress(OSError):  # damaged: it is made again
                return _declared(folder / name)
    for folder in folders[sys.dont_write_bytecode :]:  # who wants no files beside the source wants none of this kind
        with contextlib.suppress(OSError):  # not writable, or full
            folder.mkdir(parents=True, exist_ok=True)
            _compile(options, folder / name)
            return _declared(folder / name)
    try:
        with tempfile.TemporaryDirectory(prefix="convmixer-kernel-") as folder:
            _compile(options, Path(folder, name))
            return _declared(Path(folder, name))  # stays loaded without its file
    except OSError as error:
        raise KernelError(f"the CPU kernel cannot be stored ({error.strerror or error})") from error


def _declared(file: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(file))
    pointer, number, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    network = ctypes.POINTER(Network)
    library.convmixer_memory.argtypes = [network, size, number, number, number]
    library.convmixer_memory.restype = size
    library.convmixer_forward.argtypes = [network, pointer, size, number, number, pointer, pointer, size, number, pointer]
    library.convmixer_forward.restype = None
    return library


def _compile(options: list[str], file: Path) -> None:
    """Raises OSError where ``file`` cannot be written, and KernelError where there is no compiler that can make it."""
    with tempfile.TemporaryDirectory(prefix=".compile-", dir=file.parent) as folder:
        part, problem = Path(folder, file.name), "install g++"
        for compiler in filter(shutil.which, [os.environ.get("CXX", ""), *COMPILERS]):
            command = [compiler, *options, "-o", str(part), str(SOURCE)]
            try:
                result = subprocess.run(
                    command,
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                    text=True,
                    errors="replace",
                    timeout=TIMEOUT_S,
                )
            except subprocess.TimeoutExpired:
                problem = f"{compiler} took longer than {TIMEOUT_S} s"
                continue
            if result.returncode == 0:
                part.replace(file)  # two processes may do this at once: the last one wins, with the same content
                return
            problem = f"{compiler} failed: {next(iter(result.stderr.splitlines()), 'no message')}"
    raise KernelError(f"the CPU kernel cannot be compiled; {problem}")


def _is_ours(file: Path) -> bool:
    """Whether ``file`` exists and nobody but its owner, who is this user or root, could have written it."""
    try:
        status = file.stat()
    except OSError:
        return False
    return status.st_uid in (0, os.getuid()) and not status.st_mode & 0o022


@functools.cache
def _cpu_flags() -> tuple[str, ...]:
    """What the processor can do, as /proc/cpuinfo puts it. Raises KernelError where the kernel cannot run at all."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise KernelError(f"the CPU kernel is made for Linux on x86-64; this is {sys.platform}, {platform.machine()}")
    try:
        with open("/proc/cpuinfo") as file:
            return tuple(next(line for line in file if line.startswith("flags")).split(":", 1)[1].split())
    except (OSError, StopIteration) as error:
        raise KernelError("the CPU kernel cannot run: /proc/cpuinfo does not name the processor's features") from error
