"""CIFAR-10 and CIFAR-100 in memory, in their official layouts, and their splits."""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from train.errors import DataError

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class LabelledImages:
    """Pictures of one size in memory: ``images`` uint8 (N, H, W, 3), ``labels`` int64 (N,)."""

    name: str  # said beside every accuracy measured on them
    images: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]  # in index order

    def __len__(self) -> int:
        return len(self.labels)

    def counts(self) -> list[int]:
        """How many pictures each class has, in index order."""
        return np.bincount(self.labels, minlength=len(self.classes)).tolist()

    def part(self, name: str, start: int, stop: int) -> "LabelledImages":
        return LabelledImages(name, self.images[start:stop], self.labels[start:stop], self.classes)


@dataclass(frozen=True)
class Layout:
    """How one data set lies on disk."""

    title: str
    classes: int
    binary: str  # folder of the binary layout
    train_files: tuple[str, ...]
    test_file: str
    label_bytes: int  # before each picture; the last of them is the class
    names: str  # file of the binary layout with a class name a line
    python: str  # folder that torchvision downloads

    def here(self, folder: Path) -> bool:
        return any((folder / name).exists() for name in (self.train_files[0], self.test_file, self.binary, self.python))


LAYOUTS = (
    Layout(
        title="CIFAR-10",
        classes=10,
        binary="cifar-10-batches-bin",
        train_files=tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
        test_file="test_batch.bin",
        label_bytes=1,
        names="batches.meta.txt",
        python="cifar-10-batches-py",
    ),
    Layout(
        title="CIFAR-100",
        classes=100,
        binary="cifar-100-binary",
        train_files=("train.bin",),
        test_file="test.bin",
        label_bytes=2,
        names="fine_label_names.txt",
        python="cifar-100-python",
    ),
)


def find_layout(folder: str | Path) -> Layout | None:
    """The layout of the data set in ``folder``; none where it holds neither CIFAR-10 nor CIFAR-100."""
    return next((layout for layout in LAYOUTS if layout.here(Path(folder))), None)


def load_cifar(folder: str | Path, train: bool, download: bool = False) -> LabelledImages:
    """The training or test pictures of CIFAR-10 or CIFAR-100, whichever ``folder`` holds.

    Reads the official binary layout (``cifar-10-batches-bin``, ``cifar-100-binary``) and the Python layout that
    torchvision downloads (``cifar-10-batches-py``, ``cifar-100-python``); ``download`` fetches CIFAR-10 with it
    where nothing is there. Raises DataError.
    """
    folder = Path(folder)
    layout = find_layout(folder) or (LAYOUTS[0] if download else None)
    if layout is None:
        places = ", ".join(name for layout in LAYOUTS for name in (layout.binary, layout.python))
        raise DataError(f"{folder} holds no CIFAR: expected one of {places} in it (--download fetches CIFAR-10)")
    files = (*layout.train_files, layout.test_file)
    binary = folder if any((folder / name).exists() for name in files) else folder / layout.binary
    if binary.is_dir():
        chosen = layout.train_files if train else (layout.test_file,)
        parts = [_read_binary(binary / name, layout) for name in chosen]
        images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        classes = _class_names(binary / layout.names, layout)
    else:
        images, labels, classes = _read_torchvision(folder, layout, train, download)
    name = f"{layout.title} training set" if train else f"{layout.title} test"
    if not train and looks_recompressed(images):
        name += ", JPEG q75"
    return LabelledImages(name, images, labels, classes)


def _read_binary(path: Path, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """One file of the binary layout: records of label bytes and 1,024 red, green and blue bytes each."""
    try:
        records = np.fromfile(path, np.uint8)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}); the binary layout of {layout.title} has this file"
        ) from error
    record = layout.label_bytes + PIXELS
    if len(records) == 0 or len(records) % record:
        raise DataError(
            f"{path} holds {len(records)} bytes, which is not a whole number of {layout.title}'s records of"
            f" {record:,} bytes"
        )
    records = records.reshape(-1, record)
    labels = records[:, layout.label_bytes - 1].astype(np.int64)
    if labels.max() >= layout.classes:
        raise DataError(f"{path} has the label {labels.max()}; {layout.title}'s labels are 0 to {layout.classes - 1}")
    images = records[:, layout.label_bytes :].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return images.copy(), labels


def _class_names(path: Path, layout: Layout) -> tuple[str, ...]:
    if layout.classes == len(CIFAR10_CLASSES):
        return CIFAR10_CLASSES
    try:
        names = tuple(path.read_text().split())
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); it names the classes, one a line") from error
    if len(names) != layout.classes:
        raise DataError(f"{path} names {len(names)} classes; {layout.title} has {layout.classes}")
    return names


def _read_torchvision(folder: Path, layout: Layout, train: bool, download: bool):
    from torchvision import datasets

    kind = datasets.CIFAR10 if layout.classes == 10 else datasets.CIFAR100
    try:  # torchvision checks each file's MD5 before it opens the pickles in it
        dataset = kind(str(folder), train=train, download=download)
    except (RuntimeError, OSError) as error:
        raise DataError(f"{folder}: torchvision cannot give {layout.title}: {str(error).splitlines()[0]}") from error
    return dataset.data, np.asarray(dataset.targets, np.int64), tuple(dataset.classes)


def looks_recompressed(images: np.ndarray) -> bool:
    """Whether pictures, uint8 (N, H, W, 3), have been through JPEG at quality 75, as in one stand-in for the test set.

    Such pictures survive a second time nearly unchanged (the mean error stays below 1 of 255); originals do not.
    """
    errors = []
    for image in images[:64]:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=75)
        errors.append(np.abs(np.asarray(Image.open(buffer), np.int16) - image).mean())
    return bool(np.mean(errors) < 1.0)


def split_cifar(training_set: LabelledImages, split: str, test_set: LabelledImages | None = None):
    """The (train, report) pair of a split, both LabelledImages.

    "holdout" reports on the last tenth of the training set (images 45,000-49,999) and trains on the rest; "tune" leaves
    that tenth alone and reports on the tenth before it, for choosing settings; "full" trains on everything and reports
    on ``test_set``.
    """
    n = len(training_set)
    tenth = n // 10
    if split == "full":
        return training_set, test_set
    stop = n if split == "holdout" else n - tenth
    title = training_set.name.removesuffix(" training set")
    kind = "hold-out" if split == "holdout" else "tuning split"
    return (
        training_set.part(f"{training_set.name} (images 0-{stop - tenth - 1})", 0, stop - tenth),
        training_set.part(f"{title} {kind} (training images {stop - tenth}-{stop - 1})", stop - tenth, stop),
    )
