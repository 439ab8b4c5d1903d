"""What a recipe is: every setting that decides which weights come out of a run."""

from dataclasses import dataclass, field
from typing import Literal

from timm.optim import list_optimizers

from convmixer.config import ConvMixerConfig
from convmixer.preprocessing import Preprocessing

OPTIMIZERS = set(list_optimizers()) - {"adahessian"}  # that one needs second derivatives


@dataclass(frozen=True)
class Augmentation:
    """Random changes to the training pictures, in this order."""

    scale: float = 1.0  # RandomResizedCrop: smallest share of the picture's area that is kept
    ratio: tuple[float, float] = (1.0, 1.0)  # RandomResizedCrop: range of the crop's width over height
    interpolation: Literal["bilinear", "bicubic", "random"] = "bilinear"  # of that crop; random: one of the two
    flip: float = 0.5  # chance of a horizontal flip
    ra_n: int = 0  # torchvision's RandAugment: operations a picture; 0 turns it off
    ra_m: int = 12  # torchvision's RandAugment: magnitude, 0 to 30
    aa: str = ""  # timm's policies, such as rand-m9-mstd0.5-inc1; for sets that are read from disk
    jitter: float = 0.0  # ColorJitter: brightness, contrast and saturation
    reprob: float = 0.0  # timm's RandomErasing: chance that a rectangle is replaced
    remode: Literal["const", "rand", "pixel"] = "const"  # by the mean colour, a random one, or random pixels
    mixup: float = 0.0  # timm's Mixup: alpha of the beta distribution; 0 turns it off
    cutmix: float = 0.0  # the same for CutMix; with both, each batch gets one or the other


@dataclass(frozen=True)
class Recipe:
    """Everything that decides which weights come out of a run. Every field can be overridden on the command line."""

    name: str
    model: ConvMixerConfig  # num_classes follows the data
    preprocessing: Preprocessing
    epochs: int
    batch_size: int = 512  # pictures an optimizer step, over all processes and accumulated parts
    micro_batch: int = 512  # most pictures a process puts through the network at once; batch norm sees these
    drop_last: bool = False  # leave out an epoch's last, smaller batch
    lr: float = 0.05  # the schedule's peak, for the whole batch_size: it is not scaled by anything
    opt: str = "adamw"  # an optimizer of timm's by its name there; muon takes the 1x1 convolutions, AdamW the rest
    # onecycle: the authors' three straight lines; the others are timm's, poly the straight line down to 0
    sched: Literal["onecycle", "cosine", "poly", "wsd", "constant"] = "onecycle"
    warmup_epochs: int = 0  # of timm's schedules: at the start the rate rises from 0
    head_lr: float = 1.0  # the classifier's learning rate as a multiple of the others'
    weight_decay: float = 0.005
    decay_all: bool = True  # decay biases and norms, too
    eps: float = 1e-8  # of the optimizer
    clip_grad: float | None = None  # largest norm of the gradient; none: not clipped
    label_smoothing: float = 0.0
    augmentation: Augmentation = field(default_factory=Augmentation)
    image_sizes: tuple[tuple[int, int], ...] = ()  # (first epoch, side in pixels) pairs; empty: full size all the time
    ema: float | None = None  # decay of the moving average of the weights, which is then what is exported
    sync_norm: bool = False  # batch norm over all processes' pictures of a part, not over each process's own
    amp: Literal["auto", "off", "bf16", "fp16"] = "auto"  # auto: bf16 where the device computes it natively
    # auto: on a GPU what is known to be fast, see docs/gpu.md; else channels_last or contiguous, as a start measures it
    memory_format: Literal["auto", "channels_last", "contiguous", "channel_major"] = "auto"
    seed: int = 0
    split: Literal["holdout", "tune", "full"] = "holdout"  # of CIFAR; tune on "tune", report on "holdout"
    hold_out: float = 0.1  # share of each class to measure on, where a data set has no validation split
    freeze: bool = False  # train the head alone, on features that are computed once: seconds to minutes on a CPU
    weights: str = ""  # model to start from, a name or a file; model and preprocessing are then its own

    def __post_init__(self):
        for name in ("epochs", "batch_size", "micro_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.opt not in OPTIMIZERS:
            raise ValueError(
                f"opt is {self.opt!r}; it must be one of timm's optimizers, such as adamw, lamb, muon or sgd"
            )
        if self.warmup_epochs and self.sched == "onecycle":
            raise ValueError(f"warmup_epochs is {self.warmup_epochs}; onecycle has its own warm-up, so it must be 0")
        if not 0 < self.hold_out < 1:
            raise ValueError(f"hold_out is {self.hold_out}; it must be between 0 and 1, such as 0.1")
        firsts = [first for first, _ in self.image_sizes]
        if firsts != sorted(set(firsts)):
            raise ValueError(f"image_sizes is {self.image_sizes}; the epochs must rise, as in ((0, 16), (10, 32))")
        sizes = [self.preprocessing.size, *(size for _, size in self.image_sizes)]
        if min(sizes) < self.model.patch_size:
            raise ValueError(
                f"a picture of {min(sizes)} pixels holds no patch of {self.model.patch_size}; choose a larger"
                " preprocessing.size or image_sizes, or a smaller model.patch_size"
            )
