"""The network on a CPU through kernel.cpp: the fastest way there is here to run it."""

import ctypes
from collections.abc import Mapping

import numpy as np

from ..config import NORM_EPS, ConvMixerConfig
from ..engine import check_pictures
from .kernel import Network, Stage, load
from .threads import usable_cpus

COLUMNS = 2  # vectors of output channels that the kernel computes together
INT8_MAX = 127
ALIGNMENT = 64  # bytes

Weights = Mapping[str, np.ndarray]


class KernelEngine:
    """A trained ConvMixer with its weights laid out for the kernel. It keeps `convmixer.engine.Engine`.

    weights: float32, under timm's names. They are copied; later changes to them are not seen.
    precision: "float32": the logits differ from those of PyTorch's operators by 2e-5 of the largest one at most.
        "bfloat16" and "int8": what the 1x1 convolutions multiply, faster and less exact; int8 finds a scale for each
        pixel and each output channel, and without VNNI gives the pixels 12 bits.

    Raises KernelError where there is no kernel for this machine, precision, or config. ``threads`` may be changed.
    """

    name = "kernel"

    def __init__(self, config: ConvMixerConfig, weights: Weights, precision: str = "float32"):
        self.config, self.precision, self.threads = config, precision, usable_cpus()
        self._library = load(config.kernel_size, precision)
        self._arrays = pack(config, weights, precision, self._library.convmixer_lanes(), self._library.convmixer_pack())
        self._head = np.array(weights["head.weight"].T), np.array(weights["head.bias"])
        self._spare: list[np.ndarray] = []  # memory of earlier calls: fresh memory costs more than the arithmetic in it
        stem, *stages = (
            Stage(**{name: array.ctypes.data for name, array in arrays.items()}) for arrays in self._arrays
        )
        sizes = (
            config.in_chans,
            config.patch_size,
            config.dim,
            len(self._arrays[0]["bias"]) // self._library.convmixer_lanes(),
            config.depth,
        )
        halves = [(Stage * config.depth)(*stages[half::2]) for half in (0, 1)]
        self._network = Network(*sizes, int(config.activation == "relu"), stem, *halves)

    def run(self, pictures: np.ndarray, stages: int = 0) -> tuple[np.ndarray, np.ndarray]:
        check_pictures(pictures, self.config, stages)
        config, count = self.config, len(pictures)
        pictures = np.ascontiguousarray(pictures)
        height, width = pictures.shape[2:]
        sides = height // config.patch_size, width // config.patch_size
        pooled = np.empty((count, config.dim), np.float32)
        features = np.empty((stages, count, config.dim, *sides), np.float32)
        network, threads = ctypes.byref(self._network), self.threads
        size = self._library.convmixer_memory(network, count, height, width, threads)
        try:
            memory = self._spare.pop()
        except IndexError:
            memory = aligned(0, np.uint8)
        if len(memory) < size:
            memory = aligned(size, np.uint8)
        arrays = pictures.ctypes.data, count, height, width, pooled.ctypes.data, features.ctypes.data
        self._library.convmixer_forward(network, *arrays, stages, threads, memory.ctypes.data)
        self._spare.append(memory)
        weight, bias = self._head
        # And not @: the threads that NumPy's library keeps for it spin for 25 ms after it, on the cores of ours.
        return np.einsum("nc,ck->nk", pooled, weight) + bias, features

    def warm_up(self, size: int, batch: int = 1) -> None:
        """One picture is enough: more would only take longer."""
        self.run(np.zeros((1, self.config.in_chans, size, size), np.float32))


def pack(
    config: ConvMixerConfig, weights: Weights, precision: str, lanes: int, share: int
) -> list[dict[str, np.ndarray]]:
    """The fields of each `Stage` of stages.h: the stem's, then the depthwise and the pointwise one of each block.

    lanes: floats in the kernel's vectors. share: input channels that share 32 bits in its 1x1 convolutions.
    """
    blocks = -(-config.dim // (lanes * COLUMNS)) * COLUMNS
    channels = blocks * lanes

    def stage(convolution: str, norm: str, fields: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """A convolution with bias, an activation and a batch norm."""
        parts = ("weight", "bias", "running_mean", "running_var")
        weight, bias, mean, variance = (weights[f"{norm}.{part}"].astype(np.float64) for part in parts)
        scale = weight / np.sqrt(variance + NORM_EPS)
        vectors = {"bias": weights[f"{convolution}.bias"], "shift": bias - mean * scale}
        vectors["scale"] = scale if config.activation == "relu" else scale / 2  # the kernel has twice GELU
        return fields | {name: _padded(vector, channels) for name, vector in vectors.items()}

    def taps(name: str) -> dict[str, np.ndarray]:
        """Depthwise weights (dim, 1, k, k) as (blocks, k * k, lanes)."""
        weight = weights[name].reshape(config.dim, -1)
        return {"weight": _laid(_padded(weight, channels).reshape(blocks, lanes, -1).transpose(0, 2, 1))}

    def columns(name: str, in_blocks: int, precision: str) -> dict[str, np.ndarray]:
        """Pointwise weights (out, in, ...) as (out / wide, in / together, wide, together): wide is COLUMNS * lanes.

        The inputs are filled up with zeros to in_blocks * lanes.
        """
        weight, fields = weights[name].reshape(config.dim, -1), {}
        if precision == "int8":
            scale = np.maximum(np.abs(weight).max(1), np.finfo(np.float32).tiny) / INT8_MAX
            weight = np.rint(weight / scale[:, None])
            zero = 128 if share == 4 else 0  # Int8::ZERO of stages.h
            sums = _padded(zero * weight.sum(1, dtype=np.float64), channels, np.int32)
            fields = {"weight_scale": _padded(scale, channels), "weight_sum": sums}
            weight = weight.astype(np.int8 if share == 4 else np.int16)
        elif precision == "bfloat16":
            weight = to_bfloat16(weight)
        together, inputs = 4 // weight.itemsize, in_blocks * lanes
        if weight.shape != (channels, inputs):
            weight = np.pad(weight, ((0, channels - config.dim), (0, inputs - weight.shape[1])))
        panels = weight.reshape(-1, COLUMNS * lanes, inputs // together, together)
        return fields | {"weight": _laid(panels.transpose(0, 2, 1, 3))}

    patches = -(-config.in_chans * config.patch_size**2 // lanes)
    packed = [stage("stem.0", "stem.2", columns("stem.0.weight", patches, "float32"))]
    for block in (f"blocks.{index}" for index in range(config.depth)):
        packed.append(stage(f"{block}.0.fn.0", f"{block}.0.fn.2", taps(f"{block}.0.fn.0.weight")))
        packed.append(stage(f"{block}.1", f"{block}.3", columns(f"{block}.1.weight", blocks, precision)))
    return packed


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 rounded to bfloat16, ties to even, as its uint16 bits. NaN stays NaN."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + (0x7FFF + (bits >> 16 & 1))) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def aligned(shape: int | tuple[int, ...], dtype: type | np.dtype) -> np.ndarray:
    """An empty array that begins at a multiple of ALIGNMENT."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def _laid(view: np.ndarray) -> np.ndarray:
    array = aligned(view.shape, view.dtype)
    array[...] = view
    return array


def _padded(array: np.ndarray, length: int, dtype: type = np.float32) -> np.ndarray:
    """``array`` (n, ...) with zeros up to (length, ...)."""
    padded = aligned((length, *array.shape[1:]), dtype)
    padded[: len(array)], padded[len(array) :] = array, 0
    return padded
