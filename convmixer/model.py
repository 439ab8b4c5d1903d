"""ConvMixer: patches mixed by a depthwise convolution in space and a pointwise convolution across channels.

Trockman and Kolter, "Patches Are All You Need?", https://arxiv.org/abs/2201.09792, figure 2. Parameter names are
timm's, so timm's weights load unchanged.
"""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU}


@dataclass(frozen=True)
class ConvMixerConfig:
    """The architecture of one ConvMixer. "ConvMixer-1536/20" in the paper is ``dim=1536, depth=20``.

    Raises ValueError, naming the field and the value, when a value cannot make a network.
    """

    dim: int  # width h: channels of every feature map
    depth: int  # number of blocks d
    kernel_size: int = 9  # of the depthwise convolution; odd, so that "same" padding is symmetric
    patch_size: int = 7  # side in pixels of the patches that the stem embeds
    num_classes: int = 1000
    in_chans: int = 3
    activation: str = "gelu"  # the published 768/32 weights are the only ones that use "relu"

    def __post_init__(self):
        for field in ("dim", "depth", "kernel_size", "patch_size", "num_classes", "in_chans"):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{field} is {value!r}; it must be a whole number of at least 1")
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size is {self.kernel_size}; it must be odd, such as 5, 7 or 9")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation is {self.activation!r}; it must be one of {', '.join(ACTIVATIONS)}")

    def to_dict(self) -> dict:
        """The fields as plain JSON values."""
        return asdict(self)


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


def count_parameters(config: ConvMixerConfig) -> int:
    """The number of trainable parameters of a ConvMixer, without building it."""
    norm = 2 * config.dim
    stem = (config.in_chans * config.patch_size**2 + 1) * config.dim + norm
    depthwise = (config.kernel_size**2 + 1) * config.dim + norm
    pointwise = (config.dim + 1) * config.dim + norm
    head = (config.dim + 1) * config.num_classes
    return stem + config.depth * (depthwise + pointwise) + head


def build(config: ConvMixerConfig, state_dict: dict[str, Tensor] | None = None) -> ConvMixer:
    """A ConvMixer with PyTorch's default initialisation, or holding ``state_dict`` (taken over without a copy).

    Raises RuntimeError when the tensors are not those of ``config``.
    """
    if state_dict is None:
        return ConvMixer(config)
    with torch.device("meta"):  # no memory and no random numbers for weights about to be replaced
        network = ConvMixer(config)
    network.load_state_dict(state_dict, assign=True)
    return network
