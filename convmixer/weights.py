"""Checkpoints: one file that holds a network and everything needed to use it.

``model.safetensors`` has tensors under timm's names and one metadata entry, ``convmixer``, which is JSON with the keys
format_version, name, architecture, labels, preprocessing, training and accuracy.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
from safetensors.numpy import save

from .config import ConvMixerConfig
from .guess import checkpoint_in, guess, name_of, read_config
from .preprocessing import Preprocessing
from .readers import (
    METADATA_KEY,
    CheckpointError,
    checked_tensors,
    error_summary,
    read_metadata,
    read_tensors,
)

FORMAT_VERSION = 1


@dataclass(frozen=True, eq=False)  # eq=False: comparing arrays does not give one truth value
class Checkpoint:
    """A network and how to use it. Raises CheckpointError when the fields do not belong together."""

    name: str  # shown with every answer, such as "convmixer_256_8_cifar10"
    config: ConvMixerConfig
    state_dict: dict[str, np.ndarray]  # under timm's names, float32 (batch counters int64)
    labels: tuple[str, ...]  # one for each class, in index order
    preprocessing: Preprocessing
    training: dict  # JSON values: recipe, data, epochs, seed, commit; {} if unknown
    accuracy: dict  # JSON values: top1 and top5 in percent, data, images; {} if unknown
    assumed: tuple[str, ...] = ()  # what nobody says and was guessed, such as "GELU" or "32 pixels"; not saved

    def __post_init__(self):
        if not isinstance(self.name, str) or not self.name:
            raise CheckpointError(f"the model's name is {self.name!r:.80}; it must be a text")
        if not isinstance(self.labels, tuple) or not all(isinstance(label, str) for label in self.labels):
            raise CheckpointError("the labels must be a tuple of texts")
        if len(self.labels) != self.config.num_classes:
            raise CheckpointError(f"there are {len(self.labels)} labels for {self.config.num_classes} classes")
        if not isinstance(self.training, dict) or not isinstance(self.accuracy, dict):
            raise CheckpointError("training and accuracy must be dictionaries")


def save_checkpoint(path: str | os.PathLike, checkpoint: Checkpoint) -> None:
    """Write ``checkpoint`` as model.safetensors; its state_dict may also hold PyTorch's tensors, on any device
    and of any real number type.

    Raises CheckpointError for what load_checkpoint would refuse, such as weights that are NaN, and OSError when the
    file cannot be written. A file that was at ``path`` is then still there, unchanged.
    """
    description = {
        "format_version": FORMAT_VERSION,
        "name": checkpoint.name,
        "architecture": checkpoint.config.to_dict(),
        "labels": checkpoint.labels,
        "preprocessing": checkpoint.preprocessing.to_dict(),
        "training": checkpoint.training,
        "accuracy": checkpoint.accuracy,
    }
    try:
        tensors = checked_tensors(checkpoint.state_dict, checkpoint.config)
        content = save(tensors, metadata={METADATA_KEY: json.dumps(description)})
    except (CheckpointError, TypeError) as error:  # TypeError: a value that JSON does not know
        raise CheckpointError(f"{path}: not written; {error}") from error
    write_atomically(path, lambda file: file.write(content))


def write_atomically(path: str | os.PathLike, write: Callable[[BinaryIO], object]) -> None:
    """Have ``write`` fill a file that appears at ``path`` only once it is complete and on the disk.

    Whatever goes wrong, a full disk included, is raised as it is; a file that was at ``path`` then stays as it was.
    """
    path = Path(os.path.realpath(path))  # a symbolic link stays one and leads to the new content
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}.tmp")  # same folder: renames do not cross disks
    try:
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if hasattr(os, "O_DIRECTORY"):  # POSIX: a rename survives a power cut only once its folder is on the disk
        folder = os.open(path.parent, os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def load_checkpoint(
    path: str | os.PathLike, *, assume: Checkpoint | None = None, labels: Sequence[str] | None = None
) -> Checkpoint:
    """Read model.safetensors, timm's .safetensors, .pth and .pt, or the authors' .pth.tar, whatever the file is called;
    or the best of these in a folder that timm or train/run.py wrote.

    ``assume`` describes a file that holds nothing but tensors (its own state_dict is not used), and any file must then
    have its architecture. Without it such a file is described by the ``config.json`` beside it, by what timm's train.py
    keeps in its checkpoints, and for the rest by `convmixer.guess.guess`, which notes that in ``assumed``. ``labels``,
    one for each class, come before all others.
    Of a training checkpoint the averaged weights, ``state_dict_ema``, come before ``state_dict``, because a training
    that averages reports the accuracy of the average.

    safetensors files and zipped pickles are memory-mapped. The checkpoint does not mind the file being replaced or
    removed, only being overwritten in place.

    Raises CheckpointError when the file cannot be read or is not a whole, finite ConvMixer. No code in it is run.
    """
    name, path = name_of(Path(path)), Path(path)
    path = checkpoint_in(path) if os.path.isdir(path) else path
    try:
        tensors, metadata, facts = read_tensors(path)
        described = _parse(metadata) if metadata is not None else assume or _guess(name, path, tensors, facts, labels)
        if assume and described.config != assume.config:
            raise CheckpointError(f"holds {described.config}, not {assume.config}")
        if labels is not None:
            described = replace(described, labels=tuple(labels))
        return replace(described, state_dict=checked_tensors(tensors, described.config))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def read_description(path: str | os.PathLike) -> Checkpoint | None:
    """What a safetensors file says about itself, with an empty state_dict; None when it holds nothing but tensors.

    No tensor is read, so this is fast however large the file is. Raises CheckpointError when the file cannot be read.
    """
    try:
        metadata = read_metadata(Path(path))
        return None if metadata is None else _parse(metadata)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _parse(metadata: str) -> Checkpoint:
    """The description of a checkpoint, its state_dict empty, from our metadata entry."""
    try:
        fields = json.loads(metadata)
        version = fields["format_version"]
        if version != FORMAT_VERSION:
            raise CheckpointError(f"has format version {version!r:.80}; this release reads version {FORMAT_VERSION}")
        return Checkpoint(
            name=fields["name"],
            config=ConvMixerConfig(**fields["architecture"]),
            state_dict={},
            labels=tuple(fields["labels"]),
            preprocessing=Preprocessing.from_dict(fields["preprocessing"]),
            training=fields["training"],
            accuracy=fields["accuracy"],
        )
    except CheckpointError:
        raise
    except KeyError as missing:
        raise CheckpointError(f"has damaged metadata: {missing} is missing") from missing
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"has damaged metadata: {error_summary(error)}") from error


def _guess(name: str, path: Path, tensors: dict, facts: dict, labels: Sequence[str] | None) -> Checkpoint:
    """The likely description of a file that holds nothing but tensors and ``facts``, as load_checkpoint documents."""
    fields = guess(tensors, facts | read_config(path.parent), labels)
    return Checkpoint(name, state_dict={}, training={}, accuracy={}, **fields)
