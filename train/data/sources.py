"""Where pictures come from: image folders, tar files, WebDataset shards and Hugging Face data sets.

    FOLDER              a subfolder of pictures a class; or such folders in train/, val/ (validation/, valid/, test/)
    FILE.tar            the same as a tar file, or FILE.tar/FOLDER in it; or a folder that holds train.tar and val.tar
    wds/FOLDER          WebDataset shards and their _info.json; or the shards as the split: "part-{000..031}.tar|40000"
    hfds/NAME           a data set of the Hugging Face Hub; hfds/FOLDER is one on this machine

`open_source` and `open_pair` check what they open and say in one line what is wrong with it; `MapSamples` and
`StreamSamples` give the decoded, transformed pictures to PyTorch's DataLoader.
"""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from train.data.folders import (
    SPLITS,
    SYNONYMS,
    Files,
    file_splits,
    find_split,
    listed,
    open_tree,
    some,
    sort_by_class,
    split_path,
)
from train.data.formats import check_known, load_hugging_face, open_hugging_face, open_stream, stream_info
from train.data.samples import MapSamples, Source, StreamSamples
from train.errors import DataError

__all__ = ["MapSamples", "Source", "StreamSamples", "open_pair", "open_source"]


def open_source(
    data: str,
    split: str,
    *,
    training: bool = False,
    seed: int = 0,
    samples: int | None = None,
    classes: tuple[str, ...] | None = None,
) -> Source:
    """The pictures of one split of ``data``, in the forms that the head of this file lists.

    A folder or tar file without splits in it is taken whole. split: its name, or another common name of the same thing
    ("val", "validation", "valid"). training: a stream is shuffled and goes on to whole batches, and data of a single
    class is refused. seed: of a stream's order. samples: how many a stream holds, if its own count is wrong or absent.
    classes: the names that the indices stand for; without them the data's own in sorted order. Raises DataError.
    """
    data = os.fspath(data)
    if data.startswith("wds/"):
        source = open_stream(data.removeprefix("wds/"), split, training, seed, samples, classes)
    elif data.startswith("hfds/"):
        source = open_hugging_face(os.path.expanduser(data.removeprefix("hfds/")), split, classes)
    else:
        source = _open_files(data, split, classes)
    if training and len(source.classes) < 2:
        only = source.classes[0]
        below = source.reader.tree.subfolders(only) if isinstance(source.reader, Files) else ()
        meant = f"; if {some(below)} are the classes, give {source.reader.tree.name}/{only}" if len(below) > 1 else ""
        raise DataError(
            f"{source.name} holds pictures of one class only, {only}; a classifier needs two or more{meant}"
        )
    return source


def open_pair(
    data: str,
    train_split: str = "train",
    val_split: str = "val",
    hold_out: float = 0.1,
    *,
    seed: int = 0,
    samples: int | None = None,
    classes: tuple[str, ...] | None = None,
) -> tuple[Source, Source]:
    """The training set and the held-out set of ``data``, which never overlap, with the training set's classes.

    Where the data has no validation split, ``hold_out`` (a share, above 0 and below 1) of each class is kept from the
    training set: at least one picture of a class that has two or more, chosen by ``seed``. A validation split may lack
    classes and must have no others. Raises DataError.
    """
    training = open_source(data, train_split, training=True, seed=seed, samples=samples, classes=classes)
    if _has_split(data, val_split):
        held_out = open_source(data, val_split, classes=training.classes)
        if held_out.name == training.name:
            raise DataError(f"{training.name} is both the training and the validation split; give two splits")
        return training, held_out
    if training.streaming:
        raise DataError(f"{data} has no split {val_split!r}; a part of a stream cannot be held out, so name its split")
    if not 0 < hold_out < 1:
        raise DataError(f"the share to hold out is {hold_out}; it must be above 0 and below 1")
    held = _held_out_positions(training.labels(), hold_out, seed)
    if not len(held):
        raise DataError(f"{training.name} has one picture a class; there is none to hold out")
    rest = np.setdiff1d(np.arange(len(training)), held)
    share = f"hold-out ({100 * hold_out:g} % of each class, seed {seed})"
    return (
        replace(training, name=f"{training.name} without the {share}", indices=rest),
        replace(training, name=f"{training.name}, {share}", indices=held),
    )


def _held_out_positions(labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    held = [np.empty(0, np.int64)]
    for index in np.unique(labels):
        members = np.random.default_rng((seed, int(index))).permutation(np.flatnonzero(labels == index))
        held.append(members[: min(len(members) - 1, max(1, round(share * len(members))))])
    return np.sort(np.concatenate(held))


def _has_split(data: str, split: str) -> bool:
    """Whether ``data``, which was opened before, has the split. Raises DataError if a special one was asked for."""
    if data.startswith("wds/"):
        names = stream_info(data.removeprefix("wds/")).get("splits", {})
        found = ".tar" in split or find_split(split, names) is not None
    else:
        name = data.removeprefix("hfds/")
        names = file_splits(data, split) if name == data else load_hugging_face(os.path.expanduser(name))
        found = find_split(split, names) is not None
    if not found and split not in SYNONYMS[1]:
        raise DataError(f"{data} has no split {split!r}{listed(names)}")
    return found


# Folders and tar files


def _open_files(data: str, split: str, classes: tuple[str, ...] | None) -> Source:
    root, inside = split_path(data)
    if not root.exists():
        raise DataError(f"{data} does not exist; give a folder of pictures, a .tar file, wds/FOLDER or hfds/NAME")
    if not (root.is_dir() or (root.is_file() and root.suffix == ".tar")):
        raise DataError(f"{data} is neither a folder nor a .tar file (which must not be compressed)")
    name, splits = "/".join(filter(None, (root.resolve().name, inside))), file_splits(data, split)
    if (chosen := find_split(split, splits)) is not None:
        data = splits[chosen]
        name = f"{name}/{Path(data).name}"
    elif splits or split not in SPLITS:
        raise DataError(f"{data} has no split {split!r} with a subfolder a class{listed(splits)}")
    files, found, notes = sort_by_class(open_tree(data), classes)
    if classes is not None:
        check_known(name, found, classes)
    return Source(name, classes or found, files, notes=notes)
