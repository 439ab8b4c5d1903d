"""The network on an NVIDIA GPU in bfloat16: its convolutions are products on the matrix units, in CUDA graphs."""

import threading
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor, nn

from ..config import NORM_EPS, ConvMixerConfig
from ..engine import check_pictures
from ..model import to_tensors
from .ops import activate, mix_positions

# Batches that are recorded; others go with the next larger one. Above them launching is little beside the arithmetic.
GRAPH_BATCHES = (1, 2, 4, 8, 16, 32, 64)
ALIGNMENT = 8  # numbers: matrix products want rows that begin at multiples of 16 bytes


class GpuEngine:
    """A trained ConvMixer with its weights laid out for channel-major memory; keeps `convmixer.engine.Engine`.

    weights: by timm's names, as `convmixer.model.to_arrays` gives them; they are copied.
    device: where it runs; on a CPU, or a GPU that has no kernels, the same arithmetic goes through PyTorch's operators.

    Weights and feature maps are bfloat16. Products are added up in float32, in which bias, activation, batch norm and
    the residual addition follow; the head is float32 throughout. Batch norm is one multiply-add, made here in float64:
    it comes behind the activation, and the next convolution pads with zeros, so that it folds into neither exactly.

    Batches of up to 64 pictures run as CUDA graphs, each recorded at its first use. Threads may share an engine.
    """

    name, precision = "kernel", "bfloat16"

    def __init__(
        self, config: ConvMixerConfig, weights: Mapping[str, np.ndarray | Tensor], device: torch.device | str = "cuda"
    ):
        self.config, self.device = config, torch.device(device)
        self._lock = threading.Lock()  # a graph has one place for its input
        self._graphs: dict[tuple[int, ...], _Graph] = {}
        self._weights = to_tensors(weights)
        stem = self._weights["stem.0.weight"].flatten(1)
        self._stem = self._bfloat16(nn.functional.pad(stem, (0, -stem.shape[1] % ALIGNMENT)))
        self._stem_rest = self._surrounding("stem.0", "stem.2")
        self._blocks = [self._block(f"blocks.{index}") for index in range(config.depth)]
        self._head = self._float32("head.weight"), self._float32("head.bias")
        del self._weights

    def run(self, pictures: np.ndarray, stages: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """As `convmixer.engine.Engine` says."""
        check_pictures(pictures, self.config, stages)
        logits, features = self.run_tensors(torch.from_numpy(np.require(pictures, requirements="CW")), stages)
        return logits.cpu().numpy(), features.cpu().numpy()

    @torch.inference_mode()
    def run_tensors(self, pictures: Tensor, stages: int = 0) -> tuple[Tensor, Tensor]:
        """The same for tensors: pictures of any floating dtype, on any device; the results on the engine's.

        On a GPU they need not be ready yet.
        """
        count = len(pictures)
        with self._on_device():
            # Feature maps of many stages are for looking at, and a graph would keep memory for all of them.
            if self.device.type != "cuda" or stages > 1 or not 0 < count <= GRAPH_BATCHES[-1]:
                return _taken(*self._forward(pictures.to(self.device), stages), count, stages)
            with self._lock:  # until the results are copied
                return _taken(*self._graph(count, *pictures.shape[2:])(pictures), count, stages)

    def warm_up(self, size: int, batch: int = 1) -> None:
        """As `convmixer.engine.Engine` says: compiles the kernels and records the graphs."""
        if self.device.type != "cuda":
            return
        with torch.inference_mode(), self._on_device(), self._lock:
            for count in GRAPH_BATCHES[: 1 + GRAPH_BATCHES.index(_recorded(min(batch, GRAPH_BATCHES[-1])))]:
                self._graph(count, size, size)

    def _graph(self, count: int, height: int, width: int) -> "_Graph":
        """The graph for ``count`` pictures, or more."""
        shape = _recorded(count), self.config.in_chans, height, width
        if shape not in self._graphs:
            self._graphs[shape] = _Graph(lambda x: self._forward(x, 1), torch.zeros(shape, device=self.device))
        return self._graphs[shape]

    def _on_device(self) -> AbstractContextManager:
        """Triton launches its kernels on the current GPU, which may be another one."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def _forward(self, pictures: Tensor, stages: int) -> tuple[Tensor, list[Tensor]]:
        """Logits (N, classes), and the last ``stages`` feature maps, bfloat16 (dim, N, h, w)."""
        activation = self.config.activation
        patches, shape = self._patches(pictures)
        x = activate(self._stem @ patches, *self._stem_rest, activation).view(self.config.dim, *shape)
        maps = [x]
        for taps, after_taps, weight, after_weight in self._blocks:
            x = mix_positions(x, taps, *after_taps, activation)
            x = activate(self._product(weight, x.flatten(1)), *after_weight, activation).view_as(x)
            maps = [*maps, x][-max(stages, 1) :]  # what nobody wants is freed
        weight, bias = self._head
        return nn.functional.linear(x.float().mean((2, 3)).t(), weight, bias), maps

    @staticmethod
    def _product(weight: Tensor, columns: Tensor) -> Tensor:
        """A 1x1 convolution; benchmarks/gpu_agreement.py rounds it otherwise."""
        return weight @ columns

    def _patches(self, pictures: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
        """The patches as columns, bfloat16 (in_chans * patch * patch, with zeros behind, N * h * w); and (N, h, w)."""
        patch = self.config.patch_size
        count, channels, height, width = pictures.shape
        down, across = height // patch, width // patch
        cut = pictures[:, :, : down * patch, : across * patch].reshape(count, channels, down, patch, across, patch)
        patches = pictures.new_zeros(self._stem.shape[1], count * down * across, dtype=torch.bfloat16)
        used = channels * patch * patch
        patches[:used].view(channels, patch, patch, count, down, across).copy_(cut.permute(1, 3, 5, 0, 2, 4))
        return patches, (count, down, across)

    def _block(self, name: str) -> tuple:
        """Taps, what follows them, the 1x1 convolution's weight, and what follows it."""
        taps = self._float32(f"{name}.0.fn.0.weight").squeeze(1)
        weight = self._bfloat16(self._weights[f"{name}.1.weight"].flatten(1))
        after_taps = self._surrounding(f"{name}.0.fn.0", f"{name}.0.fn.2")
        return taps, after_taps, weight, self._surrounding(f"{name}.1", f"{name}.3")

    def _surrounding(self, convolution: str, norm: str) -> tuple[Tensor, Tensor, Tensor]:
        """A convolution's bias, and the batch norm behind its activation as scale and shift."""
        norms = ("weight", "bias", "running_mean", "running_var")
        gain, offset, mean, variance = (self._weights[f"{norm}.{part}"].double() for part in norms)
        scale = gain / (variance + NORM_EPS).sqrt()
        vectors = self._weights[f"{convolution}.bias"], scale, offset - mean * scale
        return tuple(self._copied(vector, torch.float32) for vector in vectors)

    def _float32(self, name: str) -> Tensor:
        return self._copied(self._weights[name], torch.float32)

    def _bfloat16(self, tensor: Tensor) -> Tensor:
        return self._copied(tensor, torch.bfloat16)

    def _copied(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        return tensor.detach().to(self.device, dtype, copy=True).contiguous()


class _Graph:
    """A function of one tensor, recorded as a CUDA graph: all of its kernels are launched at once.

    example: what it is recorded with; its memory holds the input from then on.
    """

    def __init__(self, function, example: Tensor):
        self._input = example
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            function(self._input)  # libraries take their working memory here, and not while the graph is recorded
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        # thread_local: what other threads do on the GPU meanwhile does not break the recording.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._output = function(self._input)

    def __call__(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The results, over which the next call writes; ``x`` may be fewer than the example's."""
        self._input[: len(x)].copy_(x)
        self._graph.replay()
        return self._output


def _recorded(count: int) -> int:
    """The smallest of GRAPH_BATCHES that holds ``count`` pictures."""
    return next(batch for batch in GRAPH_BATCHES if batch >= count)


def _taken(logits: Tensor, maps: list[Tensor], count: int, stages: int) -> tuple[Tensor, Tensor]:
    """Copies: the first ``count`` pictures' logits, and their last feature maps, float32 (stages, count, dim, h, w)."""
    dim, _, height, width = maps[-1].shape
    features = logits.new_empty(stages, count, dim, height, width)
    for copy, one in zip(features, maps[len(maps) - stages :], strict=True):
        copy.copy_(one[:, :count].transpose(0, 1))
    return logits[:count].clone(), features
