"""A source of labelled pictures, and its samples for PyTorch's DataLoader; broken pictures are named and do no harm."""

import contextlib
import logging
import os
import random
import re
import sys
import traceback
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from convmixer.images import ImageError, load_image
from train.data.folders import Files
from train.errors import DataError

BROKEN_IN_A_ROW = 10  # after so many the data is wrong, not a picture

Sample = tuple[object, int, tuple[str, ...]]  # transformed picture or None, label, names of broken pictures met


def sample_seed(seed: int, epoch: int, index: int) -> int:
    """The seed of one sample's random choices in one epoch, of 32 bits."""
    return int(np.random.SeedSequence((seed, epoch, index)).generate_state(1)[0])


def seed_generators(state: int) -> None:
    """Seeds the three global generators that timm's and torchvision's transforms draw from."""
    torch.default_generator.manual_seed(state)
    random.seed(state)
    np.random.seed(state)


def reason_of(error: BaseException) -> str:
    """Why a file could not be read, in a few words on one line."""
    if isinstance(error, UnidentifiedImageError):
        return "empty, or not a picture"
    reason = getattr(error, "strerror", None) or str(error.args[0] if error.args else error)
    return " ".join(reason.split())[:200] or type(error).__name__


def data_error_line(error: DataError) -> str:
    """The message alone, also where a worker process raised it and PyTorch wrote the traceback into it."""
    return str(error).strip().splitlines()[-1].removeprefix(f"{DataError.__module__}.DataError: ")


@contextlib.contextmanager
def _quiet_pillow() -> Iterator[None]:
    with warnings.catch_warnings():  # about metadata, or sizes that can still be decoded
        warnings.simplefilter("ignore")
        yield


def as_timm(picture) -> Image.Image:
    """A picture, as a file object or image, decoded as timm does: to RGB, whatever its colour profile and orientation.

    What timm cannot read, such as HEIC, is decoded as every door does. Raises anything for a damaged one.
    """
    with _quiet_pillow():
        try:
            return (picture if isinstance(picture, Image.Image) else Image.open(picture)).convert("RGB")
        except UnidentifiedImageError:
            return load_image(picture)


@dataclass(frozen=True, eq=False)
class Source:
    """Labelled pictures behind a reader of timm's or one like it; those of a stream come in the reader's order only."""

    name: str  # said beside every accuracy, such as "flowers/train"
    classes: tuple[str, ...]  # in index order; "class 0", ... where the data names none
    reader: object  # `train.data.folders.Files`, timm's ReaderHfds, or for a stream its ReaderWds
    indices: np.ndarray | None = None  # int64, the part of a data set read by index; None: all of it
    streaming: bool = False
    counted: Counter | None = None  # of a stream's labels, where they were counted
    notes: tuple[str, ...] = ()  # what was left out of the data, for the user

    def __len__(self) -> int:
        if self.streaming:
            return self.reader.num_samples
        return len(self.reader) if self.indices is None else len(self.indices)

    def position(self, index: int) -> int:
        """Where the reader has picture ``index`` of this source."""
        return index if self.indices is None else int(self.indices[index])

    def filename(self, index: int) -> str:
        """What to call picture ``index`` in a message. Not for streams."""
        position = self.position(index)
        return self.reader.filename(position, absolute=True) or f"picture {position} of {self.name}"

    def labels(self) -> np.ndarray:
        """Class indices, int64 (N,), read without decoding a picture. Not for streams."""
        labels = reader_labels(self.reader)
        return labels if self.indices is None else labels[self.indices]

    def counts(self) -> list[int] | None:
        """How many pictures each class has, in index order; None for a stream that was not counted."""
        if not self.streaming:
            return np.bincount(self.labels(), minlength=len(self.classes)).tolist()
        return self.counted and [self.counted[index] for index in range(len(self.classes))]


def reader_labels(reader) -> np.ndarray:
    if isinstance(reader, Files):
        return reader.labels
    labels = reader.iter_targets() if reader.remap_class else column_values(reader.dataset, reader.label_key)
    return np.fromiter(labels, np.int64, len(reader))


def column_values(table, name: str) -> list:
    return table.select_columns(name).with_format("arrow")[:][name].to_pylist()


class MapSamples(Dataset):
    """Samples of a source that is read by index: (transformed picture, label, names of broken pictures).

    All random choices of a sample come from (seed, epoch, index) alone, so neither the number of workers nor the moment
    at which a run was resumed changes them. The next picture that can be decoded takes the place of a broken one with
    ``replace_broken``; without it the picture is None. Raises DataError for many broken ones in a row.

    decode: gives the RGB image of a file object; `load_image`, as every door does, or `as_timm`.
    """

    def __init__(
        self,
        source,
        transform: Callable,
        seed: int,
        replace_broken: bool,
        decode: Callable[..., Image.Image] = load_image,
    ):
        self.source, self.transform, self.seed, self.replace_broken = source, transform, seed, replace_broken
        self.decode = decode

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, epoch_and_index: tuple[int, int]) -> Sample:
        epoch, index = epoch_and_index
        broken: list[str] = []
        for candidate in range(index, index + BROKEN_IN_A_ROW):
            candidate %= len(self)
            image, label = self._read(candidate, broken)
            if image is not None:
                seed_generators(sample_seed(self.seed, epoch, index))
                return self.transform(image), label, tuple(broken)
            if not self.replace_broken:
                return None, label, tuple(broken)
        raise DataError(f"{self.source.name}: {BROKEN_IN_A_ROW} pictures in a row are broken, the last is {broken[-1]}")

    def _read(self, index: int, broken: list[str]) -> tuple[Image.Image | None, int]:
        label = -1
        try:
            stream, label = self.source.reader[self.source.position(index)]
            with stream:
                return self.decode(stream), int(label)
        except Exception as error:  # damaged data makes Pillow raise nearly every type there is
            broken.append(f"{self.source.filename(index)}: {reason_of(error)}")
            return None, int(label)


class StreamSamples(IterableDataset):
    """Samples of a stream, as MapSamples gives them; the names of the last broken ones come with a picture None.

    Opened for training, each worker of each process gives the same number of samples, a multiple of ``batch_size``,
    from its own share of the shards; the order comes from (seed, epoch, worker), a picture's random choices from (seed,
    epoch, its pixels). Opened for evaluation, every shard is read by one worker of one process only, so each picture
    comes exactly once, whatever the number of workers and processes; the processes may get different numbers.

    rank, world: this process's number and how many there are. decode: as in MapSamples, but of what timm's reader has
    made RGB, with EXIF and colour profile beside it. Raises DataError.
    """

    def __init__(
        self,
        source,
        transform: Callable,
        seed: int,
        *,
        batch_size: int = 1,
        rank: int = 0,
        world: int = 1,
        decode: Callable[..., Image.Image] = load_image,
    ):
        self.source, self.transform, self.seed, self.rank, self.world = source, transform, seed, rank, world
        self.decode = decode
        self.reader = source.reader
        self.reader.batch_size = batch_size
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """To be called before each epoch; persistent workers hear of it through shared memory."""
        self.reader.set_epoch(epoch)

    def steps(self, workers: int) -> int:
        """Batches that each process gets in an epoch of training. Raises DataError for more workers than shards."""
        everyone = self.world * max(1, workers)
        self._check_shards(everyone)
        a_worker = -(-self.reader.num_samples // everyone)
        return max(1, workers) * -(-a_worker // self.reader.batch_size)

    def _check_shards(self, everyone: int) -> None:
        shards = len(self.reader.split_info.filenames)
        if self.reader.is_training and everyone > shards:
            raise DataError(
                f"{self.source.name} has {shards} shards, too few for {everyone} workers; use fewer workers a process"
            )

    def __iter__(self) -> Iterator[Sample]:
        epoch, log = self.reader.epoch_count.value, _BrokenLog(self.source.name)
        self._prepare_reader(epoch)
        given = 0
        with log.listening():
            samples = iter(self.reader)
            while True:
                with _quiet_pillow():
                    image, label = next(samples, (None, -1))
                if image is None:
                    break
                if not 0 <= label < len(self.source.classes):
                    raise DataError(f"{self.source.name} has the label {label} and {len(self.source.classes)} classes")
                seed_generators(sample_seed(self.seed, epoch, zlib.crc32(image.tobytes())))
                try:
                    image = self.decode(image)
                except ImageError as error:
                    log.broken.append(f"{self.source.name}: {reason_of(error)}")
                    continue
                yield self.transform(image), label, log.take()
                given += 1
        if self.reader.is_training and not given:
            raise DataError(f"{self.source.name}: no picture could be read, the first is {(*log.take(), 'missing')[0]}")
        if rest := log.take():
            yield None, -1, rest

    def _prepare_reader(self, epoch: int) -> None:
        """Gives timm's reader this worker's share and seed, so that an epoch does not depend on those before it."""
        worker, reader = get_worker_info(), self.reader
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        everyone, mine = self.world * workers, self.rank * workers + number
        self._check_shards(everyone)
        reader.ds = None  # timm builds it anew, from what follows
        reader.worker_info = worker or "none"  # with None it would replace what follows by PyTorch's
        reader.worker_seed = sample_seed(self.seed, epoch, mine)
        reader.global_worker_id, reader.global_num_workers = mine, everyone
        # With several processes timm repeats or drops samples to give each as many. Training wants that; evaluation
        # does not, so there the workers of all processes are presented as those of one.
        reader.dist_num_replicas = self.world if reader.is_training else 1


class _BrokenLog(logging.Handler):
    """Collects what timm's stream reader only logs: samples that it left out, as "shard.tar/key: reason"."""

    def __init__(self, name: str):
        super().__init__()
        self.name_of_data, self.broken = name, []

    def emit(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]  # the reader logs inside its except clause
        if error is not None:
            said = f"{self._where(error)}: {reason_of(error).split(' @ <')[0]}"  # webdataset adds the open file
            if said not in self.broken:  # a damaged shard is reported twice
                self.broken.append(said)

    def _where(self, error: BaseException) -> str:
        """The message does not say which sample it is about, but the traceback leads to it."""
        for frame, _ in traceback.walk_tb(error.__traceback__):
            sample = frame.f_locals.get("sample")
            if isinstance(sample, dict) and "__key__" in sample:
                return f"{os.path.basename(sample.get('__url__', self.name_of_data))}/{sample['__key__']}"
        shards = re.findall(r"[^/'\"]+\.tar", repr(error.args))
        return shards[-1] if shards else self.name_of_data

    def take(self) -> tuple[str, ...]:
        broken, self.broken = tuple(self.broken), []
        return broken

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        logger = logging.getLogger("timm.data.readers.reader_wds")
        propagate, logger.propagate = logger.propagate, False
        logger.addHandler(self)
        try:
            yield
        finally:
            logger.removeHandler(self)
            logger.propagate = propagate
