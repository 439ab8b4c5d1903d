"""What a pickle would make of itself, found out without making it.

PyTorch's ``weights_only`` runs no code out of a pickle, but builds whatever it describes: tuples in tuples, deep enough
to overrun the stack when they are hashed; or a few bytes that refer to each other so often that writing the value down
would take years; or a bytearray of a terabyte. Here a pickle is followed with sizes in the place of values.
"""

import pickletools
import zipfile
from typing import BinaryIO

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
