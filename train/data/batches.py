"""The pictures of a run: small sets in memory, on the device that trains; large ones read by worker processes."""

import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.data import ImageNetInfo, create_transform
from torch import Tensor

from convmixer.images import load_image
from convmixer.labels import imagenet_labels, read_labels
from convmixer.preprocessing import Preprocessing, resize_and_crop
from train.data.augment import Chances, augment, draw, together
from train.data.cifar import LabelledImages, find_layout, load_cifar, split_cifar
from train.data.loader import batches_of, read_with_workers
from train.data.samples import MapSamples, Source, StreamSamples
from train.data.sources import open_pair
from train.distributed import World
from train.errors import TrainingError
from train.plan import Plan, epoch_order
from train.recipe import Recipe

TOGETHER = 11_264  # pictures that a GPU augments at once: 22 batches of CIFAR's recipes, 35 MB as they are stored


@dataclass(frozen=True)
class Part:
    """What goes through the network at once: pictures uint8 (n, 3, H, W), labels int64 (n,), both on the device."""

    images: Tensor
    labels: Tensor
    broken: tuple[str, ...] = ()  # messages about pictures that were left out


@dataclass(frozen=True)
class Data:
    """What a run trains and measures on."""

    training: "MemoryBatches | SourceBatches | StreamBatches"
    training_name: str
    # Batch size, and what is told of each broken picture -> this process's share.
    held_out_batches: Callable[..., Iterator[tuple[Tensor, Tensor]]]
    held_out_name: str
    labels: tuple[str, ...]  # of the classes, in index order
    short_name: str  # of the data, as a part of the model's name
    training_counts: list[int] | None  # pictures of each class; None where they were not counted
    held_out_counts: list[int] | None
    held_out_images: int
    notes: tuple[str, ...] = ()  # what was left out of the data, for the user
    # The training pictures as held_out_batches gives the others, each once and as it is; None for a stream.
    plain: Callable[..., Iterator[tuple[Tensor, Tensor]]] | None = None

    def facts(self) -> dict:
        """What a resumed run must have the same of, as JSON values."""
        return {"labels": list(self.labels), "training": self.training_counts, "held_out": self.held_out_counts}


def open_data(run, recipe: Recipe, world: World) -> Data:
    """The data that the command line (train/run.py) names. Raises DataError and TrainingError before any epoch."""
    if find_layout(run.data) or run.download:
        return open_cifar(run, recipe, world)
    classes = run.class_names and read_labels(run.class_names)
    options = {"seed": recipe.seed, "samples": run.samples, "classes": classes}
    training, held_out = open_pair(run.data, run.train_split, run.val_split, recipe.hold_out, **options)
    if recipe.augmentation.ra_n:
        raise TrainingError(
            "--augmentation.ra-n is for CIFAR in memory; for pictures read from disk give --augmentation.ra-n 0, and"
            " --augmentation.aa rand-m9-mstd0.5-inc1 or another policy of timm's"
        )
    kind = StreamBatches if training.streaming else SourceBatches
    name = re.sub(r"[^a-z0-9]+", "_", Path(run.data).resolve().name.lower().removesuffix(".tar")).strip("_")
    notes = training.notes  # of the whole folder, where a part of it is held out
    if training.reader is not held_out.reader:
        notes = tuple(f"{source.name}: {note}" for source in (training, held_out) for note in source.notes)
    return Data(
        training=kind(training, recipe, world, run.workers),
        training_name=training.name,
        held_out_batches=HeldOut(held_out, recipe.preprocessing, world, run.workers),
        held_out_name=held_out.name,
        labels=readable(training.classes),
        short_name=name or "pictures",
        training_counts=training.counts(),
        held_out_counts=held_out.counts(),
        held_out_images=len(held_out),
        notes=notes,
        plain=None if training.streaming else HeldOut(training, recipe.preprocessing, world, run.workers),
    )


def open_cifar(run, recipe: Recipe, world: World) -> Data:
    """CIFAR-10 or CIFAR-100 in memory. Raises DataError and TrainingError."""
    if run.class_names:
        raise TrainingError("CIFAR names its classes itself; leave out --class-names")
    training_set = load_cifar(run.data, train=True, download=run.download)
    if recipe.preprocessing.size != training_set.images.shape[1]:
        raise TrainingError(
            f"the recipe takes pictures of {recipe.preprocessing.size} pixels and CIFAR's have 32; choose a cifar"
            " recipe, or give --preprocessing.size 32"
        )
    if recipe.augmentation.aa:
        raise TrainingError("--augmentation.aa is for pictures read from disk; CIFAR takes --augmentation.ra-n 2")
    test_set = load_cifar(run.data, train=False) if recipe.split == "full" else None
    training_set, held_out = split_cifar(training_set, recipe.split, test_set)
    return Data(
        training=MemoryBatches(training_set, recipe, world, run.ahead),
        training_name=training_set.name,
        held_out_batches=lambda n, *_: memory_batches(held_out, recipe.preprocessing, world, n),
        held_out_name=held_out.name,
        labels=training_set.classes,
        short_name=f"cifar{len(training_set.classes)}",
        training_counts=training_set.counts(),
        held_out_counts=held_out.counts(),
        held_out_images=len(held_out),
        plain=lambda n, *_: memory_batches(training_set, recipe.preprocessing, world, n),
    )


def readable(classes: tuple[str, ...]) -> tuple[str, ...]:
    """ImageNet's synsets, such as n01440764, as the labels that they stand for; other names as they are."""
    index = {synset: i for i, synset in enumerate(ImageNetInfo().label_names())}
    return tuple(imagenet_labels()[index[name]] for name in classes) if set(classes) <= index.keys() else classes


def part_rng(seed: int, epoch: int, step: int, part: int) -> np.random.Generator:
    """The random numbers of one part of a step. ``part`` counts over all processes.

    They depend on nothing that went before, so that a resumed run draws the same, however it was cut.
    """
    return np.random.default_rng((seed, epoch, step, part, 1))


class MemoryBatches:
    """An in-memory set on the device that trains; each part is augmented there as a whole, or several at once.

    ahead: parts that are augmented together, by default as many as suit the device. What comes out is the same; a GPU
    gets fewer and larger operations.
    """

    def __init__(self, data: LabelledImages, recipe: Recipe, world: World, ahead: int | None = None):
        self.recipe, self.world = recipe, world
        self.ahead = ahead or (1 if world.device.type == "cpu" else max(1, TOGETHER // recipe.micro_batch))
        self.plan = Plan(len(data), recipe.batch_size, recipe.micro_batch, recipe.drop_last, world.size)
        self.images = torch.from_numpy(data.images).permute(0, 3, 1, 2).contiguous().to(world.device)
        self.labels = torch.from_numpy(data.labels).to(world.device)

    def parts(self, epoch: int, first_step: int) -> Iterator[Part]:
        """This process's parts of the epoch in order, from ``first_step`` on."""
        order = torch.from_numpy(epoch_order(self.plan.images, self.recipe.seed, epoch)).to(self.world.device)
        coming = self._drawn(epoch, first_step)
        while group := list(itertools.islice(coming, self.ahead)):
            chosen = torch.cat([order[stretch] for stretch, _ in group])
            chances = together([drawn for _, drawn in group])
            images = augment(self.images[chosen], self.recipe.augmentation, chances)
            sizes = [stretch.stop - stretch.start for stretch, _ in group]
            yield from itertools.starmap(Part, zip(images.split(sizes), self.labels[chosen].split(sizes), strict=True))

    def _drawn(self, epoch: int, first_step: int) -> Iterator[tuple[slice, Chances]]:
        """Where each part stands in the epoch's order, and what is to happen to its pictures."""
        augmentation, size = self.recipe.augmentation, self.images.shape[2]
        for step in range(first_step, self.plan.steps):
            stretches = self.plan.parts(step, self.world.rank)
            for number, stretch in enumerate(stretches):
                rng = part_rng(self.recipe.seed, epoch, step, self.world.rank * len(stretches) + number)
                yield stretch, draw(stretch.stop - stretch.start, size, augmentation, rng)


def memory_batches(data: LabelledImages, preprocessing: Preprocessing, world: World, batch_size: int):
    """This process's share in order, each picture once: (normalised float32 (n, 3, H, W), int64 labels (n,))."""
    for start in range(0, len(data), batch_size * world.size):
        mine = slice(start + world.rank, start + batch_size * world.size, world.size)
        images = torch.from_numpy(data.images[mine]).permute(0, 3, 1, 2)
        if len(images):
            yield normalise(images.to(world.device), preprocessing), torch.from_numpy(data.labels[mine])


def normalise(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """uint8 (N, 3, H, W) to float32 of the same shape, memory format and device, normalised."""
    mean, std = (
        torch.tensor(v, device=images.device).view(1, 3, 1, 1) for v in (preprocessing.mean, preprocessing.std)
    )
    return (images.float() / 255 - mean) / std


def training_transform(recipe: Recipe) -> Callable[[Image.Image], np.ndarray]:
    """timm's transform for training: a picture to uint8 (3, size, size)."""
    augmentation, size = recipe.augmentation, recipe.preprocessing.size
    return create_transform(
        (3, size, size),
        is_training=True,
        use_prefetcher=True,  # without normalisation and erasing, which train/loop.py does on the device
        scale=(augmentation.scale, 1.0),
        ratio=augmentation.ratio,
        hflip=augmentation.flip,
        color_jitter=augmentation.jitter or None,
        auto_augment=augmentation.aa or None,
        interpolation=augmentation.interpolation,
        mean=recipe.preprocessing.mean,
        std=recipe.preprocessing.std,
    )


class SourceBatches:
    """Pictures that timm's readers find by index, decoded and augmented by worker processes."""

    def __init__(self, source: Source, recipe: Recipe, world: World, workers: int):
        self.recipe, self.world = recipe, world
        self.plan = Plan(len(source), recipe.batch_size, recipe.micro_batch, recipe.drop_last, world.size)
        samples = MapSamples(source, training_transform(recipe), recipe.seed, replace_broken=True)
        self.stretches: list[list[tuple[int, int]]] = []  # of (epoch, index), one a part; filled before each epoch
        self.loader = read_with_workers(samples, workers, batch_sampler=self.stretches, persistent_workers=workers > 0)

    def parts(self, epoch: int, first_step: int) -> Iterator[Part]:
        """This process's parts of the epoch in order, from ``first_step`` on."""
        order = epoch_order(self.plan.images, self.recipe.seed, epoch).tolist()
        self.stretches[:] = [
            [(epoch, index) for index in order[stretch]]
            for step in range(first_step, self.plan.steps)
            for stretch in self.plan.parts(step, self.world.rank)
        ]
        for images, labels, broken in batches_of(self.loader):
            yield on_device(images, labels, broken, self.world)


class StreamBatches:
    """Pictures that come in the order of their shards. Each process reads its own; a resumed epoch reads past them."""

    def __init__(self, source: Source, recipe: Recipe, world: World, workers: int):
        self.world = world
        self.plan = Plan(len(source), recipe.batch_size, recipe.micro_batch, True, world.size)
        sizes = {part.stop - part.start for rank in range(world.size) for part in self.plan.parts(0, rank)}
        if len(sizes) > 1:
            raise TrainingError(
                f"a stream gives parts of one size: {recipe.batch_size} pictures do not divide into equal parts of at"
                f" most {recipe.micro_batch} for {world.size} processes; choose another --batch-size"
            )
        (size,) = sizes
        self.samples = StreamSamples(
            source, training_transform(recipe), recipe.seed, batch_size=size, rank=world.rank, world=world.size
        )
        shards = len(self.samples.reader.split_info.filenames)
        workers = min(workers, shards // world.size)
        self.samples.steps(workers)  # raises DataError where there are too few shards
        self.loader = read_with_workers(self.samples, workers, batch_size=size, persistent_workers=workers > 0)

    def parts(self, epoch: int, first_step: int) -> Iterator[Part]:
        """This process's parts of the epoch in order, from ``first_step`` on."""
        self.samples.set_epoch(epoch)
        in_a_step = len(self.plan.parts(0, self.world.rank))
        first, end = first_step * in_a_step, self.plan.steps * in_a_step
        for images, labels, broken in itertools.islice(batches_of(self.loader), first, end):
            yield on_device(images, labels, broken, self.world)


def on_device(images: Tensor, labels: Tensor, broken: tuple[str, ...], world: World) -> Part:
    device = world.device
    return Part(images.to(device, non_blocking=True), labels.to(device, non_blocking=True), broken)


@dataclass(frozen=True)
class Prepared:
    """The preprocessing of every door up to the normalisation: an RGB image to uint8 (3, size, size), as it travels."""

    preprocessing: Preprocessing

    def __call__(self, image: Image.Image) -> np.ndarray:
        return np.asarray(resize_and_crop(image, self.preprocessing)).transpose(2, 0, 1).copy()


class HeldOut:
    """The held-out pictures of a source, each once over all processes; broken ones are left out."""

    def __init__(self, source: Source, preprocessing: Preprocessing, world: World, workers: int):
        self.source, self.preprocessing, self.world, self.workers = source, preprocessing, world, workers
        prepared, decode = Prepared(preprocessing), partial(load_image, target_size=preprocessing.resize)
        if source.streaming:
            self.samples = StreamSamples(source, prepared, 0, rank=world.rank, world=world.size, decode=decode)
        else:
            self.samples = MapSamples(source, prepared, 0, replace_broken=False, decode=decode)

    def __call__(self, batch_size: int, skipped: Callable[[str], None] | None = None) -> Iterator:
        options = {"batch_size": batch_size}
        if not self.source.streaming:
            options["sampler"] = [(0, i) for i in range(self.world.rank, len(self.source), self.world.size)]
        for images, labels, broken in batches_of(read_with_workers(self.samples, self.workers, **options)):
            for message in broken if skipped else ():
                skipped(message)
            if len(labels):
                yield normalise(images.to(self.world.device, non_blocking=True), self.preprocessing), labels
