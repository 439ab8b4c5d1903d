"""Which decoder reads a picture, found by how the file begins; each is imported when the first such file comes."""

import contextlib
import ctypes
import functools
import importlib
import io
import math
import re
import struct
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from PIL import ExifTags, Image, ImageFile, PngImagePlugin, TiffImagePlugin

SUPPORTED = "supported formats are JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF, HEIC, PPM and TGA"

_SIGNATURES = {
    "JPEG": rb"\xff\xd8\xff",
    "PNG": rb"\x89PNG\r\n\x1a\n",
    "WebP": rb"RIFF....WEBPVP8[ LX]",
    "GIF": rb"GIF8[79]a",
    "BMP": rb"BM",
    "TIFF": rb"II[*+]\0|MM\0[*+]|II\0[*]|MM[*]\0",
    "PPM": rb"P[456f]\s",
}
_DECODERS = {
    "JPEG": ("convmixer.jpegs", "Jpeg"),
    "PNG": ("PIL.PngImagePlugin", "PngImageFile"),
    "WebP": ("PIL.WebPImagePlugin", "WebPImageFile"),
    "GIF": ("PIL.GifImagePlugin", "GifImageFile"),
    "BMP": ("PIL.BmpImagePlugin", "BmpImageFile"),
    "TIFF": ("PIL.TiffImagePlugin", "TiffImageFile"),
    "AVIF": ("PIL.AvifImagePlugin", "AvifImageFile"),
    "HEIC": ("pillow_heif", "HeifImageFile"),
    "PPM": ("PIL.PpmImagePlugin", "PpmImageFile"),
    "TGA": ("PIL.TgaImagePlugin", "TgaImageFile"),
}
_AVIF_BRANDS = {b"avif", b"avis"}
_HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"}
_ANY_BRANDS = {b"mif1", b"msf1", b"mif2"}  # pictures, in whatever coding
_TGA_END = b"TRUEVISION-XFILE.\0"
_MOST_JPEGS_IN_TIFF = 2**16
_FAXES = (2, 3, 4, 32771)  # TIFF's numbers for CCITT's codes

_THREAD = threading.local()


class ImageError(ValueError):
    """A picture that cannot be used; the message is one line: what was wrong, and what would be right."""


class _Warnings:
    """In a module of Pillow's the place of ``warnings``, with no word to threads that are in `quiet`.

    Filters could not do this: they belong to the whole process, so that threads would have to wait for each other.
    """

    def __getattr__(self, name: str) -> object:
        return getattr(warnings, name)

    def warn(self, message, category=None, stacklevel: int = 1, **options) -> None:
        if not getattr(_THREAD, "quiet", False):
            warnings.warn(message, category, stacklevel + 1, **options)


# The modules that warn about what is in a file; that of TIFF reads the EXIF of all formats.
Image.warnings = PngImagePlugin.warnings = TiffImagePlugin.warnings = _Warnings()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep Pillow's warnings about files from the caller, whatever the filters of warnings say."""
    _THREAD.quiet, before = True, getattr(_THREAD, "quiet", False)
    try:
        yield
    finally:
        _THREAD.quiet = before


def identify(stream: BinaryIO, name: str) -> ImageFile.ImageFile:
    """Read a picture's header and no pixels. Image.open would first apply the size limit that the process shares.

    Left out, though Pillow has decoders: JPEG 2000, whose decoder takes 780 MB for 2 kB of header; ICO, whose decoder
    decodes before its size can be asked; TGA without the signature of its version 2, as nothing tells it from other
    files; PPM in text or with an unusual white, which are read by slow Python; and whatever needs another program.

    Raises ImageError for a file of another kind, and for some that are broken; Pillow's decoders raise anything.
    """
    prefix = stream.read(16)
    if not prefix:
        raise ImageError(f"{name} is empty; {SUPPORTED}")
    format = _format_of(prefix, stream)
    if format is None:
        raise ImageError(f"{name} cannot be read as a picture; {SUPPORTED}")
    stream.seek(0)
    try:
        image = _decoder_of(format)(stream)
    except ImportError as error:
        raise ImageError(f"{name} is HEIC: install pillow-heif, or save it as JPEG") from error
    except (SyntaxError, OSError, ValueError) as error:
        kind = f"begins like {format} but is damaged, cut short or something else"
        raise ImageError(f"{name} {kind}; {SUPPORTED}") from error
    if format == "PPM" and image.tile[0][0] != "raw":
        raise ImageError(f"{name} is a PPM whose white is neither 255 nor, in grey, 65535; save it with 255")
    return image


def is_recognised(prefix: bytes) -> bool:
    """Whether a file that begins so is taken for a picture."""
    return _format_of(prefix, io.BytesIO(prefix)) is not None


def _format_of(prefix: bytes, stream: BinaryIO) -> str | None:
    for format, signature in _SIGNATURES.items():
        if re.match(signature, prefix, re.DOTALL):
            return format
    if prefix[4:8] == b"ftyp":
        return _format_by_brands(prefix, stream)
    stream.seek(max(0, stream.seek(0, 2) - len(_TGA_END)))
    return "TGA" if stream.read() == _TGA_END else None


def _format_by_brands(prefix: bytes, stream: BinaryIO) -> str | None:
    """AVIF, HEIC or neither, from the brands in a file's first box, the most important of which comes first."""
    stream.seek(8)
    box = stream.read(min(int.from_bytes(prefix[:4]), 1024) - 8) if prefix[:4] > b"\0\0\0\x0f" else b""
    brands = [box[i : i + 4] for i in range(0, len(box), 4)]
    for brand in brands:
        if brand in _AVIF_BRANDS | _HEIC_BRANDS:
            return "AVIF" if brand in _AVIF_BRANDS else "HEIC"
    return "HEIC" if _ANY_BRANDS.intersection(brands) else None


def _decoder_of(format: str) -> type[ImageFile.ImageFile]:
    place, name = _DECODERS[format]
    if format == "TIFF":
        silence_libtiff()
    return getattr(importlib.import_module(place), name)


@functools.cache
def silence_libtiff() -> None:
    """Keep what libtiff says of damaged files from standard error, where nobody could tell which file it is about."""
    for file in Path(Image.__file__).parents[1].glob("pillow.libs/libtiff*"):
        with contextlib.suppress(OSError, AttributeError):  # another build of Pillow's
            library = ctypes.CDLL(str(file))
            library.TIFFSetErrorHandler(None)
            library.TIFFSetWarningHandler(None)


def check_tiff(image: TiffImagePlugin.TiffImageFile, name: str) -> None:
    """Refuse a TIFF of which Pillow 12.3 with libtiff 4.7.1 gives what the memory held before: others' pictures.

    That is one with a strip or tile that is a JPEG smaller than its place, and a fax that ends too early, which cannot
    be told from others: no fax is read.
    """
    tags = image.tag_v2
    if tags.get(ExifTags.Base.Compression) in _FAXES:
        raise ImageError(f"{name} is a TIFF compressed as a fax; save it again with another compression")
    if tags.get(ExifTags.Base.Compression) not in (6, 7) or image.fp is None:
        return
    width, height = tags[ExifTags.Base.ImageWidth], tags[ExifTags.Base.ImageLength]
    if ExifTags.Base.TileOffsets in tags:
        width, height = tags[ExifTags.Base.TileWidth], tags[ExifTags.Base.TileLength]
        rows, offsets = height, tags[ExifTags.Base.TileOffsets]
    else:
        rows, offsets = min(tags.get(ExifTags.Base.RowsPerStrip, height), height), tags[ExifTags.Base.StripOffsets]
    strips = math.ceil(height / rows)
    for i, offset in enumerate(offsets[:_MOST_JPEGS_IN_TIFF]):
        found = _jpeg_size(image.fp, offset)
        is_small = found[0] < width or found[1] < min(rows, height - rows * (i % strips))
        if is_small or len(offsets) > _MOST_JPEGS_IN_TIFF:
            raise ImageError(
                f"{name} is a TIFF whose parts have the wrong size; save it again with another compression"
            )


def _jpeg_size(file: BinaryIO, start: int) -> tuple[int, int]:
    """(width, height) out of the header of the JPEG that begins at ``start``; (0, 0) where there is none."""
    file.seek(start + 2)
    for _ in range(100):
        marker, length = struct.unpack(">HH", file.read(4))
        if 0xFFC0 <= marker <= 0xFFCF and marker not in (0xFFC4, 0xFFC8, 0xFFCC):
            return struct.unpack(">xHH", file.read(5))[::-1]
        if marker <= 0xFF00 or marker == 0xFFDA:
            break
        file.seek(length - 2, 1)
    return 0, 0
