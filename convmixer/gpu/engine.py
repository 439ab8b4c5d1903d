"""The network on an NVIDIA GPU in bfloat16: its convolutions are products on the matrix units, in CUDA graphs."""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from ..model import ConvMixer
from .ops import activate, mix_positions

# Batches that are recorded: the smaller they are, the more launching kernels one by one costs. The end is a guess.
GRAPH_BATCHES = (1, 2, 4, 8, 16, 32, 64)
ALIGNMENT = 8  # numbers: matrix products want rows that begin at multiples of 16 bytes


class GpuEngine:
    """A trained ConvMixer with its weights laid out for channel-major memory.

    network: its weights are copied; later changes to them are not seen.
    device: where it runs; on a CPU, or a GPU that has no kernels, the same arithmetic goes through PyTorch's operators.

    Weights and feature maps are bfloat16. Products are added up in float32, in which bias, activation, batch norm and
    the residual addition follow; the head is float32 throughout. Batch norm is one multiply-add, made here in float64:
    it comes behind the activation, and the next convolution pads with zeros, so that it folds into neither exactly.

    Batches of GRAPH_BATCHES pictures are captured as CUDA graphs, each at its second use. Threads may share an engine.
    """

    def __init__(self, network: ConvMixer, device: torch.device | str = "cuda"):
        self.config, self.device = network.config, torch.device(device)
        self._lock = threading.Lock()  # a graph has one place for its input
        self._graphs: dict[tuple[int, ...], _Graph | None] = {}  # None: seen once
        with torch.no_grad():
            stem = network.stem[0].weight.flatten(1)
            missing = -stem.shape[1] % ALIGNMENT
            self._stem = self._bfloat16(nn.functional.pad(stem, (0, missing)))
            self._stem_rest = self._surrounding(network.stem)
            self._blocks = [
                (
                    self._float32(block[0].fn[0].weight.squeeze(1)),
                    self._surrounding(block[0].fn),
                    self._bfloat16(block[1].weight.flatten(1)),
                    self._surrounding(block[1:]),
                )
                for block in network.blocks
            ]
            self._head = self._float32(network.head.weight), self._float32(network.head.bias)

    def __call__(self, pictures: Tensor) -> Tensor:
        """Logits (N, classes), float32 on the CPU, of pictures (N, in_chans, H, W), as `ConvMixer` takes them."""
        return self.run(pictures).cpu()

    def with_features(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, and the last feature map, float32 (N, dim, H / patch_size, W / patch_size) on the device."""
        logits, features = self._run(pictures, _logits_and_features)
        return logits.cpu(), features

    def run(self, pictures: Tensor) -> Tensor:
        """Logits (N, classes), float32 on the device, which need not be ready yet."""
        return self._run(pictures, _logits)

    @torch.inference_mode()
    def _run(self, pictures: Tensor, taken: Callable):
        """What ``taken`` makes of logits (N, classes) and features (dim, N, h, w); nothing that shares their memory."""
        patch, in_chans = self.config.patch_size, self.config.in_chans
        if pictures.ndim != 4 or pictures.shape[1] != in_chans or min(pictures.shape[2:]) < patch:
            wanted = f"(N, {in_chans}, H, W) with sides of at least {patch}"
            raise ValueError(f"the pictures have the shape {tuple(pictures.shape)}; it must be {wanted}")
        with self._on_device():
            if self.device.type != "cuda" or len(pictures) not in GRAPH_BATCHES:
                return taken(*self._forward(pictures.to(self.device)))
            with self._lock:  # until the results are copied
                return taken(*self._through_graph(pictures))

    def _on_device(self) -> AbstractContextManager:
        """Triton launches its kernels on the current GPU, which may be another one."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def _through_graph(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        shape = tuple(pictures.shape)
        if shape not in self._graphs:  # the first call compiles and tunes the kernels, which no graph can record
            self._graphs[shape] = None
            return self._forward(pictures.to(self.device))
        graph = self._graphs[shape]
        if graph is None:
            graph = self._graphs[shape] = _Graph(self._forward, pictures.to(self.device))
        return graph(pictures)

    def _forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        activation = self.config.activation
        patches, shape = self._patches(pictures)
        x = activate(self._stem @ patches, *self._stem_rest, activation).view(-1, *shape)
        for taps, after_taps, weight, after_weight in self._blocks:
            x = mix_positions(x, taps, *after_taps, activation)
            x = activate(weight @ x.flatten(1), *after_weight, activation).view_as(x)
        weight, bias = self._head
        return nn.functional.linear(x.float().mean((2, 3)).t(), weight, bias), x

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

    def _surrounding(self, parts: nn.Sequential) -> tuple[Tensor, Tensor, Tensor]:
        """Bias, and batch norm as scale and shift, of a convolution, an activation and a batch norm."""
        convolution, _, norm = parts
        scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
        shift = norm.bias.double() - norm.running_mean.double() * scale
        return self._float32(convolution.bias), self._float32(scale), self._float32(shift)

    def _float32(self, tensor: Tensor) -> Tensor:
        return tensor.detach().to(self.device, torch.float32, copy=True).contiguous()

    def _bfloat16(self, tensor: Tensor) -> Tensor:
        return tensor.detach().to(self.device, torch.bfloat16, copy=True).contiguous()


class _Graph:
    """A function of one tensor, recorded as a CUDA graph: all of its kernels are launched at once."""

    def __init__(self, function, example: Tensor):
        self._input = example.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            function(self._input)  # libraries take their working memory here, and not while the graph is recorded
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        # thread_local: what other threads do on the GPU meanwhile does not break the recording.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._output = function(self._input)

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """The results, over which the next call writes."""
        self._input.copy_(x)
        self._graph.replay()
        return self._output


def _logits(logits: Tensor, features: Tensor) -> Tensor:
    return logits.clone()


def _logits_and_features(logits: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """The features as float32 (N, dim, h, w)."""
    return logits.clone(), features.transpose(0, 1).to(torch.float32, memory_format=torch.contiguous_format, copy=True)
