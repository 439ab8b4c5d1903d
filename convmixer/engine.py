"""What runs the network: the protocol that every engine keeps, and the choice between them."""

import ctypes
import functools
import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from .config import ConvMixerConfig

ENGINES = ("auto", "kernel", "numpy", "torch")
PRECISIONS = ("auto", "float32", "bfloat16", "float16", "int8")
GPU_KERNEL_CAPABILITY = (8, 0)  # bfloat16 on the matrix units
GPU_KERNEL_SIZE = 9  # the largest that the Triton kernels take
CHANNELS_LAST_KERNEL_SIZE = 7  # larger ones cost twice the time in channels_last, smaller ones half: docs/gpu.md


class Engine(Protocol):
    """A trained ConvMixer, ready to run. Threads may share one."""

    name: str  # "kernel", "numpy" or "torch"
    precision: str  # what most of the arithmetic is done in: one of PRECISIONS, not "auto"

    def run(self, pictures: np.ndarray, stages: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Logits (N, classes), and the last ``stages`` feature maps (stages, N, dim, h, w); both float32.

        pictures: float32 (N, in_chans, H, W), normalised, with sides of at least a patch. h and w are H and W over the
        patch size, rounded down. stages: 0 to depth + 1, where 1 is the map behind the last block and depth + 1 begins
        with the stem's. Raises ValueError for pictures of another shape or type.
        """
        ...

    def warm_up(self, size: int, batch: int = 1) -> None:
        """Do now what the first batches of 1 to ``batch`` pictures of ``size`` x ``size`` pixels would wait for."""
        ...


@dataclass(frozen=True)
class Machine:
    """A device, as far as the choice of an engine depends on it."""

    device: str = "cpu"  # its type, as PyTorch names it: cpu, cuda, mps, ...
    kernel_problem: str | None = None  # why the CPU kernel cannot be had in this precision, and what would help
    capability: tuple[int, int] = (0, 0)  # compute capability of an NVIDIA GPU
    has_triton: bool = False  # Triton is installed and runs on this GPU


@dataclass(frozen=True)
class Choice:
    engine: str
    precision: str
    layout: str = "contiguous"  # of feature maps: contiguous (NCHW), channels_last (NHWC), channel_major (CNHW)
    note: str | None = None  # one line for people: what was fallen back from, and what would help


def choose(machine: Machine, kernel_size: int, engine: str = "auto", precision: str = "auto") -> Choice:
    """The engine, precision and layout for a network with depthwise kernels of ``kernel_size``.

    engine: one of ENGINES. "kernel" is what this project wrote for the device: C++ on a CPU, Triton on an NVIDIA GPU.
    precision: one of PRECISIONS. "auto" is float32 on a CPU; on a GPU bfloat16, or float16 where it has no bfloat16.

    Raises ValueError, one line, for what this machine cannot do.
    """
    _check_name("engine", engine, ENGINES)
    _check_name("precision", precision, PRECISIONS)
    choice = {"cpu": _on_cpu, "cuda": _on_cuda}.get(machine.device, _elsewhere)(machine, kernel_size, engine, precision)
    if choice is None:
        raise ValueError(
            f"engine {engine!r} does not run kernels of {kernel_size} in precision {precision!r} on this"
            f" {machine.device}; leave one of them at 'auto'"
        )
    return choice


def layout_for(kernel_size: int) -> str:
    """The layout in which cuDNN's depthwise convolutions are fast."""
    return "channels_last" if kernel_size <= CHANNELS_LAST_KERNEL_SIZE else "contiguous"


def gpu_kernels_run(machine: Machine, kernel_size: int) -> bool:
    """Whether the Triton kernels take depthwise convolutions of ``kernel_size`` on this GPU."""
    return machine.has_triton and machine.capability >= GPU_KERNEL_CAPABILITY and kernel_size <= GPU_KERNEL_SIZE


def _on_cpu(machine: Machine, kernel_size: int, engine: str, precision: str) -> Choice | None:
    precision = "float32" if precision == "auto" else precision
    if engine in ("numpy", "torch"):
        return Choice(engine, precision) if precision == "float32" else None
    if precision == "float16":
        return None
    if machine.kernel_problem is None:
        return Choice("kernel", precision)
    if engine == "auto" and precision == "float32":
        return Choice("numpy", precision, note=f"NumPy runs the network, which is slower: {machine.kernel_problem}")
    asked = f"precision {precision!r}" if precision != "float32" else "engine 'kernel'"
    raise ValueError(f"{asked} cannot be used: {machine.kernel_problem}")


def _on_cuda(machine: Machine, kernel_size: int, engine: str, precision: str) -> Choice | None:
    kernels = engine != "torch" and gpu_kernels_run(machine, kernel_size)
    half = "bfloat16" if machine.capability >= GPU_KERNEL_CAPABILITY else "float16"
    precision = half if precision == "auto" else precision
    if engine == "numpy" or precision == "int8":
        return None
    if kernels and precision == "bfloat16":
        return Choice("kernel", precision, "channel_major")
    if engine == "kernel":
        return None
    return Choice("torch", precision, "contiguous" if precision == "float32" else layout_for(kernel_size))


def _elsewhere(machine: Machine, kernel_size: int, engine: str, precision: str) -> Choice | None:
    usable = engine in ("auto", "torch") and precision in ("auto", "float32")
    return Choice("torch", "float32") if usable else None


def _check_name(what: str, name: str, known: tuple[str, ...]) -> None:
    if name not in known:
        raise ValueError(f"{what} is {name!r:.80}; it must be one of {', '.join(known)}")


def check_pictures(pictures: np.ndarray, config: ConvMixerConfig, stages: int = 0) -> None:
    """Raises ValueError unless ``pictures`` and ``stages`` are what `Engine.run` takes."""
    if not 0 <= stages <= config.depth + 1:
        raise ValueError(f"stages is {stages}; it must be 0 to {config.depth + 1}")
    patch, chans = config.patch_size, config.in_chans
    if not isinstance(pictures, np.ndarray) or pictures.dtype != np.float32:
        kind = getattr(pictures, "dtype", type(pictures).__name__)
        raise ValueError(f"the pictures are {kind}; they must be a float32 NumPy array")
    if pictures.ndim != 4 or pictures.shape[1] != chans or min(pictures.shape[2:]) < patch:
        wanted = f"(N, {chans}, H, W) with sides of at least {patch}"
        raise ValueError(f"the pictures have the shape {pictures.shape}; it must be {wanted}")


def open_engine(
    config: ConvMixerConfig,
    weights: Mapping[str, np.ndarray],
    device: str = "cpu",
    engine: str = "auto",
    precision: str = "auto",
) -> Engine:
    """The engine that `choose` chooses for ``device``, as `find_device` gives it. Raises ValueError.

    weights: float32 under timm's names, laid out anew by every engine but PyTorch's on a CPU.
    """
    choice = choose(look(device, config.kernel_size, precision), config.kernel_size, engine, precision)
    if choice.note:
        say_once(choice.note)
    if choice.engine == "torch":
        try:
            from .torch_engine import TorchEngine
        except ImportError as error:
            raise ValueError("engine 'torch' needs PyTorch: pip install torch") from error

        return TorchEngine(config, weights, device, choice.precision, choice.layout)
    if choice.engine == "numpy":
        from .cpu.numpy_engine import NumpyEngine

        return NumpyEngine(config, weights)
    if device == "cpu":
        from .cpu.engine import KernelEngine

        return KernelEngine(config, weights, choice.precision)
    from .gpu.engine import GpuEngine

    return GpuEngine(config, weights, device)


def find_device(device: str | None, engine: str = "auto") -> str:
    """What PyTorch calls a device.

    device: "cpu", "cuda", "cuda:1" or its number alone, "mps", "gpu" (an NVIDIA GPU or a Mac's), or None or "auto": an
    NVIDIA GPU where there is one, else the CPU. PyTorch is imported where a GPU may be. Raises ValueError, one line,
    for a device that cannot be used.
    """
    device = None if device == "auto" else device
    if device == "cpu" or (device is None and (engine == "numpy" or not _may_have_gpu())):
        return "cpu"
    try:
        import torch
    except ImportError as error:
        if device is None:
            say_once("a GPU's driver is here; `make predict GPU=1` or `pip install torch` adds what uses it, 4.7 GB")
            return "cpu"
        raise ValueError(f"device {device!r} needs PyTorch: pip install torch; or try 'cpu'") from error
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "gpu":
        device = "mps" if torch.backends.mps.is_available() else "cuda"
    elif device.isdecimal():
        device = f"cuda:{device}"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"device {device!r} cannot be used ({reason}); try 'cpu', 'cuda' on an NVIDIA GPU, or 'mps' on a Mac"
        ) from error
    return str(torch.device(device))


def look(device: str, kernel_size: int, precision: str = "auto") -> Machine:
    """What there is on this machine. For a CPU this compiles the kernel, if that has not been done."""
    kind = device.split(":")[0]
    if kind == "cpu":
        from .cpu.kernel import PRECISIONS as KERNEL_PRECISIONS
        from .cpu.kernel import KernelError, load

        wanted = "float32" if precision == "auto" else precision
        try:
            if wanted in KERNEL_PRECISIONS:
                load(kernel_size, wanted)
        except KernelError as error:
            return Machine(kernel_problem=str(error))
        return Machine()
    if kind != "cuda":
        return Machine(kind)
    import torch

    from .gpu.ops import triton_works

    return Machine(kind, None, torch.cuda.get_device_capability(device), triton_works(device))


def _may_have_gpu() -> bool:
    """Whether a GPU's driver is installed, and PyTorch should be asked about GPUs. Takes no milliseconds to say no."""
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        return True
    except OSError:
        return os.path.exists("/dev/kfd")  # AMD's


@functools.cache
def say_once(line: str) -> None:
    """Tells people something through the logger ``convmixer``, which without any setting writes to standard error."""
    logging.getLogger("convmixer").warning(line)
