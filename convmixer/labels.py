"""The names of classes."""

import json
import os
from functools import cache
from pathlib import Path


class LabelsError(ValueError):
    """One line that names a file of labels, and what is wrong with it."""


@cache
def imagenet_labels() -> tuple[str, ...]:
    """The 1,000 labels of ImageNet-1k in index order, all different."""
    return tuple((Path(__file__).parent / "assets" / "imagenet_labels.txt").read_text(encoding="utf-8").splitlines())


def read_labels(path: str | os.PathLike) -> tuple[str, ...]:
    """The labels in a text file, one a line in index order, or in a JSON file, as a list. Raises LabelsError."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig").strip()
        labels = json.loads(text) if text.startswith("[") else [line.strip() for line in text.splitlines()]
    except OSError as error:
        raise LabelsError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise LabelsError(f"{path}: is no UTF-8 text with one label a line, and no JSON list of labels") from error
    if not labels or not all(isinstance(label, str) and label for label in labels):
        raise LabelsError(f"{path}: holds an empty label, or none; it must be one text for each class")
    return tuple(labels)
