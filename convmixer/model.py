"""ConvMixer: patches mixed by a depthwise convolution in space and a pointwise convolution across channels.

Trockman and Kolter, "Patches Are All You Need?", https://arxiv.org/abs/2201.09792, figure 2. Parameter names are
timm's, so timm's weights load unchanged.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from .config import ConvMixerConfig

ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU}


class Residual(nn.Module):
    """``fn(x) + x``; the branch is called ``fn`` because timm's parameter names are ``blocks.N.0.fn.*``."""

    def __init__(self, fn: nn.Module):
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(x) + x


class ConvMixer(nn.Module):
    """The network.

    Input: float (N, in_chans, H, W), normalised; H and W at least one patch. Output: logits (N, num_classes), bit for
    bit those of ``timm.models.convmixer`` and of the authors' 28 lines given the same weights, memory format and back
    end.
    """

    def __init__(self, config: ConvMixerConfig):
        super().__init__()
        self.config = config
        dim, activation = config.dim, ACTIVATIONS[config.activation]

        def followed_by_norm(conv: nn.Conv2d) -> list[nn.Module]:
            return [conv, activation(), nn.BatchNorm2d(dim)]

        self.stem = nn.Sequential(
            *followed_by_norm(nn.Conv2d(config.in_chans, dim, config.patch_size, stride=config.patch_size))
        )
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(
                    Residual(
                        nn.Sequential(
                            *followed_by_norm(
                                # k // 2 equals padding="same" for odd kernels, and every exporter understands it.
                                nn.Conv2d(dim, dim, config.kernel_size, groups=dim, padding=config.kernel_size // 2)
                            )
                        )
                    ),
                    *followed_by_norm(nn.Conv2d(dim, dim, kernel_size=1)),
                )
                for _ in range(config.depth)
            )
        )
        self.head = nn.Linear(dim, config.num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """The last feature map, (N, dim, H / patch_size, W / patch_size), sides rounded down."""
        return self.blocks(self.stem(x))

    def forward_intermediates(self, x: Tensor) -> list[Tensor]:
        """The feature map after the stem and after every block: depth + 1 tensors shaped as in forward_features."""
        features = [self.stem(x)]
        for block in self.blocks:
            features.append(block(features[-1]))
        return features

    def forward_head(self, features: Tensor) -> Tensor:
        """Logits (N, num_classes) from a feature map (N, dim, h, w)."""
        # adaptive_avg_pool2d and not mean(): they round differently, and the published logits come from this one.
        return self.head(nn.functional.adaptive_avg_pool2d(features, 1).flatten(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def build(config: ConvMixerConfig, weights: Mapping[str, np.ndarray | Tensor] | None = None) -> ConvMixer:
    """A ConvMixer with PyTorch's default initialisation, or holding ``weights`` (taken over without a copy).

    Raises RuntimeError when they are not those of ``config``.
    """
    if weights is None:
        return ConvMixer(config)
    with torch.device("meta"):  # no memory and no random numbers for weights about to be replaced
        network = ConvMixer(config)
    network.load_state_dict(to_tensors(weights), assign=True)
    return network


def to_tensors(weights: Mapping[str, np.ndarray | Tensor]) -> dict[str, Tensor]:
    """The same weights as tensors, which share the arrays' memory."""
    return {name: value if isinstance(value, Tensor) else torch.from_numpy(value) for name, value in weights.items()}


def to_arrays(network: nn.Module) -> dict[str, np.ndarray]:
    """A network's parameters and buffers by name; those on the CPU share their memory."""
    return {name: tensor.detach().cpu().numpy() for name, tensor in network.state_dict().items()}
