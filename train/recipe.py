"""What a recipe is: every setting that decides which weights come out of a run."""

from dataclasses import dataclass, field
from typing import Literal

from timm.data import create_transform
from timm.optim import list_optimizers

from convmixer.config import ConvMixerConfig
from convmixer.preprocessing import Preprocessing
from train.errors import TrainingError
from train.ranges import COUNT, NOT_NEGATIVE, POSITIVE, SHARE, WITHIN, Range, check_ranges, ranged

OPTIMIZERS = set(list_optimizers()) - {"adahessian"}  # that one needs second derivatives


@dataclass(frozen=True)
class Augmentation:
    """Random changes to the training pictures, in this order."""

    scale: float = ranged(Range(0, 1, above=True), 1.0)  # RandomResizedCrop: smallest share of its area that is kept
    ratio: tuple[float, float] = ranged(POSITIVE, (1.0, 1.0))  # RandomResizedCrop: range of its width over height
    interpolation: Literal["bilinear", "bicubic", "random"] = "bilinear"  # of that crop; random: one of the two
    flip: float = ranged(SHARE, 0.5)  # chance of a horizontal flip
    ra_n: int = ranged(Range(0, 100), 0)  # torchvision's RandAugment: operations a picture; 0 turns it off
    ra_m: int = ranged(Range(0, 30), 12)  # torchvision's RandAugment: magnitude, 0 to 30
    aa: str = ""  # timm's policies, such as rand-m9-mstd0.5-inc1; for sets that are read from disk
    jitter: float = ranged(SHARE, 0.0)  # ColorJitter: brightness, contrast and saturation
    reprob: float = ranged(SHARE, 0.0)  # timm's RandomErasing: chance that a rectangle is replaced
    remode: Literal["const", "rand", "pixel"] = "const"  # by the mean colour, a random one, or random pixels
    mixup: float = ranged(NOT_NEGATIVE, 0.0)  # timm's Mixup: alpha of the beta distribution; 0 turns it off
    cutmix: float = ranged(NOT_NEGATIVE, 0.0)  # the same for CutMix; with both, each batch gets one or the other

    def __post_init__(self):
        check_ranges(self, "augmentation.")
        if self.ratio[0] > self.ratio[1]:
            raise TrainingError(f"augmentation.ratio is {self.ratio}; the smaller must come first, as in 0.75 1.33")
        if self.aa:
            try:
                create_transform(224, is_training=True, auto_augment=self.aa)
            except Exception as error:  # of many kinds
                raise TrainingError(
                    f"augmentation.aa is {self.aa!r}; it must be one of timm's policies, such as"
                    " rand-m9-mstd0.5-inc1, augmix-m3, original or 3a"
                ) from error


@dataclass(frozen=True)
class Recipe:
    """Everything that decides which weights come out of a run. Every field can be overridden on the command line."""

    name: str
    model: ConvMixerConfig  # num_classes follows the data
    preprocessing: Preprocessing
    epochs: int = ranged(COUNT)
    batch_size: int = ranged(COUNT, 512)  # pictures an optimizer step, over all processes and accumulated parts
    micro_batch: int = ranged(COUNT, 512)  # most pictures a process takes at once; batch norm sees these
    drop_last: bool = False  # leave out an epoch's last, smaller batch
    lr: float = ranged(NOT_NEGATIVE, 0.05)  # the schedule's peak, for the whole batch_size; nothing scales it
    opt: str = "adamw"  # an optimizer of timm's by its name there; muon takes the 1x1 convolutions, AdamW the rest
    # onecycle: the authors' three straight lines; the others are timm's, poly the straight line down to 0
    sched: Literal["onecycle", "cosine", "poly", "wsd", "constant"] = "onecycle"
    warmup_epochs: int = ranged(NOT_NEGATIVE, 0)  # of timm's schedules: at the start the rate rises from 0
    head_lr: float = ranged(NOT_NEGATIVE, 1.0)  # the classifier's learning rate as a multiple of the others'
    weight_decay: float = ranged(NOT_NEGATIVE, 0.005)
    decay_all: bool = True  # decay biases and norms, too
    eps: float = ranged(POSITIVE, 1e-8)  # of the optimizer
    clip_grad: float | None = ranged(POSITIVE, None)  # largest norm of the gradient; none: not clipped
    label_smoothing: float = ranged(Range(0, 1, below=True), 0.0)
    augmentation: Augmentation = field(default_factory=Augmentation)
    image_sizes: tuple[tuple[int, int], ...] = ()  # (first epoch, side in pixels) pairs; empty: full size all the time
    ema: float | None = ranged(WITHIN, None)  # decay of the weights' moving average, which is then exported
    sync_norm: bool = False  # batch norm over all processes' pictures of a part, not over each process's own
    amp: Literal["auto", "off", "bf16", "fp16"] = "auto"  # auto: bf16 where the device computes it natively
    # auto: on a GPU what is known to be fast, see docs/gpu.md; else channels_last or contiguous, as a start measures it
    memory_format: Literal["auto", "channels_last", "contiguous", "channel_major", "channel_major_fused"] = "auto"
    seed: int = ranged(Range(0, 2**63 - 1), 0)  # of the weights, the order of the pictures and their changes
    split: Literal["holdout", "tune", "full"] = "holdout"  # of CIFAR; tune on "tune", report on "holdout"
    hold_out: float = ranged(WITHIN, 0.1)  # of each class, where there is no validation split
    freeze: bool = False  # train the head alone, on features that are computed once: seconds to minutes on a CPU
    weights: str = ""  # model to start from, a name or a file; model and preprocessing are then its own

    def __post_init__(self):
        check_ranges(self)
        if self.model.in_chans != 3:
            raise TrainingError(f"model.in_chans is {self.model.in_chans}; it must be 3: pictures are read as RGB")
        if self.opt not in OPTIMIZERS:
            raise TrainingError(
                f"opt is {self.opt!r}; it must be one of timm's optimizers, such as adamw, lamb, muon or sgd"
            )
        if self.warmup_epochs >= self.epochs and self.warmup_epochs:
            raise TrainingError(f"warmup_epochs is {self.warmup_epochs}; it must be below epochs, {self.epochs}")
        if self.warmup_epochs and self.sched == "onecycle":
            raise TrainingError(f"warmup_epochs is {self.warmup_epochs}; onecycle has its own warm-up, so it must be 0")
        firsts = [first for first, _ in self.image_sizes]
        if firsts != sorted({*firsts}) or min(firsts, default=0) < 0:
            raise TrainingError(f"image_sizes is {self.image_sizes}; the epochs must rise, as in ((0, 16), (10, 32))")
        sizes = [self.preprocessing.size, *(size for _, size in self.image_sizes)]
        if min(sizes) < self.model.patch_size:
            raise TrainingError(
                f"the smallest picture, {min(sizes)} pixels, holds no patch of {self.model.patch_size}; choose a larger"
                " preprocessing.size or image_sizes, or a smaller model.patch_size"
            )
