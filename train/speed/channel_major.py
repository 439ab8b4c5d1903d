"""Training on channel-major feature maps, where all convolutions are products on a GPU's matrix units.

`convmixer/gpu/kernels.py` says why; train/speed/layout.py chooses it where it is the fastest way to train.
"""

import torch
from torch import Tensor, nn

from convmixer.gpu.ops import depthwise
from convmixer.model import ConvMixer


class ChannelMajorConvMixer(ConvMixer):
    """A ConvMixer that holds its feature maps as (dim, N, h, w). The parameters, and what it computes, are the same."""

    def forward_features(self, x: Tensor) -> Tensor:
        """As in ConvMixer: (N, dim, h, w), here a view of the channel-major map."""
        convolution, activation, norm = self.stem
        count, _, height, width = x.shape
        side = self.config.patch_size
        down, across = height // side, width // side
        patches = x[:, :, : down * side, : across * side].reshape(count, -1, down, side, across, side)
        patches = patches.permute(1, 3, 5, 0, 2, 4).flatten(3).flatten(0, 2)  # (in_chans * side * side, N * h * w)
        shape = (self.config.dim, count, down, across)
        x = _normalised(norm, activation(_product(convolution, patches)), shape)
        for residual, convolution, activation, norm in self.blocks:
            mixing, mixed_activation, mixed_norm = residual.fn
            mixed = depthwise(_in_autocast_dtype(x), mixing.weight.squeeze(1), mixing.bias)
            x = _normalised(mixed_norm, mixed_activation(mixed), shape) + x
            x = _normalised(norm, activation(_product(convolution, x.flatten(1))), shape)
        return x.transpose(0, 1)

    def forward_head(self, features: Tensor) -> Tensor:
        # And not adaptive_avg_pool2d, which would copy a map that is not laid out as (N, dim, h, w).
        return self.head(features.mean((2, 3)))


def _product(convolution: nn.Conv2d, columns: Tensor) -> Tensor:
    """A convolution that takes each column by itself: (in, positions) to (out, positions)."""
    return torch.addmm(convolution.bias[:, None], convolution.weight.flatten(1), columns)


def _normalised(norm: nn.Module, x: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """Batch norm, which wants (N, C, ...): all positions of all pictures stand as one picture's."""
    dim, count, down, across = shape
    return norm(x.view(1, dim, count * down, across)).view(shape)


def _in_autocast_dtype(x: Tensor) -> Tensor:
    """What autocast does before a convolution; it does not know operators of our own."""
    if not torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))


def use_channel_major(network: ConvMixer) -> None:
    """Switches a ConvMixer to channel-major feature maps, in place; the parameters stay."""
    network.__class__ = ChannelMajorConvMixer
