"""WebDataset shards and Hugging Face data sets, opened with timm's readers."""

import contextlib
import importlib.util
import json
import logging
import os
import tarfile
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from timm.data.readers import create_reader

from train.data.folders import check_tar, find_split, listed, some
from train.data.samples import Source, column_values, reason_of
from train.errors import DataError

STREAM_KEYS = "jpg;jpeg;png;webp;bmp;tif;tiff;gif"  # what a picture is called in a shard
EXAMPLE_SHARDS = "part-{000..031}.tar|40000"


def check_known(name: str, found: tuple[str, ...], classes: tuple[str, ...]) -> None:
    """Raises DataError where the data ``name`` has classes that are not among ``classes``."""
    if unknown := [label for label in found if label not in set(classes)]:
        wanted = f"the {len(classes):,} to learn"
        raise DataError(f"{name} has classes that are none of {wanted}: {some(unknown)}; those are {some(classes)}")


# Hugging Face data sets


def _require_package(name: str, form: str) -> None:
    if importlib.util.find_spec(name) is None:
        raise DataError(f"{form} needs the package {name}, which is not installed: pip install {name}")


@contextlib.contextmanager
def _quiet_datasets() -> Iterator[None]:
    import datasets

    loggers = [(logger, logger.level) for logger in map(logging.getLogger, ("datasets", "huggingface_hub"))]
    bars = not datasets.are_progress_bars_disabled()
    for logger, _ in loggers:
        logger.setLevel(logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in loggers:
            logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()


def load_hugging_face(name: str):
    """All splits of a data set, by name; prepared once, and then from the library's cache. Raises DataError."""
    _require_package("datasets", "hfds/")
    import datasets

    if name.startswith(("/", ".")) and not os.path.isdir(name):
        raise DataError(f"hfds/{name}: there is no folder {name}")
    with _quiet_datasets():
        try:
            return datasets.load_dataset(name)
        except Exception as error:  # the library has no common type for what goes wrong with files and network
            where = "" if os.path.isdir(name) else "there is no such folder, and from the Hub: "
            raise DataError(f"hfds/{name} cannot be loaded: {where}{reason_of(error)}") from error


def open_hugging_face(name: str, split: str, classes: tuple[str, ...] | None) -> Source:
    """One split of a data set of the Hub or of a folder; see `train.data.sources.open_source`. Raises DataError."""
    loaded = load_hugging_face(name)
    chosen = find_split(split, loaded)
    if chosen is None:
        raise DataError(f"hfds/{name} has no split {split!r}{listed(loaded)}")
    features, said = loaded[chosen].features, f"{Path(name).name}/{chosen}"
    image_key = _column(features, "image", "Image", said)
    label_key = _column(features, "label", "ClassLabel", said)
    labels = column_values(loaded[chosen], label_key)
    found, class_map = _hugging_face_classes(features[label_key], labels, classes, said), None
    if isinstance(labels[0], str) or (classes is not None and found != classes):
        check_known(said, found, classes or found)
        class_map = {label: index for index, label in enumerate(classes or found)}
    keys = {"input_key": image_key, "target_key": label_key}
    with _quiet_datasets():
        reader = create_reader(f"hfds/{name}", split=chosen, class_map=class_map, **keys)
    return Source(said, classes or found, reader)


def _column(features, usual: str, kind: str, said: str) -> str:
    """The column called ``usual``, or else the only one of that kind."""
    of_kind = [name for name, feature in features.items() if type(feature).__name__ == kind]
    if usual in features:
        return usual
    if len(of_kind) != 1:
        raise DataError(f"{said} has no column {usual!r}; its columns are {', '.join(features)}")
    return of_kind[0]


def _hugging_face_classes(feature, labels: list, classes: tuple[str, ...] | None, said: str) -> tuple[str, ...]:
    """The names behind a label column: its own, its distinct texts, or as many as its numbers need."""
    if not labels:
        raise DataError(f"{said} holds no pictures")
    if any(label is None or (isinstance(label, int) and label < 0) for label in labels):
        raise DataError(f"{said} has pictures without a label")
    if isinstance(labels[0], str):
        return tuple(sorted(set(labels)))
    if not isinstance(labels[0], int):
        raise DataError(f"{said}: the labels are of type {type(labels[0]).__name__}; they must be names or numbers")
    names = getattr(feature, "names", None) or classes or [f"class {index}" for index in range(max(labels) + 1)]
    if max(labels) >= len(names):
        raise DataError(f"{said} has the label {max(labels)}, but there are {len(names)} classes")
    return tuple(names)


# WebDataset shards


def stream_info(folder: str) -> dict:
    """What timm's info file says; {} where there is none. Raises DataError."""
    for name in ("_info.json", "info.json"):
        path = Path(folder).expanduser() / name
        try:
            return json.loads(path.read_bytes())
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read: {reason_of(error)}") from error
    return {}


def open_stream(
    folder: str, split: str, training: bool, seed: int, samples: int | None, classes: tuple[str, ...] | None
) -> Source:
    """One split of a folder of shards; see `train.data.sources.open_source`. Raises DataError."""
    _require_package("webdataset", "wds/")
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise DataError(f"wds/{folder}: there is no folder {folder}")
    info, name = stream_info(folder), f"{root.resolve().name}/{split.split('|')[0]}"
    chosen = split if ".tar" in split else find_split(split, info.get("splits", {}))
    if chosen is None:
        hint = listed(info.get("splits")) or f', nor an _info.json; give the shards as the split: "{EXAMPLE_SHARDS}"'
        raise DataError(f"wds/{folder} has no split {split!r}{hint}")
    options = {"is_training": training, "seed": seed, "num_samples": samples, "input_key": STREAM_KEYS}
    logger = logging.getLogger("timm.data.readers.reader_wds")
    quiet, logger.disabled = logger.disabled, True  # the info file was looked for above
    try:
        reader = create_reader("wds/", str(root), split=chosen, **options)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        what = "is not how shards are written" if ".tar" in split else "is not described in full by the info file"
        raise DataError(f'wds/{folder}: {split!r} {what} ({reason_of(error)}); such as "{EXAMPLE_SHARDS}"') from error
    finally:
        logger.disabled = quiet
    if not reader.num_samples:
        raise DataError(f'wds/{folder}: how many pictures are in {split!r}? Put it behind a bar: "{EXAMPLE_SHARDS}"')
    files = [root / file for file in reader.split_info.filenames]
    if missing := [file for file in files if not file.is_file()]:
        raise DataError(f"wds/{folder}: {len(missing)} of {len(files)} shards are missing, the first is {missing[0]}")
    for file in files:
        check_tar(file)
    counts = None
    if classes is None or training:
        counts = _count_labels(files, reader.split_info.alt_label)
        classes = classes or tuple(f"class {index}" for index in range(max(counts) + 1))
        if max(counts) >= len(classes):
            raise DataError(f"{name} has the label {max(counts)}, but there are names of {len(classes)} classes")
    return Source(name, classes, reader, streaming=True, counted=counts)


def _count_labels(files: list[Path], field: str) -> Counter:
    """How often each label is in the shards: of ``field`` in each sample's JSON if it is given, else in .cls files."""
    labels = Counter()
    for file in files:
        try:
            with tarfile.open(file, "r:") as tar:
                for member in tar:
                    if member.name.lower().endswith(".json" if field else ".cls"):
                        text = tar.extractfile(member).read()
                        labels[int(json.loads(text)[field] if field else text)] += 1
        except (tarfile.TarError, OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{file} is damaged: {reason_of(error)}") from error
    if not labels or max(labels) < 0:
        raise DataError(f"{files[0].parent}: the shards hold no labels (.cls)")
    return labels
