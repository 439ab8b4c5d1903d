"""An RGB image to the network's input."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

import numpy as np
from PIL import Image

from .images import MAX_PIXELS

_INTERPOLATIONS = {filter.name.lower(): filter for filter in Image.Resampling}
_WIDEST_FILTER = 3  # Lanczos looks this many pixels to each side
_MAX_FLOAT32 = float(np.finfo(np.float32).max)
_MAX_RESIZE = 8192  # keeps whatever a checkpoint asks for within reasonable memory


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
    return type(value) in (int, float) and abs(value) <= _MAX_FLOAT32


IMAGENET = Preprocessing(224, 0.96, "bicubic", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# Mean and standard deviation as in the authors' script: https://github.com/locuslab/convmixer-cifar10
CIFAR10 = Preprocessing(32, 1.0, "bicubic", (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616))


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


def preprocess(image: Image.Image, preprocessing: Preprocessing) -> np.ndarray:
    """An RGB image to the network's input: normalised float32 of shape (3, size, size).

    Raises ValueError as resize_and_crop does.
    """
    return normalise(np.array(resize_and_crop(image, preprocessing)), preprocessing)


def normalise(pixels: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """What resize_and_crop gave, as uint8 (size, size, 3), to the network's input: float32 (3, size, size)."""
    x = np.ascontiguousarray(pixels.transpose(2, 0, 1), np.float32)
    x /= 255
    x -= np.array(preprocessing.mean, np.float32)[:, None, None]
    x /= np.array(preprocessing.std, np.float32)[:, None, None]
    return x


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
