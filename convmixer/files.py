"""What a command line names as pictures: files, folders, addresses, standard input."""

import importlib.util
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from .decoders import ImageError, is_recognised
from .web import MAX_BYTES, fetch

READABLE = {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff"),
    *(".avif", ".avifs", ".ppm", ".pgm", ".pbm", ".pnm", ".tga"),
}
HEIC = {".heic", ".heif", ".hif"}  # readable with pillow-heif
SUFFIXES = READABLE | HEIC | {".jp2", ".j2k", ".jpx"}  # of pictures; the last are refused, with a reason


@dataclass
class Listing:
    """The pictures that were found, in order, and what else was."""

    names: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)  # a line for each folder that could not be looked into
    others: int = 0  # files in folders that are no pictures


def readable_suffixes() -> set[str]:
    """The endings, in lower case, of the files that `load_image` can read here."""
    return READABLE | HEIC if importlib.util.find_spec("pillow_heif") else READABLE


def find_pictures(names: Iterable[str]) -> Listing:
    """The files named, and the pictures in the folders named and below them, each once.

    Links are followed, and a folder is looked into once whatever leads to it. Hidden files and folders are left out.
    A file in a folder is a picture by its suffix or by its first bytes; one that was named is taken to be one.
    """
    listing, found, visited = Listing(), {}, set()
    for name in names:
        if not os.path.isdir(name) or is_address(name):
            found[name] = None
            continue
        for file in _files_below(name, listing, visited):
            if _is_picture(file):
                found[file] = None
            else:
                listing.others += 1
    listing.names = list(found)
    return listing


def _files_below(folder: str, listing: Listing, visited: set[tuple[int, int]]) -> Iterator[str]:
    def note(error: OSError) -> None:
        listing.unreadable.append(f"the folder {error.filename} cannot be read ({error.strerror})")

    for here, subfolders, files in os.walk(folder, followlinks=True, onerror=note):
        status = os.stat(here)
        if (status.st_dev, status.st_ino) in visited:  # a link leads back
            subfolders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        subfolders[:] = sorted(sub for sub in subfolders if not sub.startswith("."))
        yield from (os.path.join(here, file) for file in sorted(files) if not file.startswith("."))


def _is_picture(path: str) -> bool:
    if os.path.splitext(path)[1].lower() in SUFFIXES:
        return True
    try:
        if not os.path.isfile(path):  # a pipe would wait for its writer
            return False
        with open(path, "rb") as file:
            return is_recognised(file.read(64))
    except OSError:
        return False


def is_address(name: str) -> bool:
    return name.lower().startswith(("http://", "https://"))


def read_source(name: str) -> str | bytes:
    """What `Classifier` takes for a name on a command line: a path as it is, else the bytes. Raises ImageError."""
    if name == "-":
        content = sys.stdin.buffer.read(MAX_BYTES + 1)
    elif is_address(name):
        try:
            return fetch(name)
        except OSError as error:
            raise ImageError(f"{name:.200} cannot be fetched ({error}); give the address of a picture") from error
    else:
        return name
    if len(content) > MAX_BYTES:
        raise ImageError(f"{name} has more than {MAX_BYTES:,} bytes; give a smaller picture")
    return content
