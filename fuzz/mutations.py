"""Damage to bytes: what any file may suffer, and what hurts containers of chunks, segments, boxes or tags.

Every function takes a numpy.random.Generator first and is deterministic for it.
"""

import struct
import zlib
from collections.abc import Callable

import numpy as np

MAX_BYTES = 2**20  # of a mutated file: doubling something again and again must end somewhere
INTERESTING = (0, 1, 2, 7, 8, 16, 31, 127, 128, 255, 256, 32767, 32768, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1)
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"

Rng = np.random.Generator
Pieces = list[bytes]


def pick(rng: Rng, choices):
    return choices[int(rng.integers(len(choices)))]


def chance(rng: Rng, probability: float) -> bool:
    return bool(rng.random() < probability)


def some_bytes(rng: Rng, most: int = 64) -> bytes:
    return rng.bytes(int(rng.integers(1, most + 1)))


def position(rng: Rng, data: bytes) -> int:
    """A place in ``data``; every second one among the first hundred bytes, where the headers are."""
    return int(rng.integers(min(len(data), 100 if chance(rng, 0.5) else len(data)))) if data else 0


# What any file may suffer.


def flip_bits(rng: Rng, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(int(rng.integers(1, 9)) if data else 0):
        changed[position(rng, data)] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def set_bytes(rng: Rng, data: bytes) -> bytes:
    at, new = position(rng, data), some_bytes(rng, 16)
    return data[:at] + new + data[at + len(new) :]


def set_number(rng: Rng, data: bytes) -> bytes:
    """A 16- or 32-bit number, in either byte order, becomes one that programs trip over."""
    at, (form, size) = position(rng, data), pick(rng, ((">H", 2), ("<H", 2), (">I", 4), ("<I", 4)))
    return data[:at] + struct.pack(form, pick(rng, INTERESTING) % 256**size) + data[at + size :]


def nudge_number(rng: Rng, data: bytes) -> bytes:
    """A 16- or 32-bit number, in either byte order, becomes a little larger or smaller."""
    at, (form, size) = position(rng, data), pick(rng, ((">H", 2), ("<H", 2), (">I", 4), ("<I", 4)))
    if at + size > len(data):
        return data
    value = struct.unpack(form, data[at : at + size])[0] + int(rng.integers(-20, 21))
    return data[:at] + struct.pack(form, value % 256**size) + data[at + size :]


def cut_off(rng: Rng, data: bytes) -> bytes:
    return data[: position(rng, data)]


def remove(rng: Rng, data: bytes) -> bytes:
    at = position(rng, data)
    return data[:at] + data[at + int(rng.integers(1, 65)) :]


def insert(rng: Rng, data: bytes) -> bytes:
    at = position(rng, data)
    new = bytes([int(rng.integers(256))]) * int(rng.integers(1, 400)) if chance(rng, 0.3) else some_bytes(rng)
    return data[:at] + new + data[at:]


def repeat(rng: Rng, data: bytes) -> bytes:
    at = position(rng, data)
    return data[:at] + data[at : at + int(rng.integers(1, 200))] * int(rng.integers(1, 20)) + data[at:]


def move(rng: Rng, data: bytes) -> bytes:
    a, b = sorted((position(rng, data), position(rng, data)))
    return data[b:] + data[a:b] + data[:a] if chance(rng, 0.2) else data[:a] + data[b:] + data[a:b]


PLAIN = (flip_bits, flip_bits, set_bytes, set_number, set_number, nudge_number, cut_off, remove, insert, repeat, move)


def splice(rng: Rng, data: bytes, other: bytes) -> bytes:
    """The start of one file and the end of another."""
    return data[: position(rng, data)] + other[position(rng, other) :]


# Containers: cut in pieces, the pieces changed, and put together so that lengths and checksums are right again.


def _shuffle_pieces(rng: Rng, pieces: Pieces, others: Pieces, change: Callable[[Rng, bytes], bytes]) -> Pieces:
    """One of: a piece changed, removed, doubled many times, moved, or replaced by another file's."""
    pieces = list(pieces)
    if not pieces:
        return pieces
    at, to = (int(rng.integers(len(pieces))) for _ in range(2))
    match int(rng.integers(6)):
        case 0 | 1:
            pieces[at] = change(rng, pieces[at])
        case 2:
            del pieces[at]
        case 3:
            pieces[at:at] = [pieces[at]] * int(pick(rng, (1, 1, 2, 10, 300)))
        case 4:
            pieces.insert(to, pieces.pop(at))
        case 5:
            pieces.insert(at, pick(rng, others or pieces))
    return pieces


def png_pieces(data: bytes) -> Pieces:
    """Kind and content of each chunk of a PNG."""
    pieces, at = [], 8
    while at + 8 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        pieces.append(data[at + 4 : at + 8 + length])
        at += 12 + length
    return pieces


def png_joined(pieces: Pieces) -> bytes:
    """A PNG of these chunks; the checksums are right, so that a decoder looks into them."""
    chunks = (struct.pack(">I", max(0, len(each) - 4)) + each + struct.pack(">I", zlib.crc32(each)) for each in pieces)
    return PNG_MAGIC + b"".join(chunks)


def _change_png_chunk(rng: Rng, piece: bytes) -> bytes:
    kind, content = piece[:4], piece[4:]
    if kind in (b"IDAT", b"zTXt") and chance(rng, 0.7):  # what is inside, so that it can still be unpacked
        try:
            content = zlib.compress(pick(rng, PLAIN)(rng, zlib.decompress(content)))
        except zlib.error:
            content = pick(rng, PLAIN)(rng, content)
        return kind + content
    if chance(rng, 0.15):
        kind = pick(
            rng, (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"iCCP", b"eXIf", b"zTXt", b"iTXt", b"acTL", b"fcTL", b"fdAT")
        )
    return kind + pick(rng, PLAIN)(rng, content)


def jpeg_pieces(data: bytes) -> Pieces:
    """The segments of a JPEG with their markers; what follows the first scan's header stays with it."""
    pieces, at = [data[:2]], 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        pieces.append(data[at:end])
        at = end
    return [*pieces, data[at:]]


def _change_jpeg_segment(rng: Rng, piece: bytes) -> bytes:
    changed = pick(rng, PLAIN)(rng, piece[4:])
    length = len(changed) + 2 if chance(rng, 0.9) else pick(rng, INTERESTING)
    return piece[:2] + struct.pack(">H", length % 65536) + changed


def riff_pieces(data: bytes) -> Pieces:
    """The chunks of a WebP, each with its kind and without its length."""
    pieces, at = [], 12
    while at + 8 <= len(data):
        length = int.from_bytes(data[at + 4 : at + 8], "little")
        pieces.append(data[at : at + 4] + data[at + 8 : at + 8 + length])
        at += 8 + length + length % 2
    return pieces


def riff_joined(pieces: Pieces) -> bytes:
    chunks = b""
    for piece in pieces:
        content = piece[4:]
        chunks += piece[:4] + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2)
    return b"RIFF" + struct.pack("<I", len(chunks) + 4) + b"WEBP" + chunks


def box_pieces(data: bytes) -> Pieces:
    """The outermost boxes of an AVIF, each with its kind and without its length."""
    pieces, at = [], 0
    while at + 8 <= len(data):
        length = max(8, int.from_bytes(data[at : at + 4], "big"))
        pieces.append(data[at + 4 : at + length])
        at += length
    return pieces


def box_joined(pieces: Pieces) -> bytes:
    return b"".join(struct.pack(">I", len(piece) + 4) + piece for piece in pieces)


def _change_content(rng: Rng, piece: bytes) -> bytes:
    return piece[:4] + pick(rng, PLAIN)(rng, piece[4:])


def change_tiff_entry(rng: Rng, data: bytes) -> bytes:
    """One entry of a TIFF's first directory gets another tag, type, count or value."""
    order = "<" if data[:2] == b"II" else ">"
    at = struct.unpack(order + "I", data[4:8])[0] if len(data) >= 8 else 0
    if at + 14 > len(data):
        return flip_bits(rng, data)
    count = struct.unpack(order + "H", data[at : at + 2])[0]
    entry = at + 2 + 12 * int(rng.integers(max(1, min(count, 100))))
    offset, size, values = pick(
        rng,
        (
            (
                0,
                2,
                (254, 256, 257, 258, 259, 262, 273, 274, 277, 278, 279, 284, 317, 320, 322, 323, 324, 338, 339, 347),
            ),
            (2, 2, (*range(1, 14), 16, 17)),
            (4, 4, INTERESTING),
            (8, 4, (*INTERESTING, *range(3, 13), 32773, 34712, 50000, 50001, 8000, 100_000)),
        ),
    )
    value = pick(rng, values) % 256**size
    at = entry + offset
    return data[:at] + struct.pack(order + ("H" if size == 2 else "I"), value) + data[at + size :]


def change_container(rng: Rng, data: bytes, other: bytes) -> bytes:
    """Damage that knows the kind of picture by its first bytes, so that it gets past the first checks of a decoder."""
    if data.startswith(PNG_MAGIC):
        return png_joined(_shuffle_pieces(rng, png_pieces(data), png_pieces(other), _change_png_chunk))
    if data.startswith(b"\xff\xd8"):
        others = jpeg_pieces(other) if other.startswith(b"\xff\xd8") else []
        return b"".join(_shuffle_pieces(rng, jpeg_pieces(data), others, _change_jpeg_segment))
    if data.startswith(b"RIFF"):
        others = riff_pieces(other) if other.startswith(b"RIFF") else []
        return riff_joined(_shuffle_pieces(rng, riff_pieces(data), others, _change_content))
    if data[4:8] == b"ftyp":
        return box_joined(_shuffle_pieces(rng, box_pieces(data), [], _change_content))
    if data[:2] in (b"II", b"MM"):
        return change_tiff_entry(rng, data)
    return pick(rng, PLAIN)(rng, data)


def set_size(rng: Rng, data: bytes) -> bytes:
    """Another width and height in the header, often huge ones."""
    sides = (0, 1, 3, 17, 1000, 7999, 8000, 8001, 20_000, 65_500, 65_535, 2**31 - 1, 2**31, 2**32 - 1)
    width, height = pick(rng, sides), pick(rng, sides)
    if data.startswith(PNG_MAGIC) and (pieces := png_pieces(data)):
        pieces[0] = pieces[0][:4] + struct.pack(">II", width, height) + pieces[0][12:]
        return png_joined(pieces)
    if data.startswith(b"\xff\xd8"):
        starts = [at for kind in (0xC0, 0xC1, 0xC2) if (at := data.find(bytes([0xFF, kind]))) > 0]
        at = min(starts, default=0)
        return data[: at + 5] + struct.pack(">HH", height % 65536, width % 65536) + data[at + 9 :]
    if data[:3] == b"GIF":  # of the screen, or of the first picture on it
        at = 6 if chance(rng, 0.5) else data.find(b",") + 5
        return data[:at] + struct.pack("<HH", width % 65536, height % 65536) + data[at + 4 :]
    if data[:2] == b"BM":
        return data[:18] + struct.pack("<II", width, height) + data[26:]
    if data[8:16] == b"WEBPVP8X":
        packed = (width % 2**24).to_bytes(3, "little") + (height % 2**24).to_bytes(3, "little")
        return data[:24] + packed + data[30:]
    if data[8:16] == b"WEBPVP8 ":
        return data[:26] + struct.pack("<HH", width % 65536, height % 65536) + data[30:]
    if (at := data.find(b"ispe")) > 0:  # AVIF
        return data[: at + 8] + struct.pack(">II", width, height) + data[at + 16 :]
    return set_number(rng, data)


def mutate(rng: Rng, data: bytes, other: bytes) -> bytes:
    """One to four kinds of damage, one after the other; ``other`` is a second file, for splices."""
    for _ in range(int(pick(rng, (1, 1, 1, 2, 2, 3, 4)))):
        kind = rng.random()
        if kind < 0.45:
            data = change_container(rng, data, other)
        elif kind < 0.6:
            data = set_size(rng, data)
        elif kind < 0.67:
            data = splice(rng, data, other)
        else:
            data = pick(rng, PLAIN)(rng, data)
        data = data[:MAX_BYTES]
    return data
