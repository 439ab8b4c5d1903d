"""Hostile pickles for the fuzzing of checkpoints, bare and in zip archives."""

import io
import pickle
import pickletools
import random
import struct
import zipfile

import torch

from fuzz.files import legacy, saved, tiny, training_checkpoint, zipped
from fuzz.mutations import PLAIN, Rng, chance, pick, some_bytes

_HOSTILE_GLOBALS = (
    ("os", "system"), ("posix", "system"), ("builtins", "eval"), ("builtins", "exec"), ("builtins", "open"),
    ("builtins", "getattr"), ("subprocess", "Popen"), ("shutil", "rmtree"), ("runpy", "run_path"), ("torch", "load"),
    ("torch.hub", "load"), ("numpy", "fromfile"), ("builtins", "__import__"), ("importlib", "import_module"),
    ("torch.utils.cpp_extension", "load"),
    ("pathlib", "Path.touch"), ("builtins", "bytearray"), ("operator", "attrgetter"),
)  # fmt: skip
_ALLOWED_GLOBALS = (
    ("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_parameter"), ("collections", "OrderedDict"),
    ("torch", "FloatStorage"), ("torch", "Size"), ("torch", "device"), ("torch", "float32"), ("argparse", "Namespace"),
    ("numpy", "dtype"), ("numpy.core.multiarray", "scalar"), ("torch._utils", "_rebuild_sparse_tensor"),
    ("torch", "zeros"),
    ("torch._utils", "_rebuild_qtensor"), ("torch._tensor", "_rebuild_from_type_v2"),
    ("torch.storage", "UntypedStorage"),
    ("torch._utils", "_rebuild_meta_tensor_no_storage"), ("_codecs", "encode"), ("collections", "Counter"),
    ("torch._utils", "_rebuild_device_tensor_from_numpy"), ("torch", "Tensor"), ("torch.serialization", "_get_layout"),
)  # fmt: skip
_CALLED = (("__builtin__", "eval"), ("__builtin__", "exec"), ("io", "open"), ("_io", "open"), ("random", "Random"))
REFUSED = {f"c{module}\n{name}\n".encode() for module, name in (*_HOSTILE_GLOBALS, *_CALLED)}


def _program(rng: Rng) -> bytes:
    """A random pickle: pushes and calls, with globals that are refused and some that are allowed."""
    code = bytearray(b"\x80\x02")
    if chance(rng, 0.3):
        code = bytearray(b"\x80" + bytes([int(rng.integers(0, 6))]))
    for _ in range(int(rng.integers(1, 40))):
        match int(rng.integers(16)):
            case 0 | 1:
                module, name = pick(rng, _ALLOWED_GLOBALS if chance(rng, 0.8) else _HOSTILE_GLOBALS)
                code += f"c{module}\n{name}\n".encode()
            case 2 | 3:
                code += b"X" + struct.pack("<I", 4) + pick(rng, (b"head", b"cpu\0", b"stor", b"0.we", b"touc"))
            case 4:
                code += b"J" + struct.pack("<i", int(pick(rng, (0, 1, 3, 4, -1, 2**31 - 1, 2**20))))
            case 5:
                code += b"\x8a\x09" + rng.bytes(9)
            case 6:
                code += pick(rng, (b"(", b"(", b")", b"}", b"]", b"N"))
            case 7 | 8:
                code += pick(rng, (b"R", b"R", b"b", b"\x81"))
            case 9:
                code += pick(rng, (b"t", b"\x85", b"\x86", b"\x87", b"u", b"s", b"e", b"a"))
            case 10:
                code += b"q" + bytes([int(rng.integers(4))])
            case 11:
                code += b"h" + bytes([int(rng.integers(4))])
            case 12:
                code += b"G" + struct.pack(">d", float(pick(rng, (0.0, 1e308, float("nan")))))
            case 13:
                code += pick(rng, (b"Q", b"0", b"2", b"\x88"))
            case 14:
                code += b"q\x00h\x00h\x00\x86" * int(pick(rng, (1, 5, 60)))  # doubles what is looked at, each time
            case _:
                code += bytes([int(rng.integers(256))])
    return bytes(code) + b"."


def _changed_pickle(rng: Rng, code: bytes) -> bytes:
    """A real pickle with one argument changed or one instruction removed, doubled or put in."""
    operations = [(place, each.name) for each, _, place in pickletools.genops(code)]
    places = [place for place, _ in operations] + [len(code)]
    at = int(rng.integers(1, len(places) - 1))
    start, end = places[at], places[at + 1]
    match int(rng.integers(5)):
        case 0:
            return code[:start] + code[end:]
        case 1:
            return code[:end] + code[start:end] * int(pick(rng, (1, 3, 2000))) + code[end:]
        case 2:
            return code[:start] + _program(rng)[2:-1] + code[start:]
        case 3:
            return code[:start] + pick(rng, PLAIN)(rng, code[start:end]) + code[end:]
        case _:  # a number, such as one of a shape or a stride
            numbers = [i for i, (_, name) in enumerate(operations) if name in ("BININT1", "BININT2", "BININT")]
            i = pick(rng, numbers or [at])
            new = b"J" + struct.pack("<i", int(pick(rng, (0, -1, 1, 7, 2**31 - 1, -(2**31), 65536, 100_000_000))))
            return code[: places[i]] + new + code[places[i + 1] :]


def hostile_pickle(rng: Rng) -> bytes:
    """A bare pickle, as before PyTorch 1.6."""
    if chance(rng, 0.4):
        return _program(rng)
    whole = legacy(rng)
    ends = []  # of the pickles in the file: a magic number, a protocol, the system, the content, the keys of storages
    while len(ends) < 5:
        start = ends[-1] if ends else 0
        ends.append(_end(whole, start))
    i = int(pick(rng, (3, 3, 3, 3, 0, 1, 2, 4)))
    start = ends[i - 1] if i else 0
    return whole[:start] + _changed_pickle(rng, whole[start : ends[i]]) + whole[ends[i] :]


def _end(data: bytes, start: int) -> int:
    stream = io.BytesIO(data[start:])
    for _ in pickletools.genops(stream):
        pass
    return start + stream.tell()


class _Runs:
    """Pickled, it is a call of a function that a checkpoint must not call."""

    def __init__(self, call: tuple):
        self.call = call

    def __reduce__(self):
        return self.call


def hostile_call(rng: Rng) -> bytes:
    """A training checkpoint with an honest call of a harmful function in it."""
    calls = ((eval, ("open('fuzz-canary', 'w')",)), (open, ("fuzz-canary", "w")), (random.Random, ()), (exec, ("1",)))
    content = training_checkpoint(rng) | {"extra": _Runs(pick(rng, calls))}
    return saved(content, chance(rng, 0.5))


def hostile_zip(rng: Rng) -> bytes:
    """A zip archive as PyTorch's, with its pickle or its layout changed."""
    members = {}
    with zipfile.ZipFile(io.BytesIO(zipped(rng))) as archive:
        for name in archive.namelist():
            members[name] = archive.read(name)
    pickled = next(name for name in members if name.endswith("data.pkl"))
    match int(rng.integers(6)):
        case 0:
            members[pickled] = _program(rng)
        case 1 | 2:
            members[pickled] = _changed_pickle(rng, members[pickled])
        case 3:
            name = pick(rng, list(members))
            members[name] = pick(rng, PLAIN)(rng, members[name])
        case 4:
            del members[pick(rng, list(members))]
        case _:
            members[pick(rng, ("../fuzz-canary", "/tmp/fuzz-canary", "archive/extra", pickled + "x", "x" * 3000))] = (
                some_bytes(rng)
            )
    stream = io.BytesIO()
    compression = zipfile.ZIP_DEFLATED if chance(rng, 0.2) else zipfile.ZIP_STORED
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name, content in members.items():
            if chance(rng, 0.02):
                content = bytes(50_000_000) if compression == zipfile.ZIP_DEFLATED else b""
            archive.writestr(zipfile.ZipInfo(name), content, compression)
    return stream.getvalue()


def nested(rng: Rng) -> bytes:
    """Pickles of plain values: nested deep, or referring to themselves, or no tensors where tensors should be."""
    content: object = training_checkpoint(rng)
    match int(rng.integers(6)):
        case 0:
            for _ in range(int(pick(rng, (10, 300)))):
                content = {pick(rng, ("state_dict", "model", "x")): content}
        case 1:
            content = {
                name: pick(rng, (1, "x", None, [], {}, tensor)) for name, tensor in tiny(rng, shared=True).items()
            }
        case 2:
            content = [content]
        case 3:
            content = {
                pick(rng, (1, None, ("a",), "a\nb", "x" * 3000, "\x1b[0m")): tensor
                for tensor in tiny(rng, shared=True).values()
            }
        case 4:  # with the memory of two tensors: only the zip archive names them in a fixed order
            return saved(
                tiny(rng, shared=True) | {pick(rng, list(tiny(rng, shared=True))): _odd_tensor(rng)}, zipped=True
            )
        case _:
            content["state_dict"] = content
    if chance(rng, 0.2):
        return pickle.dumps(pick(rng, (content if not torch.is_tensor(content) else 1, 1, {}, "x")), protocol=2)
    return saved(content, chance(rng, 0.5))


def _odd_tensor(rng: Rng) -> object:
    return pick(
        rng,
        (
            lambda: torch.zeros(1).expand(10**9),
            lambda: torch.full((4,), float("nan")),
            lambda: torch.zeros(4, dtype=torch.complex64),
            lambda: torch.zeros(4, 4).to_sparse(),
            lambda: torch.quantize_per_tensor(torch.zeros(4), 1.0, 0, torch.qint8),
            lambda: torch.zeros(4, device="meta"),
            lambda: torch.nn.Parameter(torch.zeros(4)),
            lambda: torch.zeros(4, dtype=torch.bool),
            lambda: torch.full((4,), 1e300, dtype=torch.float64),
            lambda: torch.zeros(4, requires_grad=True),
            lambda: torch.zeros(0),
            lambda: torch.zeros((1,) * 60),
            lambda: torch.zeros(4).as_strided((4,), (0,)),
        ),
    )()
