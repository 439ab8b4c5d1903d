"""Any picture to a safe RGB image, and an RGB image to the network's input."""

import contextlib
import io
import math
import os
import stat
import threading
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import BinaryIO

import numpy as np
import torch
from PIL import ExifTags, Image, ImageFile
from PIL.JpegImagePlugin import JpegImageFile

MAX_PIXELS = 64_000_000  # 256 MB once decoded: Pillow keeps an RGB pixel in four bytes

Image.init()  # registers the decoders, of which only these ever see a file
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
_SUPPORTED = "supported formats are JPEG, PNG, WebP, GIF, BMP, TIFF and AVIF"

_FLIP = Image.Transpose
_UPRIGHT = {  # EXIF orientation (tag 0x0112) to what makes the stored picture upright
    2: _FLIP.FLIP_LEFT_RIGHT, 3: _FLIP.ROTATE_180, 4: _FLIP.FLIP_TOP_BOTTOM, 5: _FLIP.TRANSPOSE,
    6: _FLIP.ROTATE_270, 7: _FLIP.TRANSVERSE, 8: _FLIP.ROTATE_90,
}

# Warning filters belong to the whole process; without a lock two threads could restore them in the wrong order.
_FILTERS_LOCK = threading.Lock()

_INTERPOLATIONS = {filter.name.lower(): filter for filter in Image.Resampling}
_WIDEST_FILTER = 3  # Lanczos looks this many pixels to each side
_MAX_RESIZE = 8192  # keeps any checkpoint's preprocessing within reasonable memory


class ImageError(ValueError):
    """A picture that cannot be used; the message is one line: what was wrong, and what would be right."""


def load_image(source, *, max_pixels: int = MAX_PIXELS, target_size: int | None = None) -> Image.Image:
    """Decode any picture to an upright 8-bit RGB image that no longer needs its file.

    An animation gives its first frame, transparency is laid on white, deep grey is scaled to 8 bits, and the EXIF
    orientation is applied. The result carries no metadata.

    source: path (str or os.PathLike), bytes-like, binary file object (read whole) or PIL image (its current frame).
    max_pixels: a larger picture is refused from its header, before any pixel is decoded. The exception is a baseline
        JPEG, which libjpeg can decode at 1/2, 1/4 or 1/8 of its sides in little memory: it is read at a scale that
        fits, if one does. Pictures within the limit are always decoded at full resolution.
    target_size: the shortest side the caller needs, in pixels. A JPEG over the limit is then read at the smallest
        scale that keeps its short side at twice that or more; with None, at the largest scale that fits.

    Raises ImageError, and nothing else, if the source gives no picture.
    """
    if isinstance(source, Image.Image):
        with _pillow_guarded("the picture"):
            return _decode(source, "the picture", max_pixels)
    stream, name = _open(source)
    with stream, _pillow_guarded(name):
        image = _identify(stream, name)
        if isinstance(image, JpegImageFile) and math.prod(image.size) > max_pixels:
            _reduce(image, stream, max_pixels, target_size)
        return _decode(image, name, max_pixels)


def _open(source) -> tuple[BinaryIO, str]:
    """A seekable binary stream, and what to call it in messages: a path on one line that any terminal can print."""
    if isinstance(source, (str, os.PathLike)):
        path = os.fsdecode(source)
        name = "".join(character if character.isprintable() else "?" for character in path)[-300:]
        return _open_file(path, name), name
    if hasattr(source, "read"):
        source = _read_all(source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return io.BytesIO(bytes(source)), "the picture"
    kind = type(source).__name__
    raise ImageError(f"no picture can be read from {kind}; give a path, bytes, a binary file object or a PIL image")


def _open_file(path: str, name: str) -> BinaryIO:
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISREG(mode):  # asked before opening, because opening a pipe waits for its writer
            return open(path, "rb")
    except FileNotFoundError as error:
        raise ImageError(f"{name} does not exist; give the path of a picture file") from error
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        reason = getattr(error, "strerror", None) or "not a valid path"
        raise ImageError(f"{name} cannot be opened ({reason}); give the path of a readable picture file") from error
    kind = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
    raise ImageError(f"{name} is {kind}; give the path of a picture file")


def _read_all(file) -> bytes:
    try:
        with contextlib.suppress(AttributeError, io.UnsupportedOperation):  # a pipe cannot go back to its start
            file.seek(0)
        data = file.read()
    except Exception as error:  # whatever the caller's object raises
        raise ImageError("the picture's file object cannot be read; open it in binary mode ('rb')") from error
    if not isinstance(data, bytes):
        raise ImageError("the picture's file object does not give bytes; open it in binary mode ('rb')")
    return data


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
            message = f"{name} is damaged or cut short and cannot be decoded; save or download it again"
            raise ImageError(message) from error


def _identify(stream: BinaryIO, name: str) -> ImageFile.ImageFile:
    """Read a picture's header; its pixels stay undecoded.

    Image.open is no help: it has a size limit of its own, which the whole process shares, and it would refuse a large
    JPEG before `draft` could reduce it.
    """
    prefix = stream.read(16)
    if not prefix:
        raise ImageError(f"{name} is empty; {_SUPPORTED}")
    for format in _FORMATS:
        decoder, accept = Image.OPEN[format]
        if isinstance(accept(prefix), str):  # Pillow's way to say that it was built without this decoder
            raise ImageError(f"{name} is {format}, which the installed Pillow cannot decode; save it as PNG or JPEG")
        if accept(prefix):
            stream.seek(0)
            with contextlib.suppress(SyntaxError, OSError, ValueError):
                # Not Pillow's opener of JPEG: it stumbles over a broken list of further pictures, as phones add them.
                return JpegImageFile(stream) if format == "JPEG" else decoder(stream)
    raise ImageError(f"{name} is not a picture that can be read; {_SUPPORTED}")


def _reduce(image: JpegImageFile, stream: BinaryIO, max_pixels: int, target_size: int | None) -> None:
    """Have libjpeg decode at the scale that load_image describes, if there is one."""
    # Only if the first scan holds the whole picture: otherwise libjpeg keeps all coefficients in memory at full size.
    # Pillow has just read that scan's header: two bytes of length, one with the number of components, two for each
    # of them, and three more (ITU-T T.81, B.2.3).
    length = 6 + 2 * image.layers
    stream.seek(-length, os.SEEK_CUR)
    if stream.read(3) != bytes([0, length, image.layers]) or "progressive" in image.info:
        return
    width, height = image.size
    fitting = [scale for scale in (2, 4, 8) if _ceil_div(width, scale) * _ceil_div(height, scale) <= max_pixels]
    if fitting:
        enough = [scale for scale in fitting if target_size and min(width, height) // scale >= 2 * target_size]
        scale = max(enough, default=fitting[0])
        image.draft(None, (max(1, width // scale), max(1, height // scale)))


def _decode(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    width, height = image.size
    if width * height > max_pixels:
        size = f"{width} x {height} pixels"
        raise ImageError(f"{name} is {size}, more than the limit of {max_pixels:,} pixels in all; make it smaller")
    if width * height == 0:
        raise ImageError(f"{name} has no pixels; give one with at least one")
    image.load()
    orientation = _orientation(image)
    image = _to_rgb(image)
    if orientation in _UPRIGHT:
        image = image.transpose(_UPRIGHT[orientation])
    image.info.clear()  # or loading the result again would apply the orientation twice
    return image


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # broken metadata says nothing about the pixels
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    """A new RGB image; Pillow's own conversion would clip deep grey and show transparency as black."""
    if image.mode == "F" or image.mode.startswith("I"):
        image = _deep_grey_to_8_bits(image)
    if image.mode == "La":
        image = image.convert("LA")  # Pillow knows no other way from here to RGBA
    if not image.has_transparency_data:
        return image.convert("RGB")
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
    usual_whites = {"u": (65535,), "i": (255, 65535), "f": (1, 255, 65535)}[values.dtype.kind]
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    fitting = [white for white in usual_whites if low >= 0 and high <= white]
    black, white = (0, fitting[0]) if fitting else (low, high)
    scaled = values.astype(np.float32)
    scaled -= black
    scaled *= 255 / (white - black or 1)
    np.nan_to_num(scaled, copy=False)
    grey = Image.fromarray(np.rint(scaled.clip(0, 255, out=scaled)).astype(np.uint8))
    if "transparency" in image.info:
        grey.putalpha(Image.fromarray(np.uint8(255) * (values != image.info["transparency"])))
    return grey


@dataclass(frozen=True)
class Preprocessing:
    """How an RGB image becomes the network's input: resize its short side, crop the centre, scale to 0..1, normalise.

    size: side of the network's square input in pixels, 1 to 4096.
    crop_pct: the part of the resized short side that the crop keeps, above 0 and at most 1; resize is at most 8192.
    interpolation: nearest, bilinear, bicubic, box, hamming or lanczos, as Pillow defines them.
    mean, std: of the three channels, for values in 0..1; std is above 0.

    Raises ValueError if a field is not so.
    """

    size: int
    crop_pct: float = 1.0
    interpolation: str = "bicubic"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        size, crop_pct, interpolation, mean, std = self.size, self.crop_pct, self.interpolation, self.mean, self.std
        _require(type(size) is int and 1 <= size <= 4096, "size", size, "an integer from 1 to 4096")
        _require(_is_number(crop_pct) and 0 < crop_pct <= 1, "crop_pct", crop_pct, "above 0 and at most 1")
        _require(size / crop_pct <= _MAX_RESIZE, "crop_pct", crop_pct, f"at least size / {_MAX_RESIZE}")
        known = isinstance(interpolation, str) and interpolation in _INTERPOLATIONS
        _require(known, "interpolation", interpolation, f"one of {', '.join(_INTERPOLATIONS)}")
        _require(_are_three_numbers(mean), "mean", mean, "three finite numbers")
        _require(_are_three_numbers(std) and min(std) > 0, "std", std, "three finite numbers above 0")

    @property
    def resize(self) -> int:
        """What the short side is scaled to before the crop, in pixels."""
        return math.floor(self.size / self.crop_pct)

    def to_dict(self) -> dict:
        """Plain JSON types under the keys size, resize, crop_pct, interpolation, mean and std."""
        return asdict(self) | {"resize": self.resize, "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, values: Mapping) -> "Preprocessing":
        """The inverse of to_dict; other keys are ignored. Raises ValueError if anything is missing or malformed."""
        _require(isinstance(values, Mapping), "preprocessing", values, "a mapping of names to values")
        names = [field.name for field in fields(cls)]
        found = [name for name in names if name in values]
        _require(found == names, "the list of preprocessing keys", found, f"{names}")
        chosen = (values[name] for name in names)
        preprocessing = cls(*(tuple(value) if isinstance(value, list) else value for value in chosen))
        resize = values.get("resize", preprocessing.resize)
        _require(resize == preprocessing.resize, "resize", resize, f"size / crop_pct: {preprocessing.resize}")
        return preprocessing


def _require(condition: bool, name: str, value, rule: str) -> None:
    if not condition:
        raise ValueError(f"{name} is {value!r:.100}; it must be {rule}")


def _are_three_numbers(values) -> bool:
    return isinstance(values, tuple) and len(values) == 3 and all(map(_is_number, values))


def _is_number(value) -> bool:
    """A real number that float32 can hold, which is what the network computes with."""
    return type(value) in (int, float) and abs(value) <= torch.finfo(torch.float32).max


IMAGENET = Preprocessing(224, 0.96, "bicubic", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def crop_box(image_size: tuple[int, int], preprocessing: Preprocessing) -> tuple[float, float, float, float]:
    """The part of a picture that the network sees: (left, top, right, bottom) in pixels of the picture.

    image_size: (width, height) in pixels. Raises ValueError if a side is below 1.
    """
    width, height, left, top = _geometry(image_size, preprocessing)
    x_scale, y_scale = image_size[0] / width, image_size[1] / height
    right, bottom = left + preprocessing.size, top + preprocessing.size
    return left * x_scale, top * y_scale, right * x_scale, bottom * y_scale


def resize_and_crop(image: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    """What the network sees of an RGB image, as an RGB image of size x size pixels.

    Equal bit for bit to timm's evaluation transform. Only of a picture so long and thin that it would exceed
    MAX_PIXELS once resized, just the middle is resized, and the result is equal up to rounding.

    Raises ValueError if the image is not RGB or has no pixels.
    """
    if image.mode != "RGB":
        raise ValueError(f"the image must be RGB, not {image.mode}; load it with load_image")
    width, height, left, top = _geometry(image.size, preprocessing)
    interpolation = _INTERPOLATIONS[preprocessing.interpolation]
    size = preprocessing.size
    if width * height <= MAX_PIXELS:
        resized = image.resize((width, height), interpolation)
    else:
        (x0, x1), (box_x0, box_x1), (out_x0, out_x1) = _window(image.width, width, left, size)
        (y0, y1), (box_y0, box_y1), (out_y0, out_y1) = _window(image.height, height, top, size)
        middle = image.crop((x0, y0, x1, y1))
        resized = middle.resize((out_x1 - out_x0, out_y1 - out_y0), interpolation, (box_x0, box_y0, box_x1, box_y1))
        left, top = left - out_x0, top - out_y0
    return resized.crop((left, top, left + size, top + size))


def preprocess(image: Image.Image, preprocessing: Preprocessing) -> torch.Tensor:
    """An RGB image to the network's input: normalised float32 of shape (3, size, size).

    Raises ValueError as resize_and_crop does.
    """
    pixels = torch.from_numpy(np.array(resize_and_crop(image, preprocessing)))
    pixels = pixels.permute(2, 0, 1).contiguous().to(torch.float32).div(255)
    mean = torch.tensor(preprocessing.mean, dtype=torch.float32).view(3, 1, 1)
    std = torch.tensor(preprocessing.std, dtype=torch.float32).view(3, 1, 1)
    return pixels.sub_(mean).div_(std)


def _geometry(image_size: tuple[int, int], preprocessing: Preprocessing) -> tuple[int, int, int, int]:
    """Width and height of the resized picture, and left and top of the crop in it, rounded as timm does."""
    width, height = image_size
    if min(width, height) < 1:
        raise ValueError(f"the image must have at least one pixel, not {width} x {height}")
    short = preprocessing.resize
    long = int(short * max(width, height) / min(width, height))
    width, height = (short, long) if width <= height else (long, short)
    return width, height, round((width - preprocessing.size) / 2), round((height - preprocessing.size) / 2)


def _window(length: int, resized: int, start: int, size: int) -> tuple[tuple, tuple, tuple]:
    """Along one axis, what to resize so that the resized pixels from start to start + size are among the result.

    Returns three (first, end) pairs: the source pixels to cut out, with a margin for the filter; the box in that cut to
    resize; and the resized pixels that it becomes. Pillow keeps the box in float32, so its edges lie on whole source
    pixels where the scale allows that: nothing is rounded then.
    """
    first, end = start * length // resized, _ceil_div((start + size) * length, resized)
    out_first, out_end = _ceil_div(first * resized, length), end * resized // length
    margin = _WIDEST_FILTER * _ceil_div(length, resized)
    cut_first, cut_end = max(0, first - margin), min(length, end + margin)
    box = (out_first * length / resized - cut_first, out_end * length / resized - cut_first)
    return (cut_first, cut_end), box, (out_first, out_end)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
