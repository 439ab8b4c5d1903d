"""Pickles of PyTorch: what one would make of itself, found out without making it; then its tensors as arrays.

PyTorch's ``weights_only`` runs no code out of a pickle, but builds whatever it describes: tuples in tuples, deep enough
to overrun the stack when they are hashed; or a few bytes that refer to each other so often that writing the value down
would take years; or a bytearray of a terabyte. Here a pickle is followed with sizes in the place of values.
"""

import os
import pickletools
import re
import threading
import warnings
import zipfile
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from .guess import facts_of_training
from .readers import CheckpointError, as_array, error_summary

# As timm names them, the preferred one first; then as others do.
STATE_DICT_KEYS = ("state_dict_ema", "model_ema", "state_dict", "model", "model_state_dict", "net")
MOST_INSTRUCTIONS = 5_000_000  # a checkpoint with averaged weights and an optimizer's state has about 100,000
MOST_VALUES = 50_000_000  # in one value, each counted as often as it is referred to
MOST_DEPTH = 100
LEGACY_PICKLES = 5  # in a file from before PyTorch 1.6: magic number, version, system, content, names of storages

_ATOMS = {
    *("NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING"),
    *("LONG1", "GLOBAL", "EMPTY_TUPLE"),
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class PickleError(ValueError):
    """One line that says what is wrong with a pickle."""


class _Value:
    """The size and depth of what would be there; ``shared`` once the pickle has referred to it again."""

    __slots__ = ("depth", "shared", "size")

    def __init__(self, parts: list["_Value"] | None = None):
        self.size, self.depth, self.shared = 1, 0, False
        if parts is not None:
            self.take(parts)

    def take(self, parts: list["_Value"]) -> None:
        """Put ``parts`` into this container."""
        if self.shared:  # or it would grow in places where it has been counted
            raise PickleError("holds a value that is filled after it was used")
        self.size += sum(part.size for part in parts)
        self.depth = max(self.depth, 1 + max((part.depth for part in parts), default=0))
        if self.size > MOST_VALUES or self.depth > MOST_DEPTH:
            raise PickleError("is nested too deep or refers to itself too often to be a checkpoint")


def check_pickles(file: BinaryIO) -> None:
    """Look through a file that torch.load is about to read. Raises PickleError, and what a damaged file raises.

    Of a zip archive no part may be compressed, which torch.save never does: a few megabytes could become terabytes.
    """
    start = file.read(2)
    file.seek(0)
    if start != b"PK":
        for _ in range(LEGACY_PICKLES):
            _follow(file)
        return
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise PickleError("is a compressed archive; torch.save writes plain ones")
        for member in members:
            if member.filename.endswith("data.pkl"):
                with archive.open(member) as content:
                    _follow(content)


def _follow(file: BinaryIO) -> None:
    """Read one pickle to its end, or to the first instruction that PyTorch does not know either."""
    stack, marks, memo = [], [], {}
    for number, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if number > MOST_INSTRUCTIONS:
            raise PickleError("has too many parts to be a checkpoint")
        name = opcode.name
        if name in _ATOMS:
            if name == "GLOBAL":
                _check_global(argument)
            stack.append(_Value())
        elif name in ("EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET"):
            stack.append(_Value([]))
        elif name == "MARK":
            marks.append(stack)
            stack = []
        elif name in ("TUPLE", "APPENDS", "SETITEMS"):
            parts, stack = stack, marks.pop()
            stack.append(_Value(parts)) if name == "TUPLE" else stack[-1].take(parts)
        elif name in _TUPLES:
            stack[-_TUPLES[name] :] = [_Value(stack[-_TUPLES[name] :])]
        elif name in ("REDUCE", "NEWOBJ"):
            stack[-2:] = [_Value(stack[-2:])]
        elif name in ("APPEND", "BUILD"):
            stack[-2].take([stack.pop()])
        elif name == "SETITEM":
            stack[-3].take([stack.pop(), stack.pop()])
        elif name == "BINPERSID":
            stack[-1] = _Value([stack[-1]])
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
            stack[-1].shared = True
        elif name != "PROTO":
            return  # STOP, or what PyTorch refuses


def _check_global(argument: str) -> None:
    """Refuse what PyTorch would call, and what takes the size of its result from the pickle."""
    name = argument.rpartition(" ")[2]
    if name == "bytearray" or (name.endswith("Tensor") and argument != "torch Tensor"):
        raise PickleError(f"makes something that no checkpoint needs ({name!r:.80})")


class _Ignored:
    """Stands in for harmless objects beside the weights in a training checkpoint; their content is dropped."""

    def __new__(cls, *_):
        return super().__new__(cls)

    def __setstate__(self, state):
        pass


class _Arguments(_Ignored):
    """Stands in for the command line that timm's saver keeps: a Namespace, of which only plain values stay."""

    def __setstate__(self, state):
        if isinstance(state, dict):
            self.values = {name: value for name, value in state.items() if isinstance(name, str) and _is_plain(value)}


# The authors' learning rates, from np.interp, are NumPy numbers (module names before and since NumPy 2). The classes of
# activations may be among the arguments.
_KNOWN_GLOBALS = [
    (_Arguments, "argparse.Namespace"),
    (_Ignored, "numpy.dtype"),
    (_Ignored, "numpy.core.multiarray.scalar"),
    (_Ignored, "numpy._core.multiarray.scalar"),
    ("gelu", "torch.nn.modules.activation.GELU"),
    ("relu", "torch.nn.modules.activation.ReLU"),
]
_process_wide_settings = threading.Lock()  # torch's list of globals and the warning filters are not a thread's own


def read_pickle(path: Path, *, zipped: bool) -> tuple[dict[str, np.ndarray], dict]:
    """The state_dict in a file of torch.save, whose arrays share the tensors' memory, and what timm's train.py keeps
    beside it (see `convmixer.guess`). Raises CheckpointError.

    zipped: whether the file is a zip archive, which is memory-mapped.
    """
    try:
        with _process_wide_settings, torch.serialization.safe_globals(_KNOWN_GLOBALS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about other pickle protocols and sparse tensors: they end as errors below
            with open(path, "rb") as file:
                check_pickles(file)
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except PickleError as error:
        raise CheckpointError(str(error)) from error
    except Exception as error:  # a damaged pickle can trip torch into nearly any exception
        forbidden = re.search(r"GLOBAL (\S+)", str(error))
        if forbidden:
            raise CheckpointError(
                f"is refused, it could run code ({forbidden[1]!r:.80}); save a state_dict alone"
            ) from error
        raise CheckpointError(f"is truncated, damaged or no checkpoint: {error_summary(error)}") from error
    tensors = _find_state_dict(content)
    for name, tensor in tensors.items():
        if type(tensor) is not Tensor and type(tensor) is not torch.nn.Parameter:
            raise CheckpointError(f"holds no state_dict: {name!r:.80} is of type {type(tensor).__name__}, not a tensor")
        if tensor.device.type != "cpu" or tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized:
            raise CheckpointError(f"tensor {name!r:.80} is not a plain array")
        if tensor.is_complex():
            raise CheckpointError(f"tensor {name!r:.80} holds complex numbers")
    # A stride of zero lets a tiny file claim a huge tensor, which the conversion to float32 would then really make.
    if sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) > os.path.getsize(path):
        raise CheckpointError("claims more values than the file has room for")
    return {name: as_array(tensor) for name, tensor in tensors.items()}, _facts(content)


def _facts(content: object) -> dict:
    if not isinstance(content, dict):
        return {}
    architecture, arguments = content.get("arch"), content.get("args")
    values = getattr(arguments, "values", {}) if isinstance(arguments, _Arguments) else {}
    return facts_of_training(architecture if isinstance(architecture, str) else None, values)


def _is_plain(value: object, depth: int = 0) -> bool:
    """Whether this is a number, a text, or lists and dictionaries of a few of them."""
    if isinstance(value, list | tuple | dict):
        inside = [*value, *value.values()] if isinstance(value, dict) else value
        return depth < 2 and len(inside) < 1000 and all(_is_plain(each, depth + 1) for each in inside)
    return value is None or isinstance(value, bool | int | float | str)


def _find_state_dict(content: object) -> dict:
    if isinstance(content, dict):
        nested = (content.get(key) for key in STATE_DICT_KEYS)
        content = next((value for value in nested if isinstance(value, dict)), content)
    if not isinstance(content, dict) or not content or not all(isinstance(name, str) for name in content):
        raise CheckpointError("holds no state_dict; it must be a dictionary of tensors")
    return content
