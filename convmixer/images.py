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
from PIL import ExifTags, Image, ImageFile, ImageOps
from PIL.JpegImagePlugin import JpegImageFile

MAX_PIXELS = 64_000_000  # 256 MB once decoded: Pillow keeps an RGB pixel in four bytes

Image.init()  # registers the decoders, of which only these ever see a file
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
_SUPPORTED = "supported formats are JPEG, PNG, WebP, GIF, BMP, TIFF and AVIF"

# Warning filters belong to the whole process; without a lock two threads could restore them in the wrong order.
_FILTERS_LOCK = threading.Lock()

_INTERPOLATIONS = {filter.name.lower(): filter for filter in Image.Resampling}
_WIDEST_FILTER = 3  # Lanczos looks this many pixels to each side
_MAX_RESIZE = 8192  # keeps whatever a checkpoint asks for within reasonable memory


class ImageError(ValueError):
    """A picture that cannot be used; the message is one line: what was wrong, and what would be right."""


def load_image(source, *, max_pixels: int = MAX_PIXELS, target_size: int | None = None) -> Image.Image:
    """Decode any picture to an upright 8-bit RGB image that no longer needs its file.

    An animation gives its first frame, transparency is laid on white, deep grey is scaled to 8 bits, and the EXIF
    orientation is applied. The result carries no metadata.

    source: path (str or os.PathLike), bytes-like, binary file object (read whole) or PIL image (its current frame).
    max_pixels: a larger picture is refused from its header, before any pixel is decoded. Only a JPEG of one scan, from
        a file or bytes, is read at 1/2, 1/4 or 1/8 of its sides if that fits: libjpeg does this in little memory.
        Pictures within the limit are always decoded at full resolution.
    target_size: the shortest side the caller needs, in pixels. A JPEG over the limit is then read at the smallest
        scale that leaves its short side twice that or more; with None, at the largest that fits.

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
        name = "".join(character if character.isprintable() else "?" for character in path)
        return _open_file(path, name[-300:]), name[-300:]
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
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        reason = getattr(error, "strerror", None) or "not a valid path"
        raise ImageError(f"{name} cannot be opened ({reason}); give the path of a picture file") from error
    kind = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
    raise ImageError(f"{name} is {kind}; give the path of a picture file")


def _read_all(file) -> bytes:
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
    # Unless the first scan holds the whole picture, libjpeg keeps all coefficients in memory at full size. Pillow has
    # just read that scan's header: its length in two bytes, the number of components, two bytes for each, three more.
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
        raise ImageError(f"{name} is {size}, more than the {max_pixels:,} that can be read; make it smaller")
    if width * height == 0:
        raise ImageError(f"{name} has no pixels; give one with at least one")
    image.load()
    rgb = _to_rgb(image)
    rgb.info.clear()  # nothing may be applied twice, should the result be loaded again
    with contextlib.suppress(Exception):  # broken metadata says nothing about the pixels
        rgb.getexif()[ExifTags.Base.Orientation] = int(image.getexif()[ExifTags.Base.Orientation])
    ImageOps.exif_transpose(rgb, in_place=True)
    return rgb


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


@dataclass(frozen=True)
class Preprocessing:
    """How an RGB image becomes the network's input: resize its short side, crop the centre, scale to 0..1, normalise.

    Raises ValueError, naming the field and the value, if one is out of range.
    """

    size: int  # side of the network's square input in pixels, 1 to 4096
    crop_pct: float = 1.0  # how much of the resized short side the crop keeps, above 0 and at most 1
    interpolation: str = "bicubic"  # Pillow's name in lower case
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # of R, G, B in 0..1; timm's default, ImageNet's
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        size, crop_pct, interpolation = self.size, self.crop_pct, self.interpolation
        _require(type(size) is int and 1 <= size <= 4096, "size", size, "an integer from 1 to 4096")
        _require(_is_number(crop_pct) and 0 < crop_pct <= 1, "crop_pct", crop_pct, "above 0 and at most 1")
        _require(size / crop_pct <= _MAX_RESIZE, "crop_pct", crop_pct, f"at least size / {_MAX_RESIZE}")
        known = isinstance(interpolation, str) and interpolation in _INTERPOLATIONS
        _require(known, "interpolation", interpolation, f"one of {', '.join(_INTERPOLATIONS)}")
        for name, values in (("mean", self.mean), ("std", self.std)):
            three = isinstance(values, tuple) and len(values) == 3 and all(map(_is_number, values))
            _require(three, name, values, "three finite numbers")
        _require(min(self.std) > 0, "std", self.std, "above 0")

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
        missing = [name for name in names if name not in values]
        _require(not missing, "preprocessing", dict(values), f"given {', '.join(missing)}")
        chosen = (values[name] for name in names)
        preprocessing = cls(*(tuple(value) if isinstance(value, list) else value for value in chosen))
        resize = values.get("resize", preprocessing.resize)
        _require(resize == preprocessing.resize, "resize", resize, f"size / crop_pct: {preprocessing.resize}")
        return preprocessing


def _require(condition: bool, name: str, value, rule: str) -> None:
    if not condition:
        raise ValueError(f"{name} is {value!r:.100}; it must be {rule}")


def _is_number(value) -> bool:
    """A real number that float32 can hold, which is what the network computes with."""
    return type(value) in (int, float) and abs(value) <= torch.finfo(torch.float32).max


IMAGENET = Preprocessing(224, 0.96, "bicubic", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def crop_box(image_size: tuple[int, int], preprocessing: Preprocessing) -> tuple[float, float, float, float]:
    """The part of a picture that the network sees: (left, top, right, bottom) in pixels of the picture.

    image_size: (width, height) in pixels. Raises ValueError if a side is below 1.
    """
    (width, height), (left, top) = _geometry(image_size, preprocessing)
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
    size, box = preprocessing.size, None
    (width, height), (left, top) = _geometry(image.size, preprocessing)
    if width * height > MAX_PIXELS:
        x_cut, x_box, (x_first, x_end) = _middle(image.width, width, left, size)
        y_cut, y_box, (y_first, y_end) = _middle(image.height, height, top, size)
        image = image.crop((x_cut[0], y_cut[0], x_cut[1], y_cut[1]))
        box = (x_box[0], y_box[0], x_box[1], y_box[1])
        width, height, left, top = x_end - x_first, y_end - y_first, left - x_first, top - y_first
    resized = image.resize((width, height), _INTERPOLATIONS[preprocessing.interpolation], box)
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


def _geometry(image_size: tuple[int, int], preprocessing: Preprocessing) -> tuple[tuple[int, int], tuple[int, int]]:
    """(width, height) of the resized picture, and (left, top) of the crop in it, rounded as timm does."""
    width, height = image_size
    if min(width, height) < 1:
        raise ValueError(f"the image must have at least one pixel, not {width} x {height}")
    short = preprocessing.resize
    long = int(short * max(width, height) / min(width, height))
    width, height = (short, long) if width <= height else (long, short)
    return (width, height), (round((width - preprocessing.size) / 2), round((height - preprocessing.size) / 2))


def _middle(length: int, resized: int, start: int, size: int) -> tuple[tuple, tuple, tuple]:
    """Along one axis, what to resize to get the resized pixels from start to start + size, with few others.

    Returns three (first, end) pairs: the source pixels to cut out, with a margin for the filter; the box in that cut to
    resize; and the resized pixels that it becomes. Pillow keeps the box in float32: hence the cut, for small numbers,
    and edges on whole source pixels where the scale allows, for exact ones.
    """
    first, end = start * length // resized, _ceil_div((start + size) * length, resized)
    out_first, out_end = _ceil_div(first * resized, length), end * resized // length
    margin = _WIDEST_FILTER * _ceil_div(length, resized)
    cut_first, cut_end = max(0, first - margin), min(length, end + margin)
    box = (out_first * length / resized - cut_first, out_end * length / resized - cut_first)
    return (cut_first, cut_end), box, (out_first, out_end)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
