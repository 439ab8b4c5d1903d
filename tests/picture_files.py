"""Small encoded pictures and colour profiles, written by the tests, and what loading them must end in."""

import io
import math
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from convmixer.images import ImageError, load_image

ORIENTATION = 0x0112


def noise(width: int, height: int) -> Image.Image:
    values = np.random.default_rng((width, height)).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def gradient(width: int, height: int) -> Image.Image:
    return Image.linear_gradient("L").resize((width, height)).convert("RGB")


def encode(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[ORIENTATION] = orientation
    return tags


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, colour: int, rows: bytes, extra: bytes = b"") -> bytes:
    """A PNG written by hand; `rows` are the filtered rows, `extra` the chunks before the pixels."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    pixels = png_chunk(b"IDAT", zlib.compress(rows, 9))
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + extra + pixels + png_chunk(b"IEND", b"")


def png_bomb(side: int) -> bytes:
    """A complete black 1-bit PNG of side x side pixels, in a few kilobytes."""
    return png(side, side, 1, 0, bytes(side * (1 + math.ceil(side / 8))))


def refuse(source, **options) -> str:
    """The message of the ImageError that loading must end in."""
    with pytest.raises(ImageError) as caught:
        load_image(source, **options)
    message = str(caught.value)
    assert message and message.isprintable(), "a message is one line that any terminal can print"
    return message


def pixels(source, **options) -> np.ndarray:
    return np.asarray(load_image(source, **options))


def heic(image: Image.Image, **options) -> bytes:
    """HEIC as pillow-heif writes it."""
    pillow_heif = pytest.importorskip("pillow_heif")
    stream = io.BytesIO()
    pillow_heif.from_pillow(image).save(stream, **{"quality": 95} | options)
    return stream.getvalue()


def icc_profile(space: bytes, tags: dict[bytes, bytes], pcs: bytes = b"XYZ ", kind: bytes = b"mntr") -> bytes:
    """An ICC profile of version 2; tags: the content of each."""
    table, data = b"", b""
    for name, content in ({b"wtpt": icc_xyz(0.9642, 1, 0.8249)} | tags).items():
        content += bytes(-len(content) % 4)
        table += name + struct.pack(">II", 132 + 12 * (len(tags) + 1) + len(data), len(content))
        data += content
    body = struct.pack(">I", len(tags) + 1) + table + data
    white = struct.pack(">3i", 63190, 65536, 54061)
    start = struct.pack(">I4xI4s4s4s12x4s28x", 128 + len(body), 0x02400000, kind, space, pcs, b"acsp")
    return start + white + bytes(48) + body


def icc_xyz(*values: float) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(65536 * value) for value in values))


def icc_gamma(gamma: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(256 * gamma))


def rgb_profile(matrix: np.ndarray, gamma: float) -> bytes:
    """matrix: linear RGB to XYZ under D50, (3, 3)."""
    colours = {name + b"XYZ": icc_xyz(*matrix[:, i]) for i, name in enumerate((b"r", b"g", b"b"))}
    return icc_profile(b"RGB ", colours | {name + b"TRC": icc_gamma(gamma) for name in (b"r", b"g", b"b")})


WIDE = np.array([[0.7977, 0.1352, 0.0313], [0.2880, 0.7119, 0.0001], [0, 0, 0.8249]])  # ProPhoto RGB
WIDE_PROFILE = rgb_profile(WIDE, 1.8)
SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])


def srgb_curve(linear: np.ndarray) -> np.ndarray:
    """Light of 0 to 1 as sRGB values of 0 to 255."""
    linear = np.clip(linear, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def wide_to_srgb(values: np.ndarray) -> np.ndarray:
    """What WIDE_PROFILE's values (..., 3), uint8, are in sRGB, by its own arithmetic."""
    return srgb_curve((values / 255) ** 1.8 @ WIDE.T @ np.linalg.inv(SRGB).T)
