"""Training on channel-major feature maps, where all convolutions are products on a GPU's matrix units.

`convmixer/gpu/kernels.py` says why; train/speed/layout.py chooses it where it is the fastest way to train.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from convmixer.gpu import halves
from convmixer.gpu.ops import depthwise
from convmixer.model import ConvMixer

Layers = Iterable[nn.Module]  # convolution, activation, norm


class ChannelMajorConvMixer(ConvMixer):
    """A ConvMixer that holds its feature maps as (dim, N, h, w). The parameters, and what it computes, are the same."""

    def forward_features(self, x: Tensor) -> Tensor:
        """As in ConvMixer: (N, dim, h, w), here a view of the channel-major map."""
        count, _, height, width = x.shape
        side = self.config.patch_size
        down, across = height // side, width // side
        patches = x[:, :, : down * side, : across * side].reshape(count, -1, down, side, across, side)
        patches = patches.permute(1, 3, 5, 0, 2, 4).flatten(3).flatten(0, 2)  # (in_chans * side * side, N * h * w)
        shape = (self.config.dim, count, down, across)
        x = self._product(self.stem, patches, shape)
        for residual, *product in self.blocks:
            x = self._mixed(residual.fn, x)
            x = self._product(product, x.flatten(1), shape)
        return x.transpose(0, 1)

    def _mixed(self, layers: Layers, x: Tensor) -> Tensor:
        """A block's first half, with the residual."""
        convolution, activation, norm = layers
        mixed = depthwise(_in_autocast_dtype(x), convolution.weight.squeeze(1), convolution.bias)
        return _normalised(norm, activation(mixed), x.shape) + x

    def _product(self, layers: Layers, columns: Tensor, shape: tuple[int, ...]) -> Tensor:
        """A convolution that takes each column by itself, (in, positions), activation and norm."""
        convolution, activation, norm = layers
        product = torch.addmm(convolution.bias[:, None], convolution.weight.flatten(1), columns)
        return _normalised(norm, activation(product), shape)

    def forward_head(self, features: Tensor) -> Tensor:
        # And not adaptive_avg_pool2d, which would copy a map that is not laid out as (N, dim, h, w).
        return self.head(features.mean((2, 3)))


class FusedConvMixer(ChannelMajorConvMixer):
    """The same with half a block in one kernel, while batch norm takes its statistics from the process's own batch."""

    def _mixed(self, layers: Layers, x: Tensor) -> Tensor:
        convolution, _, norm = layers
        if not _takes_batch_statistics(norm, x):
            return super()._mixed(layers, x)
        taps, rest = convolution.weight.squeeze(1), (norm.eps, self.config.activation)
        x = _in_autocast_dtype(x)
        y, _, *moments = halves.mix(x, taps, convolution.bias, norm.weight, norm.bias, *rest)
        return _followed(norm, *moments, y)

    def _product(self, layers: Layers, columns: Tensor, shape: tuple[int, ...]) -> Tensor:
        convolution, _, norm = layers
        if not _takes_batch_statistics(norm, columns):
            return super()._product(layers, columns, shape)
        z = convolution.weight.flatten(1) @ columns
        y, *moments = halves.norm(z, convolution.bias, norm.weight, norm.bias, norm.eps, self.config.activation)
        return _followed(norm, *moments, y).view(shape)


def _takes_batch_statistics(norm: nn.Module, x: Tensor) -> bool:
    """And more than one value of a channel; PyTorch's own layer refuses that. SyncBatchNorm2d is another class."""
    return norm.training and type(norm) is nn.BatchNorm2d and x[0].numel() > 1


def _followed(norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor, y: Tensor) -> Tensor:
    """``y``; batch norm's running statistics follow the batch's."""
    count = y[0].numel()
    with torch.no_grad():
        norm.running_mean.lerp_(mean.detach().to(norm.running_mean.dtype), norm.momentum)
        norm.running_var.lerp_((variance.detach() * (count / (count - 1))).to(norm.running_var.dtype), norm.momentum)
        norm.num_batches_tracked += 1
    return y


def _normalised(norm: nn.Module, x: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """Batch norm, which wants (N, C, ...): all positions of all pictures stand as one picture's."""
    dim, count, down, across = shape
    return norm(x.view(1, dim, count * down, across)).view(shape)


def _in_autocast_dtype(x: Tensor) -> Tensor:
    """What autocast does before a convolution; it does not know operators of our own."""
    if not torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))


def use_channel_major(network: ConvMixer, fused: bool = False) -> None:
    """Switches a ConvMixer to channel-major feature maps, in place; the parameters stay."""
    network.__class__ = FusedConvMixer if fused else ChannelMajorConvMixer
