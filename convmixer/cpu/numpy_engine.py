"""The network in plain NumPy: slow, needs nothing else, and says what kernel.cpp computes."""

from collections.abc import Mapping

import numpy as np

from ..config import NORM_EPS, ConvMixerConfig
from ..engine import check_pictures

SLICE_BYTES = 16 << 20  # of one feature map of the pictures that go through the network together
# erfc(x / sqrt(2)) is 1 / q(x)^16 for x >= 0, where these are q's coefficients: GELU is off by 5e-7 at most.
ERFC = (6.332423708954593e-06, 4.1388077079318464e-05, 5.9706093452405185e-05, 0.0032493306789547205)
ERFC += (0.021157288923859596, 0.049864139407873154, 1.0)


class NumpyEngine:
    """A trained ConvMixer. It keeps `convmixer.engine.Engine`. weights: float32, under timm's names."""

    name, precision = "numpy", "float32"

    def __init__(self, config: ConvMixerConfig, weights: Mapping[str, np.ndarray]):
        self.config, self.weights = config, weights

    def run(self, pictures: np.ndarray, stages: int = 0) -> tuple[np.ndarray, np.ndarray]:
        check_pictures(pictures, self.config, stages)
        count, _, height, width = pictures.shape
        size = max(1, SLICE_BYTES // (4 * self.config.dim * height * width // self.config.patch_size**2))
        parts = [self._slice(pictures[start : start + size], stages) for start in range(0, max(1, count), size)]
        logits, features = zip(*parts, strict=True)
        return np.concatenate(logits), np.concatenate(features, axis=1)

    def warm_up(self, size: int, batch: int = 1) -> None:
        """Nothing waits for anything."""

    def _slice(self, pictures: np.ndarray, stages: int) -> tuple[np.ndarray, np.ndarray]:
        """As `run`. Feature maps are (N, h, w, dim) in here."""
        dim, depth, side = self.config.dim, self.config.depth, self.config.patch_size
        count, chans, height, width = pictures.shape
        h, w = height // side, width // side
        cut = pictures[:, :, : h * side, : w * side].reshape(count, chans, h, side, w, side)
        patches = cut.transpose(0, 2, 4, 1, 3, 5).reshape(count, h, w, chans * side**2)
        features = np.empty((stages, count, dim, h, w), np.float32)
        for stage in range(depth + 1):
            if stage == 0:
                x = self._finished(patches @ self._matrix("stem.0"), "stem.0", "stem.2")
            else:
                block = f"blocks.{stage - 1}"
                x = x + self._finished(self._depthwise(x, f"{block}.0.fn.0"), f"{block}.0.fn.0", f"{block}.0.fn.2")
                x = self._finished(x @ self._matrix(f"{block}.1"), f"{block}.1", f"{block}.3")
            if stage > depth - stages:
                features[stage - depth - 1] = x.transpose(0, 3, 1, 2)
        return x.mean((1, 2)) @ self._matrix("head") + self.weights["head.bias"], features

    def _matrix(self, layer: str) -> np.ndarray:
        weight = self.weights[f"{layer}.weight"]
        return weight.reshape(len(weight), -1).T

    def _depthwise(self, x: np.ndarray, layer: str) -> np.ndarray:
        """The sum of k * k shifted maps, each times its weights."""
        k, (_, h, w, dim) = self.config.kernel_size, x.shape
        taps = self.weights[f"{layer}.weight"].reshape(dim, k, k).transpose(1, 2, 0).copy()
        padded = np.pad(x, ((0, 0), (k // 2, k // 2), (k // 2, k // 2), (0, 0)))
        total, product = np.zeros_like(x), np.empty_like(x)
        for top, left in np.ndindex(k, k):
            total += np.multiply(padded[:, top : top + h, left : left + w], taps[top, left], out=product)
        return total

    def _finished(self, x: np.ndarray, layer: str, norm: str) -> np.ndarray:
        """A convolution's result after its bias, the activation and batch norm."""
        weight, bias, mean, variance = (
            self.weights[f"{norm}.{part}"] for part in ("weight", "bias", "running_mean", "running_var")
        )
        x = x + self.weights[f"{layer}.bias"]
        x = np.maximum(x, 0) if self.config.activation == "relu" else gelu(x)
        scale = weight / np.sqrt(variance + NORM_EPS)
        return x * scale + (bias - mean * scale)


def gelu(x: np.ndarray) -> np.ndarray:
    size = np.abs(x)
    q = np.full_like(x, ERFC[0])
    with np.errstate(over="ignore"):  # where erfc is 0
        for coefficient in ERFC[1:]:
            q *= size
            q += np.float32(coefficient)
        for _ in range(4):
            q *= q
    return (x + size - size / q) / 2
