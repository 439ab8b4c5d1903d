"""Any picture to a safe RGB image."""

import contextlib
import io
import os
import stat
from collections.abc import Iterator
from typing import BinaryIO

from PIL import ExifTags, Image, ImageFile
from PIL.TiffImagePlugin import TiffImageFile

from .colours import to_rgb
from .decoders import ImageError, check_tiff, identify, quiet
from .jpegs import Jpeg, reduce

MAX_PIXELS = 64_000_000  # 256 MB once decoded: Pillow keeps an RGB pixel in four bytes

_MOST_BYTES_A_PIXEL = 16
_ROW_AFTER_ROW = ("PNG", "GIF", "BMP", "PPM")  # in these the rows before the end of the file are right
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def load_image(
    source, *, max_pixels: int = MAX_PIXELS, target_size: int | None = None, allow_truncated: bool = False
) -> Image.Image:
    """Decode any picture to an upright 8-bit sRGB image that no longer needs its file.

    An animation gives its first frame, a colour profile is applied, transparency is laid on white, deep grey is scaled
    to 8 bits, and the EXIF orientation is applied (that of XMP is not, as in browsers; HEIC and AVIF have their own).
    The result carries no metadata.

    source: path (str or os.PathLike), bytes-like, binary file object (read whole) or PIL image (its current frame).
    target_size: the shortest side the caller needs, in pixels. A JPEG, from a file or bytes, is then decoded at the
        smallest of 1/2, 1/4 and 1/8 of its sides that is whole and leaves its short side DRAFT_MARGIN times that, if
        any does. None: all pixels.
    max_pixels: a larger picture is refused from its header, before any pixel is decoded. Only a JPEG of one scan is
        then decoded at such a fraction, whole or not, if that fits: libjpeg does this in little memory.
    allow_truncated: take a JPEG, PNG, GIF, BMP or PPM, from a file or bytes, whose data ends too early, with one colour
        for the pixels that are missing. Without it only a JPEG that lacks nothing but its end marker is taken.

    Raises ImageError, and nothing else, if the source gives no picture. Any number of threads may call this.
    """
    if isinstance(source, Image.Image):
        with _pillow_guarded("the picture"):
            _check_size(source, "the picture", max_pixels)
            return _decode(source, "the picture", allow_truncated)
    stream, name = _open(source)
    with stream, _pillow_guarded(name):
        image = identify(stream, name)
        if isinstance(image, Jpeg):
            reduce(image, stream, max_pixels, target_size)
        _check_size(image, name, max_pixels)
        rgb = _decode(image, name, allow_truncated)
        if isinstance(image, Jpeg) and image.is_cut and not allow_truncated and image.lacks_data(stream):
            raise ImageError(f"{name} is damaged or cut short; save or download it again")
        return rgb


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
    try:
        with quiet():
            yield
    except ImageError:
        raise
    except (MemoryError, Image.DecompressionBombError) as error:
        raise ImageError(f"{name} needs too much memory to decode; make it smaller and try again") from error
    except Exception as error:  # corrupt data makes Pillow raise nearly every type there is
        raise ImageError(f"{name} is damaged or cut short; save or download it again") from error


def _check_size(image: Image.Image, name: str, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        size = f"{width} x {height} pixels"
        raise ImageError(f"{name} is {size}, more than the {max_pixels:,} that can be read; make it smaller")
    if width * height == 0:
        raise ImageError(f"{name} has no pixels; give one with at least one")


def _decode(image: Image.Image, name: str, allow_truncated: bool) -> Image.Image:
    if isinstance(image, TiffImageFile):
        check_tiff(image, name)
    if isinstance(image, ImageFile.ImageFile):
        _load(image, allow_truncated)
    rgb = to_rgb(image)
    rgb.info.clear()  # nothing may be applied twice, should the result be loaded again
    turn = _UPRIGHT.get(_orientation(image))
    return rgb if turn is None else rgb.transpose(turn)


def _load(image: ImageFile.ImageFile, allow_truncated: bool) -> None:
    # Pillow copies what it has read of a row at every further block: a row of a million blocks would take hours.
    image.decodermaxblock = max(image.decodermaxblock, _MOST_BYTES_A_PIXEL * image.width)
    xmp = image.info.pop("xmp", None)  # Pillow turns a TIFF while it loads it, also as XMP says
    try:
        image.load()
    except OSError as error:
        if not allow_truncated or image.format not in _ROW_AFTER_ROW or "truncated" not in str(error):
            raise
        image.tile = []  # with the rows there are it counts as loaded
    finally:
        if xmp is not None:
            image.info["xmp"] = xmp


def _orientation(image: Image.Image) -> int:
    """What EXIF says, 1 to 8; Pillow's getexif would take XMP's word where there is none."""
    with contextlib.suppress(Exception):  # broken metadata says nothing about the pixels
        if isinstance(image, TiffImageFile):
            return int(image.tag_v2[ExifTags.Base.Orientation])
        exif = Image.Exif()
        exif.load(image.info["exif"])
        return int(exif[ExifTags.Base.Orientation])
    return 1
