"""Fuzzing of convmixer.weights: a file gives a usable Checkpoint, or CheckpointError with one line, and runs no code"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from convmixer import CheckpointError, Classifier, ModelError
from convmixer.weights import load_checkpoint, read_description
from fuzz.files import bare, hostile_description, hostile_header, legacy, ours, zipped
from fuzz.mutations import chance, mutate, pick, some_bytes
from fuzz.pickles import REFUSED, hostile_call, hostile_pickle, hostile_zip, nested

# The first four give whole, valid files.
MAKERS = (
    ours, bare, zipped, legacy, hostile_description, hostile_header, hostile_pickle, hostile_zip, hostile_call, nested,
    hostile_description, hostile_header, hostile_pickle, hostile_zip,
)  # fmt: skip

EXTRA_MEMORY = 256 * 2**20  # bytes; the valid files have a few kilobytes
MAX_MESSAGE = 2000
MOST_ACTIVATIONS = 2**22  # values in a feature map up to which a network that was read is also run

# What no reading of a checkpoint may do, as Python's audit events name it.
_FORBIDDEN = (
    "os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "subprocess.Popen", "pty.spawn",
    "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.chmod", "os.chown", "os.truncate",
    "os.putenv", "os.kill", "shutil.rmtree", "socket.connect", "socket.bind", "socket.getaddrinfo", "socket.sendto",
    "urllib.Request", "ctypes.dlopen", "import", "exec", "compile", "code.__new__", "builtins.input", "webbrowser.open",
)  # fmt: skip
_WRITING = 0o3 | 0o100 | 0o1000 | 0o2000  # the flags of open() but O_RDONLY: write, create, truncate, append


def make(seed: int, number: int) -> bytes:
    """The bytes of one case: a file of one of MAKERS, as it is or damaged once more."""
    rng = np.random.default_rng((seed, number, 3))
    content = _maker(number)(rng)
    if is_valid(number) or (_maker(number) not in MAKERS[:4] and chance(rng, 0.8)):
        return content
    if chance(rng, 0.02):
        return pick(rng, (b"", b"PK", b"PK\3\4", b"\x80\x02", b"\x80")) + some_bytes(rng, 300)
    return mutate(rng, content, pick(rng, MAKERS)(rng))


def is_valid(number: int) -> bool:
    return number % 40 < 4  # the first four makers write whole files


def _maker(number: int):
    return MAKERS[number % 40 % len(MAKERS)]


def warm_up() -> None:
    """What is loaded once must not count for the first case."""
    import encodings
    import importlib
    import pkgutil
    import tempfile

    # These are imported late by PyTorch and Python, and importing them looks like running code.
    for name in ("torch.nested._internal.ops", "torch._subclasses.schema_check_mode"):
        importlib.import_module(name)
    for module in pkgutil.iter_modules(encodings.__path__):
        if module.name not in ("mbcs", "oem"):  # on Windows only
            importlib.import_module(f"encodings.{module.name}")
    with tempfile.TemporaryDirectory() as folder:
        for number in range(200):
            check(make(0, number), Path(folder))
    _watched.append(True)
    sys.addaudithook(_hear)


def check(content: bytes, folder: Path, valid: bool = False) -> str:
    """Raises AssertionError if reading ``content`` breaks a promise; says what became of it."""
    path = folder / "model.bin"
    path.write_bytes(content)
    before = sorted(folder.iterdir())
    with _watching() as heard:
        outcome = _read(path, valid)
    assert not heard, f"reading it did this: {heard[0]}"
    assert sorted(folder.iterdir()) == before, "there are other files now"
    assert path.read_bytes() == content, "the file has changed"
    if outcome != "refused":
        names = [name for name in REFUSED if name in content]
        assert not names, f"a pickle that names {names[0]} was taken"
    return outcome


def _read(path: Path, valid: bool) -> str:
    try:
        read_description(path)
    except CheckpointError as error:
        _check_message(str(error))
    try:
        checkpoint = load_checkpoint(path)
        assert len(checkpoint.labels) == checkpoint.config.num_classes, "labels and classes differ"
        classifier = Classifier(str(path), device="cpu")
    except (CheckpointError, ModelError) as error:
        _check_message(str(error))
        assert not valid, f"a valid file is refused: {error}"
        return "refused"
    side, config = classifier.preprocessing.size, classifier.config
    if config.dim * (side // config.patch_size) ** 2 > MOST_ACTIVATIONS or side < config.patch_size:
        return "usable, but large"
    if config.in_chans == 3:
        predictions = classifier.classify(_picture())
        assert all(isinstance(each.label, str) for each in predictions), "a label that is no text"
    return "usable"


@cache
def _picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))


def _check_message(message: str) -> None:
    assert message and message.isprintable(), f"the message is not one printable line: {message!r:.400}"
    assert len(message) < MAX_MESSAGE, f"the message has {len(message)} characters: {message:.200}"


_watched: list[bool] = []  # whether the hook is there, which cannot be removed
_heard: list[str] | None = None


@contextmanager
def _watching() -> Iterator[list[str]]:
    """What happens meanwhile that must not."""
    global _heard
    _heard = []
    try:
        yield _heard
    finally:
        _heard = None


def _hear(event: str, arguments: tuple) -> None:
    if _heard is None:
        return
    if event in _FORBIDDEN:
        _heard.append(f"{event} {arguments!r:.200}")
    elif event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITING:
        _heard.append(f"open for writing {arguments!r:.200}")
