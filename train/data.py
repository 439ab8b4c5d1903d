"""CIFAR-10 in memory, its splits, and the augmented batches of an epoch."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset
from torchvision import transforms

from convmixer.preprocessing import Preprocessing
from train.errors import DataError
from train.recipes import Augmentation, Recipe

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@dataclass(frozen=True)
class LabelledImages:
    """Pictures of one size in memory: ``images`` uint8 (N, H, W, 3), ``labels`` int64 (N,)."""

    name: str  # said beside every accuracy measured on them
    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, name: str, start: int, stop: int) -> "LabelledImages":
        return LabelledImages(name, self.images[start:stop], self.labels[start:stop])


def is_cifar10(folder: str | Path) -> bool:
    """Whether ``folder`` holds CIFAR-10 in one of the layouts that load_cifar10 reads."""
    folder = Path(folder)
    names = ("data_batch_1.bin", "test_batch.bin", "cifar-10-batches-bin", "cifar-10-batches-py")
    return any((folder / name).exists() for name in names)


def load_cifar10(folder: str | Path, train: bool, download: bool = False) -> LabelledImages:
    """CIFAR-10's training or test pictures from ``folder``.

    Reads the official binary layout (``cifar-10-batches-bin``) and the Python layout that torchvision downloads
    (``cifar-10-batches-py``); ``download`` fetches the latter where neither is there. Raises DataError.
    """
    folder = Path(folder)
    has_batches = any((folder / name).exists() for name in ("data_batch_1.bin", "test_batch.bin"))
    binary = folder if has_batches else folder / "cifar-10-batches-bin"
    if binary.is_dir():
        names = [f"data_batch_{i}.bin" for i in range(1, 6)] if train else ["test_batch.bin"]
        parts = [_read_binary(binary / name) for name in names]
        images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    elif (folder / "cifar-10-batches-py").is_dir() or download:
        images, labels = _read_torchvision(folder, train, download)
    else:
        raise DataError(
            f"{folder} holds no CIFAR-10: expected a folder cifar-10-batches-bin or cifar-10-batches-py in it"
            " (--download fetches it with torchvision)"
        )
    if train:
        return LabelledImages("CIFAR-10 training set", images, labels)
    return LabelledImages("CIFAR-10 test, JPEG q75" if looks_recompressed(images) else "CIFAR-10 test", images, labels)


def _read_binary(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """One file of the official binary layout: records of a label byte and 1,024 red, green and blue bytes each."""
    try:
        records = np.fromfile(path, np.uint8)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); CIFAR-10's binary layout has this file") from error
    if len(records) == 0 or len(records) % 3073:
        raise DataError(
            f"{path} holds {len(records)} bytes, which is not a whole number of CIFAR-10 records of 3,073 bytes"
        )
    records = records.reshape(-1, 3073)
    labels = records[:, 0].astype(np.int64)
    if labels.max() > 9:
        raise DataError(f"{path} has the label {labels.max()}; CIFAR-10's labels are 0 to 9")
    return records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1).copy(), labels


def _read_torchvision(folder: Path, train: bool, download: bool) -> tuple[np.ndarray, np.ndarray]:
    from torchvision.datasets import CIFAR10 as TorchvisionCIFAR10

    try:  # torchvision checks each file's MD5 before it opens the pickles in it
        dataset = TorchvisionCIFAR10(str(folder), train=train, download=download)
    except (RuntimeError, OSError) as error:
        raise DataError(f"{folder}: torchvision cannot give CIFAR-10: {str(error).splitlines()[0]}") from error
    return dataset.data, np.asarray(dataset.targets, np.int64)


def looks_recompressed(images: np.ndarray, sample: int = 64) -> bool:
    """Whether pictures (N, H, W, 3) have already been through JPEG at quality 75, as in one stand-in for the test set.

    Such pictures survive a second time nearly unchanged (the mean error stays below 1 of 255); originals do not.
    """
    import io

    errors = []
    for image in images[:sample]:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=75)
        errors.append(np.abs(np.asarray(Image.open(buffer), np.int16) - image).mean())
    return bool(np.mean(errors) < 1.0)


def split_cifar10(training_set: LabelledImages, split: str, test_set: LabelledImages | None = None):
    """The (train, report) pair of a split.

    "holdout" reports on the last tenth of the training set (images 45,000-49,999) and trains on the rest; "tune" leaves
    that tenth alone and reports on the tenth before it, for choosing settings; "full" trains on everything and reports
    on ``test_set``.
    """
    n = len(training_set)
    tenth = n // 10
    if split == "full":
        return training_set, test_set
    stop = n if split == "holdout" else n - tenth
    name = (
        f"CIFAR-10 {'hold-out' if split == 'holdout' else 'tuning split'} (training images {stop - tenth}-{stop - 1})"
    )
    return training_set.part(f"{training_set.name} (images 0-{stop - tenth - 1})", 0, stop - tenth), training_set.part(
        name, stop - tenth, stop
    )


def picture_augmentation(augmentation: Augmentation, size: int) -> transforms.Compose:
    """The part of the augmentation that works on a PIL image of ``size`` x ``size``; the order is the authors'."""
    steps = [
        transforms.RandomResizedCrop(size, scale=(augmentation.scale, 1.0), ratio=(1.0, 1.0)),
        transforms.RandomHorizontalFlip(augmentation.flip),
    ]
    if augmentation.ra_n:
        steps.append(transforms.RandAugment(augmentation.ra_n, augmentation.ra_m))
    if augmentation.jitter:
        steps.append(transforms.ColorJitter(augmentation.jitter, augmentation.jitter, augmentation.jitter))
    return transforms.Compose(steps)


def erasing_box(augmentation: Augmentation, size: int) -> tuple[int, int, int, int]:
    """(top, left, height, width) of the rectangle to erase, all 0 for none; torchvision's RandomErasing chooses it."""
    if torch.rand(1).item() >= augmentation.reprob:
        return 0, 0, 0, 0
    top, left, height, width, _ = transforms.RandomErasing.get_params(
        torch.empty(3, size, size), scale=(0.02, 0.33), ratio=(0.3, 3.3), value=[0.0]
    )
    return top, left, height, width


class AugmentedImages(Dataset):
    """Training samples by (epoch, index): uint8 picture (H, W, 3), label, erasing box.

    All random choices of a sample come from (seed, epoch, index) alone, so neither the number of workers nor the moment
    at which a run was resumed changes them.
    """

    def __init__(self, data: LabelledImages, augmentation: Augmentation, seed: int):
        self.data, self.augmentation, self.seed = data, augmentation, seed
        self.size = data.images.shape[1]
        self.augment = picture_augmentation(augmentation, self.size)

    def __getitem__(self, epoch_and_index: tuple[int, int]) -> tuple[np.ndarray, int, tuple[int, int, int, int]]:
        epoch, index = epoch_and_index
        state = int(np.random.SeedSequence((self.seed, epoch, index)).generate_state(1)[0])
        torch.default_generator.manual_seed(state)
        random.seed(state)
        image = self.augment(Image.fromarray(self.data.images[index]))
        return np.asarray(image), int(self.data.labels[index]), erasing_box(self.augmentation, self.size)


class EpochSampler:
    """The order of one epoch's samples, as (epoch, index) pairs: a permutation that (seed, epoch) alone decides."""

    def __init__(self, length: int, seed: int):
        self.length, self.seed, self.epoch = length, seed, 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.length)
        return ((self.epoch, int(index)) for index in order)


def collate(samples: list) -> tuple[Tensor, Tensor, Tensor]:
    """Samples to uint8 images (N, 3, H, W) in channels_last memory, int64 labels (N,) and boxes (N, 4)."""
    images, labels, boxes = zip(*samples, strict=True)
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), torch.tensor(labels), torch.tensor(boxes)


def training_batches(data: LabelledImages, recipe: Recipe, workers: int) -> tuple[DataLoader, EpochSampler]:
    """The loader of the training batches, and its sampler, whose ``epoch`` is to be set before each epoch."""
    sampler = EpochSampler(len(data), recipe.seed)
    loader = DataLoader(
        AugmentedImages(data, recipe.augmentation, recipe.seed),
        batch_sampler=BatchSampler(sampler, recipe.batch_size, drop_last=False),
        num_workers=workers,
        collate_fn=collate,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        # Samples reseed the global generator; the loader's own draw must not depend on when that happened.
        generator=torch.Generator().manual_seed(recipe.seed),
    )
    return loader, sampler


def normalise(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """uint8 (N, 3, H, W) to float32 of the same shape, memory format and device, normalised."""
    mean, std = (
        torch.tensor(v, device=images.device).view(1, 3, 1, 1) for v in (preprocessing.mean, preprocessing.std)
    )
    return (images.float() / 255 - mean) / std


def erase(images: Tensor, boxes: Tensor) -> Tensor:
    """Sets each picture's box to 0, the mean colour once normalised. ``boxes`` int64 (N, 4) as in erasing_box."""
    top, left, height, width = boxes.to(images.device).view(-1, 4, 1, 1).unbind(1)
    rows = torch.arange(images.shape[2], device=images.device).view(1, -1, 1)
    columns = torch.arange(images.shape[3], device=images.device).view(1, 1, -1)
    inside = (rows >= top) & (rows < top + height) & (columns >= left) & (columns < left + width)
    return images.masked_fill(inside.unsqueeze(1), 0.0)
