"""Any picture to a safe RGB image."""

import contextlib
import io
import math
import os
import stat
import struct
import threading
import warnings
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

# Each registers its decoder. Only these ever see a file; Image.init() would load them all, in twice the time.
from PIL import (  # noqa: F401
    AvifImagePlugin,
    BmpImagePlugin,
    ExifTags,
    GifImagePlugin,
    Image,
    ImageFile,
    ImageOps,
    PngImagePlugin,
    WebPImagePlugin,
)
from PIL.JpegImagePlugin import JpegImageFile
from PIL.TiffImagePlugin import TiffImageFile

MAX_PIXELS = 64_000_000  # 256 MB once decoded: Pillow keeps an RGB pixel in four bytes
# A JPEG read at 1/2, 1/4 or 1/8 of its sides costs a fraction of the time. What is left is at least so many times what
# the caller needs, so that the resize after it still averages over several pixels and hides the difference.
DRAFT_MARGIN = 3

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
_MOST_BYTES_A_PIXEL = 16
_MOST_JPEGS_IN_TIFF = 2**16
_SUPPORTED = "supported formats are JPEG, PNG, WebP, GIF, BMP, TIFF and AVIF"

# Warning filters belong to the whole process; without a lock two threads could restore them in the wrong order.
_FILTERS_LOCK = threading.Lock()


class ImageError(ValueError):
    """A picture that cannot be used; the message is one line: what was wrong, and what would be right."""


def load_image(source, *, max_pixels: int = MAX_PIXELS, target_size: int | None = None) -> Image.Image:
    """Decode any picture to an upright 8-bit RGB image that no longer needs its file.

    An animation gives its first frame, transparency is laid on white, deep grey is scaled to 8 bits, and the EXIF
    orientation is applied. The result carries no metadata.

    source: path (str or os.PathLike), bytes-like, binary file object (read whole) or PIL image (its current frame).
    target_size: the shortest side the caller needs, in pixels. A JPEG, from a file or bytes, is then decoded at the
        smallest of 1/2, 1/4 and 1/8 of its sides that is whole and leaves its short side DRAFT_MARGIN times that, if
        any does. None: all pixels.
    max_pixels: a larger picture is refused from its header, before any pixel is decoded. Only a JPEG of one scan is
        then decoded at such a fraction, whole or not, if that fits: libjpeg does this in little memory.

    Raises ImageError, and nothing else, if the source gives no picture.
    """
    if isinstance(source, Image.Image):
        with _pillow_guarded("the picture"):
            return _decode(source, "the picture", max_pixels)
    stream, name = _open(source)
    with stream, _pillow_guarded(name):
        image = _identify(stream, name)
        if isinstance(image, JpegImageFile):
            _reduce(image, stream, max_pixels, target_size)
        return _decode(image, name, max_pixels)


def _open(source) -> tuple[BinaryIO, str]:
    """A seekable binary stream, and what to call it in messages: a path on one line that any terminal can print."""
    if isinstance(source, (str, os.PathLike)):
        path = os.fsdecode(source)
        name = "".join(character if character.isprintable() else "?" for character in path)
        return _open_file(path, name[-300:]), name[-300:]
    if hasattr(source, "read"):
        source = read_all(source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return io.BytesIO(bytes(source)), "the picture"
    kind = type(source).__name__
    raise ImageError(f"no picture can be read from {kind}; give a path, bytes, a binary file object or a PIL image")


def _open_file(path: str, name: str) -> BinaryIO:
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISREG(mode):  # asked before opening, because opening a pipe waits for its writer
            return open(path, "rb")
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        reason = getattr(error, "strerror", None) or "not a valid path"
        raise ImageError(f"{name} cannot be opened ({reason}); give the path of a picture file") from error
    kind = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
    raise ImageError(f"{name} is {kind}; give the path of a picture file")


def read_all(file) -> bytes:
    """The content of a binary file object, from its start where it can go back there. Raises ImageError."""
    try:
        with contextlib.suppress(AttributeError, OSError):  # a pipe cannot go back to its start
            file.seek(0)
        return memoryview(file.read()).tobytes()
    except Exception as error:  # whatever the caller's object raises, and TypeError for text
        raise ImageError("the picture's file object gives no bytes; open it in binary mode ('rb')") from error


@contextlib.contextmanager
def _pillow_guarded(name: str) -> Iterator[None]:
    """Turn whatever Pillow raises into one ImageError, and keep its warnings quiet."""
    with _FILTERS_LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except ImageError:
            raise
        except (MemoryError, Image.DecompressionBombError) as error:
            raise ImageError(f"{name} needs too much memory to decode; make it smaller and try again") from error
        except Exception as error:  # corrupt data makes Pillow raise nearly every type there is
            raise ImageError(f"{name} is damaged or cut short; save or download it again") from error


def _identify(stream: BinaryIO, name: str) -> ImageFile.ImageFile:
    """Read a picture's header and no pixels. Image.open would first apply the size limit that the process shares."""
    prefix = stream.read(16)
    if not prefix:
        raise ImageError(f"{name} is empty; {_SUPPORTED}")
    for format in _FORMATS:
        decoder, accept = Image.OPEN[format]
        if format == "JPEG":
            decoder = JpegImageFile  # ignores the list of further pictures that phones add, which may be broken
        if accept(prefix) is True:  # text, if Pillow was built without this decoder
            stream.seek(0)
            try:
                return decoder(stream)
            except (SyntaxError, OSError, ValueError) as error:
                kind = f"begins like {format} but is damaged, cut short or something else"
                raise ImageError(f"{name} {kind}; {_SUPPORTED}") from error
    raise ImageError(f"{name} cannot be read as a picture; {_SUPPORTED}")


def _reduce(image: JpegImageFile, stream: BinaryIO, max_pixels: int, target_size: int | None) -> None:
    """Have libjpeg decode at the scale that load_image describes, if there is one."""
    width, height = image.size
    too_large = width * height > max_pixels
    if too_large:
        if not _has_one_scan(image, stream):
            return
        scales = [s for s in (2, 4, 8) if math.ceil(width / s) * math.ceil(height / s) <= max_pixels]
    else:  # other scales would stretch the picture by what is missing in its last column or row
        scales = [s for s in (1, 2, 4, 8) if width % s == height % s == 0]
    if scales:
        enough = [s for s in scales if target_size and min(width, height) // s >= DRAFT_MARGIN * target_size]
        scale = max(enough, default=scales[0])
        if scale > 1:
            image.draft(None, (max(1, width // scale), max(1, height // scale)))


def _has_one_scan(image: JpegImageFile, stream: BinaryIO) -> bool:
    """Whether the first scan holds the whole picture. If not, libjpeg keeps all coefficients in memory at full size."""
    # Pillow has just read that scan's header: its length in two bytes, the number of components, two bytes for each,
    # three more.
    length = 6 + 2 * image.layers
    stream.seek(-length, os.SEEK_CUR)
    return stream.read(3) == bytes([0, length, image.layers]) and "progressive" not in image.info


def _decode(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    width, height = image.size
    if width * height > max_pixels:
        size = f"{width} x {height} pixels"
        raise ImageError(f"{name} is {size}, more than the {max_pixels:,} that can be read; make it smaller")
    if width * height == 0:
        raise ImageError(f"{name} has no pixels; give one with at least one")
    if isinstance(image, TiffImageFile):
        _check_jpegs_in_tiff(image, name)
    if isinstance(image, ImageFile.ImageFile):
        # Pillow copies what it has read of a row at every further block: a row of a million blocks would take hours.
        image.decodermaxblock = max(image.decodermaxblock, _MOST_BYTES_A_PIXEL * width)
    image.load()
    rgb = _to_rgb(image)
    rgb.info.clear()  # nothing may be applied twice, should the result be loaded again
    with contextlib.suppress(Exception):  # broken metadata says nothing about the pixels
        rgb.getexif()[ExifTags.Base.Orientation] = int(image.getexif()[ExifTags.Base.Orientation])
    ImageOps.exif_transpose(rgb, in_place=True)
    return rgb


def _check_jpegs_in_tiff(image: TiffImageFile, name: str) -> None:
    """Refuse a TIFF with a strip or tile that is a JPEG smaller than its place.

    Pillow 12.3 with libtiff 4.7.1 then gives whatever the memory held before: perhaps somebody else's picture.
    """
    tags = image.tag_v2
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
        file.seek(length - 2, os.SEEK_CUR)
    return 0, 0


def _to_rgb(image: Image.Image) -> Image.Image:
    """A new RGB image; Pillow's own conversion would clip deep grey and show transparency as black."""
    if image.mode == "F" or image.mode.startswith("I"):
        image = _deep_grey_to_8_bits(image)
    if image.mode == "La":
        image = image.convert("LA")  # Pillow knows no other way from here to RGBA
    if not image.has_transparency_data:
        return image.convert("RGB")
    if image.mode != "RGBA":  # or the conversion would be one more copy
        image = image.convert("RGBA")
    canvas = Image.new("RGB", image.size, "white")
    canvas.paste(image, mask=image)
    return canvas


def _deep_grey_to_8_bits(image: Image.Image) -> Image.Image:
    """Modes I;16*, I and F to L, or to LA if one grey is marked as transparent.

    16 bits have a fixed white. I and F name none: it is the first of 1 (F only), 255 and 65535 that no value exceeds;
    with larger values, or with some below 0, the range found is stretched from black to white.
    """
    values = np.asarray(image)
    whites = {"u": (65535,), "i": (255, 65535), "f": (1, 255, 65535)}[values.dtype.kind]
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    black, white = next(((0, white) for white in whites if low >= 0 and high <= white), (low, high))
    scaled = values.astype(np.float32)
    scaled -= black
    scaled *= 255 / (white - black or 1)
    np.nan_to_num(scaled, copy=False)
    grey = Image.fromarray(np.rint(scaled.clip(0, 255, out=scaled)).astype(np.uint8))
    if "transparency" in image.info:
        grey.putalpha(Image.fromarray(np.uint8(255) * (values != image.info["transparency"])))
    return grey
