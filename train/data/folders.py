"""Pictures in folders and tar files, sorted into classes: the class is the first level, deeper folders belong to it."""

import io
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np

from convmixer.files import HEIC, readable_suffixes
from train.errors import DataError

SYNONYMS = (("train", "training"), ("val", "validation", "valid", "eval", "evaluation"), ("test", "testing"))
SPLITS = tuple(name for names in SYNONYMS for name in names)
SHOWN = 5  # names in a message


def find_split(split: str, names) -> str | None:
    """The one of ``names`` that means ``split``."""
    same = next((group for group in SYNONYMS if split in group), ())
    return next((name for name in (split, *same) if name in names), None)


def some(names: Iterable[str]) -> str:
    """The first few of the names, as a part of a message."""
    names = list(names)
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else "")


def in_order(name: str) -> tuple[list, str]:
    """To sort names as timm does, "dog 2" before "dog 10"; those that differ in their case alone by that."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name.lower()))], name


def suffix_of(path: str) -> str:
    return PurePosixPath(path).suffix.lower()


def listed(names: Iterable[str]) -> str:
    return f"; it has {some(names)}" if names else ""


@dataclass
class Tree:
    """What lies in a folder or tar file, hidden names left out. Paths are below ``root``, with "/" between names."""

    root: Path
    files: dict[str, tuple[int, int] | None] = field(default_factory=dict)  # in a tar file: first byte and length
    folders: set[str] = field(default_factory=set)
    odd: int = 0  # what is neither a folder nor a regular file: reading a pipe would wait for its writer
    inside: str = ""  # the folder of the tar file that is meant

    @property
    def name(self) -> str:
        return str(self.root / self.inside)

    def pictures(self) -> list[str]:
        """The files that can be read here, in timm's order, in which "dog 2" comes before "dog 10"."""
        suffixes = readable_suffixes()
        return sorted((path for path in self.files if suffix_of(path) in suffixes), key=in_order)

    def below(self, folder: str) -> "Tree":
        """The same tree, seen from one of its folders; only for tar files, whose paths stand in the file."""
        cut = f"{folder}/"
        files = {path.removeprefix(cut): place for path, place in self.files.items() if path.startswith(cut)}
        folders = {path.removeprefix(cut) for path in self.folders if path.startswith(cut)}
        return Tree(self.root, files, folders, self.odd, f"{self.inside}/{folder}".lstrip("/"))

    def subfolders(self, folder: str = "") -> list[str]:
        """The names of the folders right in ``folder``."""
        start = f"{folder}/" if folder else ""
        found = {path[len(start) :] for path in self.folders if path.startswith(start)}
        return sorted((name for name in found if name and "/" not in name), key=in_order)


def entries_of(folder: Path) -> list[os.DirEntry]:
    """What is in a folder, by name, hidden names left out. Raises DataError."""
    try:
        with os.scandir(folder) as entries:
            return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"{folder} cannot be read ({error.strerror}); allow it, or take it away") from error


def list_folder(root: Path) -> Tree:
    """Lists a folder. Links are followed, but not round in a circle. Raises DataError."""
    tree = Tree(root)

    def look(folder: str, above: tuple[tuple[int, int], ...]) -> None:
        status = os.stat(root / folder)
        if (status.st_dev, status.st_ino) in above:
            return
        for entry in entries_of(root / folder):
            path = f"{folder}/{entry.name}".lstrip("/")
            if entry.is_dir():
                tree.folders.add(path)
                look(path, (*above, (status.st_dev, status.st_ino)))
            elif entry.is_file() or entry.is_symlink():  # a link that leads nowhere is a picture that is missing
                tree.files[path] = None
            else:
                tree.odd += 1

    look("", ())
    return tree


@lru_cache(maxsize=2)
def list_tar(root: Path, changed: int) -> Tree:
    """Lists a tar file, and the tar files in it as folders; once for each time ``changed``. Raises DataError."""
    check_tar(root)
    tree, coming = Tree(root), [(0, "")]
    try:
        with open(root, "rb") as file:
            while coming:
                coming += _list_members(tree, file, *coming.pop())
    except tarfile.TarError as error:
        raise DataError(f"{root} is no tar file, or is damaged ({error}); save or download it again") from error
    except OSError as error:
        raise DataError(f"{root} cannot be read ({error.strerror or error})") from error
    return tree


def _list_members(tree: Tree, file: BinaryIO, start: int, folder: str) -> list[tuple[int, str]]:
    """Adds what the tar file that begins at ``start`` holds; gives the tar files in it, as (start, folder)."""
    nested = []
    file.seek(start)
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            names = [name for name in f"{folder}/{member.name}".split("/") if name not in ("", ".")]
            if any(name.startswith(".") for name in names):
                continue
            path = "/".join(names)
            tree.folders.update(str(parent) for parent in PurePosixPath(path).parents if str(parent) != ".")
            if member.isdir() and path:
                tree.folders.add(path)
            elif member.isreg() and path.lower().endswith(".tar"):
                tree.folders.add(path[:-4])
                nested.append((member.offset_data, path[:-4]))
            elif member.isreg() and not member.issparse():
                tree.files[path] = (member.offset_data, member.size)
            elif path:
                tree.odd += 1
    return nested


def split_path(data: str) -> tuple[Path, str]:
    """FILE.tar/FOLDER as the file and the folder in it; any other path and ""."""
    path = Path(data).expanduser()
    tar = next((parent for parent in path.parents if parent.suffix == ".tar" and parent.is_file()), None)
    return (path, "") if tar is None else (tar, path.relative_to(tar).as_posix())


def file_splits(data: str, split: str) -> dict[str, str]:
    """The paths of what is named like a split, in upper or lower case: folders of class folders, and tar files."""
    root, inside = split_path(data)
    if root.is_dir():
        places = [(entry.name.removesuffix(".tar"), entry.path, Path(entry)) for entry in entries_of(root)]
    else:
        tree = _tar_tree(root, inside)
        places = [(name, str(root / inside / name), None) for name in tree.subfolders() if tree.subfolders(name)]
    found: dict[str, str] = {}
    for name, path, entry in places:
        name = name if name == split else name.lower()
        if name in (*SPLITS, split) and (entry is None or _may_be_split(entry)):
            found.setdefault(name, path)
    return {name: found[name] for name in (*SPLITS, split) if name in found}


def _may_be_split(path: Path) -> bool:
    if path.suffix == ".tar":
        return path.is_file()
    return path.is_dir() and any(entry.is_dir() for entry in entries_of(path))


def open_tree(data: str) -> Tree:
    """What is in a folder, a tar file, or a folder in a tar file. Raises DataError."""
    root, inside = split_path(data)
    if root.is_dir():
        return list_folder(root)
    tree = _tar_tree(root, inside)
    if inside or any(path.count("/") < 2 for path in tree.pictures()):
        return tree
    packed, *others = tree.subfolders() or [""]
    has_splits = any(name.lower() in SPLITS for name in tree.subfolders(packed))
    # A folder of which the tar file was made is seen through; splits in it are for the user to choose.
    return tree.below(packed) if packed and not others and not has_splits else tree


def _tar_tree(root: Path, inside: str) -> Tree:
    tree = list_tar(root, root.stat().st_mtime_ns)
    if inside and inside not in tree.folders:
        raise DataError(f"{root} holds no folder {inside}{listed(tree.subfolders())}")
    return tree.below(inside) if inside else tree


def check_tar(path: Path) -> None:
    """Raises DataError for a file without the empty block that ends a tar file: readers may stop at a cut unasked."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - 512))
            end = file.read()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})") from error
    if end != bytes(512):
        raise DataError(f"{path} is no tar file, or is cut short; save or download it again")


@dataclass(frozen=True, eq=False)
class Files:
    """Labelled pictures in a folder or tar file, by index, as timm's readers give them: (binary file, label)."""

    tree: Tree
    paths: list[str]
    labels: np.ndarray  # int64

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        path = self.paths[index]
        place = self.tree.files[path]
        if place is None:
            return open(self.tree.root / path, "rb"), int(self.labels[index])
        with open(self.tree.root, "rb") as file:  # one of its own: worker processes would move each other's position
            file.seek(place[0])
            return io.BytesIO(file.read(place[1])), int(self.labels[index])

    def filename(self, index: int, absolute: bool = True) -> str:
        return f"{self.tree.name}/{self.paths[index]}"


def sort_by_class(tree: Tree, classes: tuple[str, ...] | None) -> tuple[Files, tuple[str, ...], tuple[str, ...]]:
    """The pictures of a tree, the classes found, and notes about what was left out.

    classes: the names that the labels stand for, those found by default. Raises DataError where the pictures are not in
    folders named by class.
    """
    suffixes, paths = readable_suffixes(), tree.pictures()
    others = Counter(suffix for path in tree.files if (suffix := suffix_of(path)) not in suffixes)
    if not paths:
        there = f"; there are {_by_suffix(others)}" if others else ""
        raise DataError(f"{tree.name} holds no pictures ({', '.join(sorted(suffixes))}){there}")
    _check_layout(tree)
    names = [path.split("/", 1)[0] if "/" in path else "" for path in paths]
    found = tuple(sorted(set(names), key=in_order))
    if "" in found or all(name.lower() in SPLITS for name in found):
        loose = next(path for path, name in zip(paths, names, strict=True) if not name or "" not in found)
        raise DataError(
            f"{tree.name} holds pictures that are in no class's folder, such as {loose}; put each in a subfolder named"
            " by class"
        )
    index = {name: i for i, name in enumerate(classes or found)}
    notes = list(_notes(others, tree.odd, [name for name in tree.subfolders() if name not in found]))
    labels = np.fromiter((index.get(name, -1) for name in names), np.int64, len(names))
    return Files(tree, paths, labels), found, tuple(notes)


def _notes(others: Counter, odd: int, empty: list[str]) -> Iterator[str]:
    if others:
        yield f"not read, by their endings: {_by_suffix(others)}"
    if odd:
        yield f"not read: {odd:,} that are no regular files"
    if empty:
        yield f"no classes, as they hold no picture: {len(empty):,} folder{'s' * (len(empty) > 1)} ({some(empty)})"


def _by_suffix(others: Counter) -> str:
    names = {"": "without an ending"} | {suffix: f"{suffix} (pip install pillow-heif)" for suffix in HEIC}
    return some(f"{count:,} {names.get(suffix, suffix)}" for suffix, count in others.most_common())


def _check_layout(tree: Tree) -> None:
    """Raises DataError where training and held-out pictures lie below what would be taken for a class."""
    inside: dict[str, set[str]] = {}
    for path in tree.folders:
        parent, _, name = path.rpartition("/")
        if parent and name.lower() in SPLITS:
            inside.setdefault(parent, set()).add(name.lower())
    deep = sorted(parent for parent, names in inside.items() if find_split("train", names) and len(names) > 1)
    if deep:
        names = " and ".join(f"{name}/" for name in SPLITS if name in inside[deep[0]])
        where = f"{tree.name} holds {names} in {some(f'{parent}/' for parent in deep)}"
        a_class = deep[0].split("/")[0]
        if len({parent.split("/")[0] for parent in deep}) == 1:
            raise DataError(f"{where}; give {tree.name}/{deep[0]}")
        raise DataError(f"{where}; put the classes into the splits, as in train/{a_class} and val/{a_class}")
