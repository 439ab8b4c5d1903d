"""Where pictures come from: image folders, tar files, WebDataset shards and Hugging Face data sets, by timm's readers.

    FOLDER              a subfolder of pictures a class; or such folders in train/, val/ (validation/, valid/, test/)
    FILE.tar            the same as a tar file; or a folder that holds train.tar and val.tar
    wds/FOLDER          WebDataset shards and their _info.json; or the shards as the split: "part-{000..031}.tar|40000"
    hfds/NAME           a data set of the Hugging Face Hub; hfds/FOLDER is one on this machine

`open_source` and `open_pair` check what they open and say in one line what is wrong with it; `MapSamples` and
`StreamSamples` give the decoded, transformed pictures to PyTorch's DataLoader.
"""

import os
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from timm.data import ImageDataset, create_dataset
from timm.data.readers import img_extensions

from train.data.formats import (
    SPLITS,
    SYNONYMS,
    check_known,
    check_tar,
    find_split,
    listed,
    load_hugging_face,
    open_hugging_face,
    open_stream,
    stream_info,
)
from train.data.samples import MapSamples, Source, StreamSamples, sample_seed
from train.errors import DataError

__all__ = ["MapSamples", "Source", "StreamSamples", "open_pair", "open_source", "sample_seed"]

# timm looks for JPEG and PNG alone, and would pass over a folder's other pictures without a word.
img_extensions.set_img_extensions(
    (*img_extensions.get_img_extensions(), ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic", ".heif", ".tga")
)


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
        raise DataError(f"{source.name} holds pictures of one class only; a classifier needs two or more")
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
    """The training set and the held-out set of ``data``, which never overlap and have the same classes.

    Where the data has no validation split, ``hold_out`` (a share, above 0 and below 1) of each class is kept from the
    training set: at least one picture of a class that has two or more, chosen by ``seed``. Raises DataError.
    """
    training = open_source(data, train_split, training=True, seed=seed, samples=samples, classes=classes)
    if _has_split(data, val_split):
        unnamed = training.streaming or training.classes[0] == "class 0"  # indices alone say little about a split
        held_out = open_source(data, val_split, classes=training.classes if unnamed else classes)
        if held_out.name == training.name:
            raise DataError(f"{training.name} is both the training and the validation split; give two splits")
        _check_same_classes(training, held_out)
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


def _check_same_classes(training: Source, held_out: Source) -> None:
    if training.classes == held_out.classes:
        return
    parts = [
        f"{', '.join(sorted(mine - theirs)[:5])} only in {name}"
        for mine, theirs, name in (
            (set(training.classes), set(held_out.classes), training.name),
            (set(held_out.classes), set(training.classes), held_out.name),
        )
        if mine - theirs
    ]
    raise DataError(f"the classes of the two splits differ: {'; '.join(parts) or 'their order'}")


def _has_split(data: str, split: str) -> bool:
    """Whether ``data``, which was opened before, has the split. Raises DataError if a special one was asked for."""
    if data.startswith("wds/"):
        names = stream_info(data.removeprefix("wds/")).get("splits", {})
        found = ".tar" in split or find_split(split, names) is not None
    else:
        name = data.removeprefix("hfds/")
        names = (
            _file_splits(Path(data).expanduser(), split)
            if name == data
            else load_hugging_face(os.path.expanduser(name))
        )
        found = find_split(split, names) is not None
    if not found and split not in SYNONYMS[1]:
        raise DataError(f"{data} has no split {split!r}{listed(names)}")
    return found


# Folders and tar files


def _file_splits(root: Path, split: str) -> dict[str, Path]:
    """Folders with class folders in them, and tar files, that are named like a split."""
    found = {}
    for name in dict.fromkeys((*SPLITS, split)):
        folder, tar = root / name, root / f"{name}.tar"
        if folder.is_dir() and any(entry.is_dir() for entry in os.scandir(folder)):
            found[name] = folder
        elif tar.is_file():
            found[name] = tar
    return found


def _open_files(data: str, split: str, classes: tuple[str, ...] | None) -> Source:
    root = Path(data).expanduser()
    if not root.exists():
        raise DataError(f"{data} does not exist; give a folder of pictures, a .tar file, wds/FOLDER or hfds/NAME")
    if not (root.is_dir() or (root.is_file() and root.suffix == ".tar")):
        raise DataError(f"{data} is neither a folder nor a .tar file (which must not be compressed)")
    name, splits = root.resolve().name, _file_splits(root, split)
    if (chosen := find_split(split, splits)) is not None:
        root, name = splits[chosen], f"{name}/{splits[chosen].name}"
    elif splits or split not in SPLITS:
        raise DataError(f"{data} has no split {split!r} with a subfolder a class{listed(splits)}")
    if root.is_file():
        check_tar(root)
    dataset = _create_from_files(root)
    found = tuple(dataset.reader.class_to_idx if root.is_dir() else dataset.reader.class_name_to_idx)
    loose = [label for label in found if label in ("", *SPLITS)]
    if "" in found or len(loose) == len(found):
        raise DataError(f"{root} holds pictures that are in no class's folder; put each in a subfolder named by class")
    if classes is None or found == classes:
        return Source(name, found, dataset)
    check_known(name, found, classes)
    return Source(name, classes, _create_from_files(root, {label: index for index, label in enumerate(classes)}))


def _create_from_files(root: Path, class_map: dict[str, int] | None = None) -> ImageDataset:
    # Without the cache no open file is shared by worker processes, which would move each other's position in it.
    options = {} if root.is_dir() else {"cache_tarfiles": False}
    try:
        return create_dataset("", str(root), search_split=False, class_map=class_map, **options)
    except tarfile.TarError as error:
        raise DataError(f"{root} is no tar file, or is damaged ({error}); save or download it again") from error
    except OSError as error:
        raise DataError(f"{root} cannot be read ({error.strerror or error})") from error
    except (RuntimeError, ValueError) as error:  # what the readers of folders and of tar files raise for no picture
        formats = ", ".join(img_extensions.get_img_extensions())
        raise DataError(f"{root} holds no pictures ({formats})") from error
