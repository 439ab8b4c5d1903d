"""The architecture of a ConvMixer as a few numbers, and what follows from them."""

from dataclasses import asdict, dataclass

ACTIVATIONS = ("gelu", "relu")
NORM_EPS = 1e-5  # of every batch norm: PyTorch's


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
            raise ValueError(f"activation is {self.activation!r:.80}; it must be one of {', '.join(ACTIVATIONS)}")

    def to_dict(self) -> dict:
        """The fields as plain JSON values."""
        return asdict(self)


# What timm, and everyone who trained on ImageNet, calls these architectures.
PUBLISHED = {
    "convmixer_1536_20": ConvMixerConfig(1536, 20, kernel_size=9, patch_size=7),
    "convmixer_768_32": ConvMixerConfig(768, 32, kernel_size=7, patch_size=7, activation="relu"),
    "convmixer_1024_20_ks9_p14": ConvMixerConfig(1024, 20, kernel_size=9, patch_size=14),
}


def count_parameters(config: ConvMixerConfig) -> int:
    """The number of trainable parameters of a ConvMixer, without building it."""
    norm = 2 * config.dim
    stem = (config.in_chans * config.patch_size**2 + 1) * config.dim + norm
    depthwise = (config.kernel_size**2 + 1) * config.dim + norm
    pointwise = (config.dim + 1) * config.dim + norm
    head = (config.dim + 1) * config.num_classes
    return stem + config.depth * (depthwise + pointwise) + head
