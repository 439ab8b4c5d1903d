"""Measures a model's accuracy as timm does: every picture once, none augmented.

    python train/evaluate.py --model NAME|FILE --data DATA [--decode timm|classifier] [--flip] [--json]

DATA is a folder with one subfolder of pictures a class, a .tar file, wds/FOLDER or hfds/NAME (see
`train.data.sources`), or a folder with CIFAR-10 or CIFAR-100, whose parts --split names. Prints top-1 and top-5
accuracy with their counts, beside them what was published about the model or what it reports of itself, and the
accuracy of each class.

timm takes the pixels as they are stored. With --decode classifier pictures are decoded as in every door: colour
profiles are applied, those that EXIF calls turned are turned, and large JPEGs are read at a fraction of their sides.
"""

import sys
from pathlib import Path

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, so that `train` and `convmixer` are found
    from train.speed.memory import keep_memory

    keep_memory()  # before torch allocates anything

import json
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import tyro
from torch import Tensor, nn

from convmixer import Classifier, load_image
from convmixer.labels import read_labels
from train.data.batches import Prepared, memory_batches, normalise, readable
from train.data.cifar import LabelledImages, find_layout, load_cifar, split_cifar
from train.data.loader import batches_of, read_with_workers
from train.data.samples import as_timm
from train.data.sources import MapSamples, Source, StreamSamples, open_pair, open_source
from train.distributed import World
from train.errors import HELP, DataError, end_with_reader
from train.loop import TOP5_ABOVE, choose_amp, evaluate

CLASSES_SHOWN = 20  # with more classes only the worst ones are printed; --json has them all


@dataclass(frozen=True)
class Evaluation:
    """Measures a model's accuracy; see the head of train/evaluate.py for what the data can be."""

    data: str  # a folder with a subfolder a class, a .tar file, wds/FOLDER, hfds/NAME, or a folder that holds CIFAR
    model: str = "auto"  # a name (see `python -m convmixer models`) or a checkpoint file
    val_split: str | None = None  # which split of the data; "val" and its other names by default
    class_names: Path | None = None  # text file, a class a line in the order of the labels; for WebDataset shards
    hold_out: float | None = None  # measure on the share of each class that training held out, such as 0.1
    seed: int = 0  # of that hold-out: the recipe's
    split: Literal["test", "holdout", "tune", "train"] | None = None  # of CIFAR; test by default
    decode: Literal["timm", "classifier"] = "timm"  # pixels as stored; or colour profile and EXIF orientation applied
    flip: bool = False  # mirrored test-time augmentation: the mean of the logits of each picture and its mirror image
    amp: Literal["off", "bf16", "fp16", "auto"] = "off"  # mixed precision, in PyTorch's operators
    precision: Literal["float32", "bfloat16", "float16", "int8"] = "float32"  # of the classifier, see README
    batch_size: int = 256
    device: str | None = None  # cpu, cuda, ...; the GPU where there is one
    workers: int = max(1, min(8, os.cpu_count() or 1))  # processes that read the pictures; 0: this one
    json: bool = False  # one JSON object instead of the table


class Mirrored(nn.Module):
    """The mean of a network's logits for each picture and for its mirror image."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return (self.network(x) + self.network(x.flip(3))) / 2


class Answering(nn.Module):
    """The logits that a classifier answers with, as a module of the CPU."""

    def __init__(self, classifier: Classifier):
        super().__init__()
        self.classifier, self.here = classifier, nn.Parameter(torch.empty(0))

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(self.classifier.logits(x))


def match_classes(names: tuple[str, ...], labels: tuple[str, ...]) -> tuple[list[int], str]:
    """The model's index of each class of the data, and what they were matched by. Raises DataError.

    By "name" where all the names are labels; by "synset" where they are ImageNet's (n01440764) and what those stand for
    are labels; else by "position", where the data has as many classes or says no more than their numbers.
    """
    for candidates, by in ((names, "name"), (readable(names), "synset")):
        if set(candidates) <= set(labels):
            index = {label: i for i, label in enumerate(labels)}
            return [index[name] for name in candidates], by
    unnamed = names == tuple(f"class {i}" for i in range(len(names)))
    if len(names) == len(labels) or (unnamed and len(names) < len(labels)):
        return list(range(len(names))), "position"
    foreign = [name for name in names if name not in set(labels)]
    raise DataError(
        f"the data has {len(names)} classes, of which {len(foreign)} ({', '.join(foreign[:3])}, ...) are none of the"
        f" model's {len(labels)} ({', '.join(labels[:3])}, ...); name the classes like the model's labels"
    )


def source_batches(source: Source, indices: list[int], classifier: Classifier, options: Evaluation, broken: list[str]):
    """Prepared batches of a source; the message about each picture that cannot be read is added to ``broken``."""
    prepared, loader = Prepared(classifier.preprocessing), {"batch_size": options.batch_size}
    as_classifier = partial(load_image, target_size=classifier.preprocessing.resize)
    decode = as_timm if options.decode == "timm" else as_classifier
    if source.streaming:
        samples = StreamSamples(source, prepared, 0, decode=decode)
    else:
        samples = MapSamples(source, prepared, 0, replace_broken=False, decode=decode)
        loader["sampler"] = [(0, i) for i in range(len(source))]
    index_of = torch.tensor(indices)
    for images, labels, messages in batches_of(read_with_workers(samples, options.workers, **loader)):
        broken += messages
        if len(labels):
            yield normalise(images, classifier.preprocessing), index_of[labels]


def cifar_batches(images: LabelledImages, indices: list[int], classifier: Classifier, batch_size: int) -> Iterator:
    """Prepared batches of CIFAR, for a model that takes 32-pixel pictures. Raises DataError for another."""
    size = classifier.preprocessing.size
    if size != images.images.shape[1]:
        raise DataError(f"{classifier.name} takes pictures of {size} pixels; CIFAR's have 32")
    index_of, world = torch.tensor(indices), World(torch.device(classifier.device))
    for prepared, labels in memory_batches(images, classifier.preprocessing, world, batch_size):
        yield prepared, index_of[labels]


def open_cifar(options: Evaluation) -> LabelledImages:
    if options.val_split is not None or options.hold_out is not None:
        raise DataError("the parts of CIFAR are named by --split: test, holdout, tune or train")
    if options.class_names is not None:
        raise DataError("CIFAR names its classes itself; leave out --class-names")
    split = options.split or "test"
    pictures = load_cifar(options.data, train=split != "test")
    return pictures if split in ("test", "train") else split_cifar(pictures, split)[1]


def open_pictures(options: Evaluation, labels: tuple[str, ...]) -> Source:
    if options.split is not None:
        raise DataError("--split is for CIFAR; other data has --val-split, or --hold-out")
    split, classes = options.val_split or "val", options.class_names and read_labels(options.class_names)
    if options.hold_out is not None:
        return open_pair(options.data, "train", split, options.hold_out, seed=options.seed, classes=classes)[1]
    # A stream knows nothing but numbers, which without names can only be the model's own.
    return open_source(options.data, split, classes=classes or (labels if options.data.startswith("wds/") else None))


def with_progress(batches: Iterable, total: int) -> Iterator:
    """The batches; on a terminal also a line that counts the pictures."""
    done = 0
    for images, labels in batches:
        yield images, labels
        done += len(labels)
        if sys.stderr.isatty():
            print(f"\r  {done:,} of {total:,} ", end="\r", file=sys.stderr, flush=True)


def measure(options: Evaluation) -> dict:
    """Runs the evaluation; gives the figures as JSON values. Raises DataError and what Classifier raises."""
    if options.batch_size < 1:
        raise DataError(f"--batch-size is {options.batch_size}; it must be at least 1")
    if options.workers < 0:
        raise DataError(f"--workers is {options.workers}; it must be at least 0")
    is_cifar = find_layout(options.data) is not None
    if options.precision != "float32" and options.amp != "off":
        raise DataError("--amp is for PyTorch's operators and --precision for this project's kernels; give one of them")
    classifier = Classifier(options.model, device=options.device, precision=options.precision)
    data = open_cifar(options) if is_cifar else open_pictures(options, classifier.labels)
    indices, matched_by = match_classes(data.classes, classifier.labels)
    broken: list[str] = []
    if is_cifar:
        batches = cifar_batches(data, indices, classifier, options.batch_size)
    else:
        batches = source_batches(data, indices, classifier, options, broken)
    is_plain = classifier.engine.name == "torch" or options.amp != "off"
    network = classifier.network if is_plain else Answering(classifier)
    network = Mirrored(network) if options.flip else network
    amp = choose_amp(options.amp, torch.device(classifier.device))
    start = time.perf_counter()
    counts = evaluate(network, with_progress(batches, len(data)), len(classifier.labels), amp)
    seconds = time.perf_counter() - start
    if not counts["images"]:
        raise DataError(f"{options.data}: no picture could be read, the first is {broken[0] if broken else 'missing'}")
    top5 = counts["top5"] if len(classifier.labels) > TOP5_ABOVE else None
    totals, correct = counts["confusion"].sum(1).tolist(), counts["confusion"].diagonal().tolist()
    return {
        "model": classifier.name,
        "data": data.name,
        "images": counts["images"],
        "top1": 100 * counts["top1"] / counts["images"],
        "top1_count": counts["top1"],
        "top5": None if top5 is None else 100 * top5 / counts["images"],
        "top5_count": top5,
        "loss": counts["loss"],
        "decode": options.decode,
        "tta": "flip" if options.flip else None,
        "amp": amp,
        "engine": "torch" if is_plain else classifier.engine.name,
        "precision": classifier.engine.precision if amp == "off" else amp,
        "matched_by": matched_by,
        "images_per_s": counts["images"] / seconds,
        "per_class": [
            {"label": label, "index": index, "images": totals[index], "top1": 100 * correct[index] / totals[index]}
            for index, label in enumerate(classifier.labels)
            if totals[index]
        ],
        "broken": broken,
        "left_out": [] if is_cifar else list(data.notes),
        "reported": classifier.accuracy,
    }


def beside(reported: dict, key: str) -> str:
    """What is known about the model's accuracy, to be compared with the measured one."""
    if reported.get(key) is None:
        return ""
    if "measured_by" in reported:
        return f"   published: {reported[key]:.2f} % ({reported['measured_by']}, {reported.get('data')})"
    return f"   reported: {reported[key]:.2f} % on {reported.get('data')}"


def show(result: dict) -> None:
    tta = ", with mirrored test-time augmentation" if result["tta"] else ""
    print(f"{result['model']} on {result['data']}{tta}, in {result['precision']} by engine {result['engine']}")
    for k in ("top1", "top5") if result["top5"] is not None else ("top1",):
        count = f"{result[f'{k}_count']:,} of {result['images']:,}"
        print(f"  top-{k[3]}  {result[k]:6.2f} %  {count}{beside(result['reported'], k)}")
    if result["decode"] == "timm":
        print(
            "  pictures decoded as timm does: no colour profile or EXIF orientation applied (--decode classifier does)"
        )
    for note in result["left_out"]:
        print(f"  {note}")
    if result["broken"]:
        print(f"  left out  {len(result['broken']):,} that could not be read")
    if result["matched_by"] == "position":
        print("  the data's classes were taken for the model's by their position, not by name")
    print(f"  {result['images_per_s']:,.0f} images a second")
    rows, title = result["per_class"], "  by class:"
    if len(rows) > CLASSES_SHOWN:
        rows, title = sorted(rows, key=lambda row: row["top1"])[:CLASSES_SHOWN], f"  the {CLASSES_SHOWN} worst classes:"
    print(title)
    width = max(len(row["label"]) for row in rows)
    for row in rows:
        print(f"    {row['label']:<{width}}  {row['top1']:6.2f} % of {row['images']:,}")


def main() -> int:
    for stream in (sys.stdout, sys.stderr):  # a name that the terminal cannot show is no reason to stop
        stream.reconfigure(errors="backslashreplace")
    if HELP & set(sys.argv):
        end_with_reader()
    options = tyro.cli(Evaluation, prog="train/evaluate.py")
    try:
        result = measure(options)
    except KeyboardInterrupt:
        return 130
    except (ValueError, RuntimeError, OSError) as error:  # TrainingError is a RuntimeError
        print(f"train/evaluate.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    end_with_reader()
    if options.json:
        print(json.dumps(result))
    else:
        show(result)
    for message in result["broken"]:
        print(f"train/evaluate.py: left out: {message}", file=sys.stderr)
    return 1 if result["broken"] else 0


if __name__ == "__main__":
    sys.exit(main())
