"""Measures a model's accuracy on CIFAR-10 or on a folder with one subfolder of pictures a class.

    python train/evaluate.py --model NAME|FILE --data DIR [--split test|holdout|tune|train] [--json]

Top-1 and top-5 accuracy with their counts, the accuracy of each class, images a second, and beside them the accuracy
that the model itself reports.
"""

import sys
from pathlib import Path

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, so that `train` and `convmixer` are found
    from train.memory import keep_memory

    keep_memory()  # before torch allocates anything

import json
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import tyro
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from convmixer import Classifier, ImageError, Preprocessing, load_image
from convmixer.preprocessing import preprocess
from train import data as datasets
from train.loop import TrainingError, evaluate, uint8_batches

CLASSES_SHOWN = 20  # with more classes only the worst ones are printed; --json has them all


@dataclass(frozen=True)
class Evaluation:
    """Measures a model's accuracy on CIFAR-10 or on a folder with one subfolder of pictures a class."""

    data: Path  # CIFAR-10, or a folder with a subfolder of pictures for each class
    model: str = "auto"  # a name (see `python -m convmixer models`) or a checkpoint file
    split: Literal["test", "holdout", "tune", "train"] = "test"  # of CIFAR-10; see train/data.py
    batch_size: int = 256
    device: str | None = None  # cpu, cuda, ...; the GPU where there is one
    workers: int = max(1, min(8, os.cpu_count() or 1))  # processes that read the pictures of a folder
    json: bool = False  # one JSON object instead of the table


class FolderImages(Dataset):
    """Prepared pictures of a folder with a subfolder a class: (float32 (3, size, size), index), or a path if broken."""

    def __init__(self, files: list[tuple[Path, int]], preprocessing: Preprocessing):
        self.files, self.preprocessing = files, preprocessing

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, position: int) -> tuple[Tensor, int] | str:
        path, index = self.files[position]
        try:
            return preprocess(load_image(path, target_size=self.preprocessing.resize), self.preprocessing), index
        except ImageError as error:
            return str(error)


def find_classes(folder: Path) -> dict[str, list[Path]]:
    """The classes of an image folder in sorted order, each with its files in sorted order. Raises DataError."""
    if not folder.is_dir():
        raise datasets.DataError(f"{folder} is not a folder; give CIFAR-10 or a folder with one subfolder a class")
    classes = {
        sub.name: sorted(f for f in sub.rglob("*") if f.is_file()) for sub in sorted(folder.iterdir()) if sub.is_dir()
    }
    classes = {name: files for name, files in classes.items() if files}
    if not classes:
        raise datasets.DataError(f"{folder} holds neither CIFAR-10 nor subfolders with pictures, one for each class")
    return classes


def class_indices(names: list[str], labels: tuple[str, ...]) -> list[int]:
    """The model's index of each class: by label where all the names are labels, else by position. Raises DataError."""
    if set(names) <= set(labels):
        return [labels.index(name) for name in names]
    if len(names) == len(labels):
        return list(range(len(labels)))
    raise datasets.DataError(
        f"the data has {len(names)} classes ({', '.join(names[:3])}, ...) and the model {len(labels)}"
        f" ({', '.join(labels[:3])}, ...); name the subfolders like the model's labels, or give one for each"
    )


def folder_batches(classes: dict[str, list[Path]], classifier: Classifier, options: Evaluation, broken: list[str]):
    """Prepared batches of an image folder; the message for each picture that cannot be read is added to ``broken``."""
    indices = class_indices(list(classes), classifier.labels)
    files = [(path, index) for paths, index in zip(classes.values(), indices, strict=True) for path in paths]
    dataset = FolderImages(files, classifier.preprocessing)
    for samples in DataLoader(dataset, options.batch_size, num_workers=options.workers, collate_fn=list):
        broken += [sample for sample in samples if isinstance(sample, str)]
        whole = [sample for sample in samples if not isinstance(sample, str)]
        if whole:
            yield torch.stack([image for image, _ in whole]), torch.tensor([index for _, index in whole])


def cifar10_batches(images: datasets.LabelledImages, classifier: Classifier, batch_size: int) -> Iterator:
    """Prepared batches of CIFAR-10, for a model that takes 32-pixel pictures. Raises DataError for another."""
    size = classifier.preprocessing.size
    if size != images.images.shape[1]:
        raise datasets.DataError(f"{classifier.name} takes pictures of {size} pixels; CIFAR-10's have 32")
    indices = torch.tensor(class_indices(list(datasets.CIFAR10_CLASSES), classifier.labels))
    for uint8, labels in uint8_batches(images, batch_size):
        yield datasets.normalise(uint8, classifier.preprocessing), indices[labels]


def cifar10_split(folder: Path, split: str) -> datasets.LabelledImages:
    training_set = datasets.load_cifar10(folder, train=split != "test")
    if split in ("test", "train"):
        return training_set
    return datasets.split_cifar10(training_set, split)[1]


def measure(options: Evaluation) -> dict:
    """Runs the evaluation; gives the figures as JSON values. Raises DataError and what Classifier raises."""
    if options.batch_size < 1:
        raise datasets.DataError(f"--batch-size is {options.batch_size}; it must be at least 1")
    classifier = Classifier(options.model, device=options.device)
    broken: list[str] = []
    batches: Iterable
    if datasets.is_cifar10(options.data):
        images = cifar10_split(options.data, options.split)
        name, batches = images.name, cifar10_batches(images, classifier, options.batch_size)
    else:
        name, batches = str(options.data), folder_batches(find_classes(options.data), classifier, options, broken)
    start = time.perf_counter()
    counts = evaluate(classifier.network, batches, len(classifier.labels))
    seconds = time.perf_counter() - start
    if not counts["images"]:
        raise datasets.DataError(f"{options.data}: no picture could be read, the first because {broken[0]}")
    totals, correct = counts["confusion"].sum(1).tolist(), counts["confusion"].diagonal().tolist()
    return {
        "model": classifier.name,
        "data": name,
        "images": counts["images"],
        "top1": 100 * counts["top1"] / counts["images"],
        "top1_count": counts["top1"],
        "top5": 100 * counts["top5"] / counts["images"],
        "top5_count": counts["top5"],
        "loss": counts["loss"],
        "images_per_s": counts["images"] / seconds,
        "per_class": [
            {"label": label, "index": index, "images": totals[index], "top1": 100 * correct[index] / totals[index]}
            for index, label in enumerate(classifier.labels)
            if totals[index]
        ],
        "broken": broken,
        "reported": classifier.accuracy,
    }


def show(result: dict) -> None:
    print(f"{result['model']} on {result['data']}")
    for k in ("top1", "top5"):
        reported = result["reported"].get(k)
        beside = "" if reported is None else f"   reported: {reported:.2f} % on {result['reported'].get('data')}"
        print(f"  top-{k[3]}  {result[k]:6.2f} %  {result[f'{k}_count']:,} of {result['images']:,}{beside}")
    print(f"  {result['images_per_s']:,.0f} images a second")
    rows, title = result["per_class"], "  by class:"
    if len(rows) > CLASSES_SHOWN:
        rows, title = sorted(rows, key=lambda row: row["top1"])[:CLASSES_SHOWN], f"  the {CLASSES_SHOWN} worst classes:"
    print(title)
    width = max(len(row["label"]) for row in rows)
    for row in rows:
        print(f"    {row['label']:<{width}}  {row['top1']:6.2f} % of {row['images']:,}")


def main() -> int:
    options = tyro.cli(Evaluation, prog="train/evaluate.py")
    try:
        result = measure(options)
    except (ValueError, RuntimeError, OSError, TrainingError) as error:
        print(f"train/evaluate.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(result))
    else:
        show(result)
    for message in result["broken"]:
        print(f"train/evaluate.py: left out: {message}", file=sys.stderr)
    return 1 if result["broken"] else 0


if __name__ == "__main__":
    sys.exit(main())
