"""The recipes: one entry a result, each saying what it reproduces, what it should reach, and how to start it."""

from dataclasses import dataclass, field
from typing import Literal

from convmixer.model import ConvMixerConfig


@dataclass(frozen=True)
class Augmentation:
    """Random changes to the training pictures, in this order; torchvision's operations of the same names."""

    scale: float = 1.0  # RandomResizedCrop: smallest share of the picture's area that is kept
    flip: float = 0.5  # chance of a horizontal flip
    ra_n: int = 2  # RandAugment: operations a picture; 0 turns it off
    ra_m: int = 12  # RandAugment: magnitude, 0 to 30
    jitter: float = 0.0  # ColorJitter: brightness, contrast and saturation
    reprob: float = 0.0  # RandomErasing: chance that a rectangle is set to the mean colour


@dataclass(frozen=True)
class Recipe:
    """Everything that decides which weights come out of a run. Every field can be overridden on the command line."""

    name: str
    model: ConvMixerConfig
    epochs: int
    batch_size: int = 512  # the last, smaller batch of an epoch is kept
    lr: float = 0.05  # the peak of the onecycle schedule
    weight_decay: float = 0.005  # AdamW, on every parameter
    eps: float = 1e-8  # AdamW
    clip_grad: float | None = None  # largest norm of the gradient; none: not clipped
    label_smoothing: float = 0.0
    augmentation: Augmentation = field(default_factory=Augmentation)
    image_sizes: tuple[tuple[int, int], ...] = ()  # (first epoch, side in pixels) pairs; empty: full size all the time
    ema: float | None = None  # decay of the moving average of the weights, which is then what is exported
    amp: Literal["auto", "off", "bf16", "fp16"] = "auto"  # auto: bf16 where the device computes it natively
    seed: int = 0
    split: Literal["holdout", "tune", "full"] = "holdout"  # see train/data.py; tune on "tune", report on "holdout"

    def __post_init__(self):
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        firsts = [first for first, _ in self.image_sizes]
        if firsts != sorted(set(firsts)):
            raise ValueError(f"image_sizes is {self.image_sizes}; the epochs must rise, as in ((0, 16), (10, 32))")
        if any(size < self.model.patch_size for _, size in self.image_sizes):
            raise ValueError(
                f"image_sizes is {self.image_sizes}; a picture must hold one patch of {self.model.patch_size}"
            )


CIFAR10_256_8 = ConvMixerConfig(dim=256, depth=8, kernel_size=5, patch_size=2, num_classes=10)

RECIPES = {
    recipe.name: recipe
    for recipe in (
        # The authors' 25-epoch run: --lr-max=0.05 --ra-n=2 --ra-m=12 --wd=0.005 --scale=1.0 --jitter=0 --reprob=0
        # Published: 92.60 % on the CIFAR-10 test set, 42.6 s an epoch on an RTX 2080 Ti,
        # https://github.com/locuslab/convmixer-cifar10
        # python train/run.py --recipe cifar10 --data DIR
        Recipe(name="cifar10", model=CIFAR10_256_8, epochs=25),
        # The same for two CPU cores: 20 epochs, the early ones on smaller pictures. The network is fully
        # convolutional, so 16-pixel pictures cost a quarter. Not a published recipe.
        # python train/run.py --recipe cifar10_progressive --data DIR
        Recipe(name="cifar10_progressive", model=CIFAR10_256_8, epochs=20, image_sizes=((0, 16), (8, 24), (14, 32))),
    )
}
