"""The promises of convmixer.weights: a file gives a usable Checkpoint or CheckpointError, and runs no code."""

import argparse
import io
import struct
import sys
import tempfile
import threading
import traceback
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from random import Random

import numpy as np
import safetensors.torch
import torch
from PIL import Image

from convmixer import Checkpoint, CheckpointError, Classifier, ModelError, Preprocessing, save_checkpoint
from convmixer.model import ConvMixer, ConvMixerConfig
from convmixer.weights import load_checkpoint, read_description
from fuzz.pictures import check_message

CONFIG = ConvMixerConfig(dim=4, depth=1, kernel_size=3, patch_size=2, num_classes=3)
EXTRA_MEMORY = 256 * 2**20  # bytes; the valid files have a few kilobytes
# How the audit events of Python begin that no reading of a checkpoint may raise, and of these the harmless ones.
FORBIDDEN = ("os.", "subprocess.", "socket.", "shutil.", "pty.", "urllib.", "ctypes.dlopen", "exec", "import", "code.")
HARMLESS = {"os.listdir", "os.scandir"}
IMPORTED_LATE = {"torch", "numpy", "encodings", "convmixer", "safetensors", "PIL", "zipfile"}  # by no pickle's word
WRITING = 0o3 | 0o100 | 0o1000 | 0o2000  # the flags of open() but O_RDONLY: write, create, truncate, append
SWELLS = b"q\x00h\x00h\x00\x87"  # instructions of a pickle: what is on the stack becomes a tuple of three of it
WORDS = (  # of up to 64 bytes: libFuzzer takes no longer ones, and does not say so
    *(b"cos\nsystem\n", b"cbuiltins\neval\n", b"ctorch.hub\nload\n", b"crunpy\nrun_path\n", b"ctorch\nFloatTensor\n"),
    *(b"c__builtin__\nbytearray\n", b"cargparse\nNamespace\n", b"J\xff\xff\xff\x7f", b"\x85R", b"\x85" * 60),
    *(SWELLS, SWELLS * 9, b"}", b"(", b"u", b"\x81", b"NaN", b"1e999", b"-1", b"null", b"[]", b"{}", b"\\u001b"),
)


def tensors(kind: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Those of a tiny network."""
    torch.manual_seed(0)
    return ConvMixer(CONFIG).to(kind).state_dict()


def ours(labels: tuple[str, ...] = ("ant", "bee", "cow")) -> bytes:
    """As train/run.py writes it."""
    preprocessing = Preprocessing(8, 1.0, "bicubic", (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.safetensors")
        save_checkpoint(path, Checkpoint("tiny", CONFIG, tensors(), labels, preprocessing, {"seed": 0}, {"top1": 3.3}))
        return path.read_bytes()


class _Runs:
    """Pickled, it is a call that a checkpoint must not make."""

    def __reduce__(self):
        return exec, ("1",)


def repacked(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, member in members.items():
            archive.writestr(zipfile.ZipInfo(name), member, compression)
    return stream.getvalue()


def pickled(instructions: bytes, compression: int = zipfile.ZIP_STORED, order: bytes = b"little") -> bytes:
    members = {"data.pkl": b"\x80\x02" + instructions + b".", "version": b"3", "byteorder": order}
    return repacked({f"archive/{name}": content for name, content in members.items()}, compression)


WORST = [  # and what is said of them
    (pickled(b"})" + b"\x85" * 300_000 + b"K\x01s"), "nested too deep"),  # a key; its hash would overrun the stack
    (pickled(b"}K\x01" + 21 * SWELLS + b"K\x01s"), "refers to itself too often"),  # likewise, for minutes
    (pickled(b"]q\x00h\x00a"), "filled after it was used"),
    (pickled(b"c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R"), "bytearray"),
    (pickled(b"ctorch\nFloatTensor\nJ\xff\xff\xff\x7f\x85R"), "FloatTensor"),
    (pickled(bytes(10**7), zipfile.ZIP_DEFLATED), "compressed archive"),
    (pickled(b"}", order=b"\x1b[31m\0"), "type: ?[31m?"),
]


@cache
def seeds() -> list[bytes]:
    """Valid files of every kind that is read, two that would run code, and the worst ones."""
    training = {"epoch": 3, "arch": "convmixer", "state_dict": OrderedDict(tensors()), "metric": np.float64(0.5)}
    training["args"] = argparse.Namespace(lr=0.1, img_size=8, mean=[0.5], model_kwargs={"act_layer": "gelu"})
    wrapped = {"model": {f"module.{name}": tensor for name, tensor in tensors(torch.float64).items()}}
    pickles = []
    for content in (tensors(), training, wrapped, training | {"extra": _Runs()}):
        for zipped in (True, False):  # as torch.save writes it, and as before PyTorch 1.6
            torch.save(content, stream := io.BytesIO(), _use_new_zipfile_serialization=zipped)
            pickles.append(stream.getvalue())
    bare = [safetensors.torch.save(tensors(kind)) for kind in (torch.float16, torch.bfloat16)]
    return [ours(), *bare, *pickles, *(content for content, _ in WORST)]


def mutate(content: bytes, random: Random, havoc: Callable[[bytes], bytes]) -> bytes:
    """``content`` changed by ``havoc``: mostly one part of it, with the container around it put right again."""
    if content[8:9] == b"{" and random.random() < 0.8:
        end = 8 + int.from_bytes(content[:8], "little")
        header = havoc(content[8:end])
        return struct.pack("<Q", len(header)) + header + content[end:]
    if content.startswith(b"PK") and random.random() < 0.8:
        with suppress(Exception), zipfile.ZipFile(io.BytesIO(content)) as archive:  # or it was damaged before
            members = {name: archive.read(name) for name in archive.namelist()}
            name = random.choice([*members, *["archive/data.pkl"] * 3 * len(members)])
            members[name] = havoc(members.get(name, b"x"))
            return repacked(members)
    return havoc(content)


def check(content: bytes) -> str:
    """Raises AssertionError if reading ``content`` breaks a promise; says what became of it."""
    path = Path(_folder().name, "model.bin")
    path.write_bytes(content)
    _heard.clear()
    outcome = _read(path)
    assert not _heard, f"reading it did this: {_heard[0]}"
    assert [*path.parent.iterdir()] == [path] and path.read_bytes() == content, "files have changed"
    return outcome


def _read(path: Path) -> str:
    try:
        if path.read_bytes()[8:9] == b"{":
            read_description(path)
        checkpoint = load_checkpoint(path)
        assert len(checkpoint.labels) == checkpoint.config.num_classes, "labels and classes differ"
        classifier = Classifier(str(path), device="cpu")
    except (CheckpointError, ModelError) as error:
        check_message(str(error))
        return "refused"
    side, config = classifier.preprocessing.size, classifier.config
    if config.dim * (side // config.patch_size) ** 2 > 2**22 or side < config.patch_size:
        return "usable, but large"
    if config.in_chans == 3:
        predictions = classifier.classify(Image.linear_gradient("L"))
        assert all(isinstance(each.label, str) for each in predictions), "a label that is no text"
    return "usable"


@cache
def _folder() -> tempfile.TemporaryDirectory:
    folder = tempfile.TemporaryDirectory(prefix="convmixer-fuzz-")
    path = Path(folder.name, "model.bin")
    for seed in seeds()[: -len(WORST)]:  # whatever is loaded or written once is there afterwards
        path.write_bytes(seed)
        _read(path)
    sys.addaudithook(_hear)
    return folder


_heard: list[str] = []  # what happens that must not


def _hear(event: str, arguments: tuple) -> None:
    if threading.current_thread() is not threading.main_thread():  # a server that another test started
        return
    is_forbidden = event.startswith(FORBIDDEN) and event not in HARMLESS
    is_writing = event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING
    is_known = event == "import" and str(arguments[0]).split(".")[0] in IMPORTED_LATE
    if (is_forbidden or is_writing) and not is_known:
        # An import that was heard reads, compiles and runs files.
        files = [frame.f_code.co_filename for frame, _ in traceback.walk_stack(None)]
        if "<frozen importlib._bootstrap>" not in files:
            _heard.append(f"{event} {arguments!r:.200}")
