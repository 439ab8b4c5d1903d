"""The network on a CPU, through kernel.cpp: the fastest way there is here to run it."""

import ctypes

import torch
from torch import Tensor, nn

from ..model import ConvMixer
from .kernel import PRECISIONS, KernelError, Network, Stage, load

COLUMNS = 2  # vectors of output channels that the kernel computes together
INT8_MAX = 127


class Engine:
    """A trained ConvMixer with its weights laid out for the kernel.

    network: on the CPU, float32. Its weights are copied; later changes to them are not seen.
    precision: "float32": the logits differ from those of ``network`` by 2e-5 of the largest one at most. "bfloat16" and
        "int8": what the 1x1 convolutions multiply, faster and less exact; int8 finds a scale for each pixel and each
        output channel.

    Raises KernelError where there is no kernel for this machine, precision, or network. Threads may share an engine.
    """

    def __init__(self, network: ConvMixer, precision: str = "float32"):
        config = network.config
        self._library = load(config.kernel_size, precision)
        self._head, self._dim = network.head, config.dim
        self._in_chans, self._patch = config.in_chans, config.patch_size
        self._tensors: list[Tensor] = []  # what the kernel's pointers point to
        self._spare: list[Tensor] = []  # memory of earlier calls: fresh memory costs more than the arithmetic in it
        lanes = self._library.convmixer_lanes()
        blocks = -(-config.dim // (lanes * COLUMNS)) * COLUMNS
        pack = _Packer(lanes, blocks, self._tensors)

        depthwise, pointwise = (Stage * config.depth)(), (Stage * config.depth)()
        with torch.no_grad():
            patches = network.stem[0].weight.flatten(1)
            stem = pack.stage(network.stem, pack.columns(patches, -(-patches.shape[1] // lanes), "float32"))
            for index, block in enumerate(network.blocks):
                mixing, convolution = block[0].fn, block[1]
                depthwise[index] = pack.stage(mixing, pack.taps(mixing[0].weight))
                pointwise[index] = pack.stage(block[1:], pack.columns(convolution.weight.flatten(1), blocks, precision))
        relu = int(config.activation == "relu")
        self._network = Network(
            config.in_chans, config.patch_size, config.dim, blocks, config.depth, relu, stem, depthwise, pointwise
        )

    def __call__(self, pictures: Tensor) -> Tensor:
        """Logits (N, classes), float32, of pictures (N, in_chans, H, W), as `ConvMixer` takes them."""
        return self._head(self._run(pictures, None))

    def with_features(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, and the last feature map (N, dim, H / patch_size, W / patch_size)."""
        features = torch.empty(len(pictures), self._dim, *(side // self._patch for side in pictures.shape[2:]))
        return self._head(self._run(pictures, features)), features

    def _run(self, pictures: Tensor, features: Tensor | None) -> Tensor:
        if pictures.ndim != 4 or pictures.shape[1] != self._in_chans or min(pictures.shape[2:]) < self._patch:
            wanted = f"(N, {self._in_chans}, H, W) with sides of at least {self._patch}"
            raise ValueError(f"the pictures have the shape {tuple(pictures.shape)}; it must be {wanted}")
        pictures = pictures.detach().to("cpu", torch.float32).contiguous()
        count, _, height, width = pictures.shape
        network, threads = ctypes.byref(self._network), torch.get_num_threads()
        size = self._library.convmixer_memory(network, count, height, width, threads)
        try:
            memory = self._spare.pop()
        except IndexError:
            memory = torch.empty(0, dtype=torch.uint8)
        if len(memory) < size:
            memory = torch.empty(size, dtype=torch.uint8)
        pooled = torch.empty(count, self._dim)
        self._library.convmixer_forward(
            network,
            pictures.data_ptr(),
            count,
            height,
            width,
            pooled.data_ptr(),
            None if features is None else features.data_ptr(),
            threads,
            memory.data_ptr(),
        )
        self._spare.append(memory)
        return pooled


class _Packer:
    """Lays weights out as kernel.cpp wants them. ``tensors`` keeps them alive."""

    def __init__(self, lanes: int, blocks: int, tensors: list[Tensor]):
        self.lanes, self.blocks, self.tensors = lanes, blocks, tensors

    def stage(self, parts: nn.Sequential, weights: dict[str, Tensor]) -> Stage:
        """A convolution with bias, an activation and a batch norm; ``weights`` are Stage's other fields."""
        convolution, _, norm = parts
        scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
        shift = norm.bias.double() - norm.running_mean.double() * scale
        vectors = {"bias": convolution.bias, "scale": scale, "shift": shift}
        fields = weights | {name: self._padded(vector.float()) for name, vector in vectors.items()}
        self.tensors.extend(fields.values())
        return Stage(**{name: tensor.data_ptr() for name, tensor in fields.items()})

    def taps(self, weight: Tensor) -> dict[str, Tensor]:
        """Depthwise weights (dim, 1, k, k) as (blocks, k * k, lanes)."""
        taps = self._padded(weight.flatten(1)).unflatten(0, (self.blocks, self.lanes))
        return {"weight": taps.transpose(1, 2).contiguous()}

    def columns(self, weight: Tensor, in_blocks: int, precision: str) -> dict[str, Tensor]:
        """Pointwise weights (out, in) as (out / columns, in / pack, columns, pack), where columns is COLUMNS * lanes.

        The inputs are filled up with zeros to in_blocks * lanes; ``pack`` neighbouring ones share 32 bits.
        """
        fields = {}
        if precision == "int8":
            scale = weight.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / INT8_MAX
            weight = (weight / scale[:, None]).round()
            fields["weight_scale"] = self._padded(scale)
            fields["weight_sum"] = self._padded(128 * weight.sum(1)).int()
        dtype = getattr(torch, precision)
        pack = 4 // dtype.itemsize
        inputs = in_blocks * self.lanes
        padded = nn.functional.pad(self._padded(weight), (0, inputs - weight.shape[1])).to(dtype)
        panels = padded.view(-1, COLUMNS * self.lanes, inputs // pack, pack)
        return fields | {"weight": panels.transpose(1, 2).contiguous()}

    def _padded(self, tensor: Tensor) -> Tensor:
        """``tensor`` (dim, ...) with zeros up to blocks * lanes."""
        missing = self.blocks * self.lanes - len(tensor)
        return torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])]).contiguous()


__all__ = ["PRECISIONS", "Engine", "KernelError"]
