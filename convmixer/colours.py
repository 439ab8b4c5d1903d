"""The pixels of any mode and colour space to 8-bit sRGB."""

import io
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from PIL import Image

_LARGEST_PROFILE = 4 * 2**20  # bytes; those of printing presses have up to 3 MB
_SRGB_TOLERANCE = 2  # of 255: by more the profiles that are called sRGB do not differ
_SPACES = {"L": b"GRAY", "LA": b"GRAY", "RGB": b"RGB ", "RGBA": b"RGB ", "CMYK": b"CMYK"}


def to_rgb(image: Image.Image) -> Image.Image:
    """A new RGB image in sRGB of an image of any mode, its colour profile applied, on white where it is transparent.

    Where there is no profile, or sRGB's own, or one that is broken or does not belong to the mode, the pixels are taken
    as they are. Pillow's own conversion would clip deep grey and show transparency as black.
    """
    if image.mode == "F" or image.mode.startswith("I"):
        image = _deep_grey_to_8_bits(image)
    mode = {"1": "L", "L": "L", "LA": "L", "La": "L", "CMYK": "CMYK"}.get(image.mode, "RGB")
    if image.has_transparency_data and mode != "CMYK":
        mode = {"L": "LA", "RGB": "RGBA"}[mode]
    converted = image if image.mode == mode else image.convert(mode)
    profile = image.info.get("icc_profile")
    if isinstance(profile, bytes) and (to_srgb := _conversion(profile, mode)):
        converted = to_srgb(converted)
    if converted.mode not in ("LA", "RGBA"):
        return converted.convert("RGB") if converted is image or converted.mode != "RGB" else converted
    if converted.mode == "LA":
        converted = converted.convert("RGBA")
    canvas = Image.new("RGB", converted.size, "white")
    canvas.paste(converted, mask=converted)
    return canvas


@lru_cache(maxsize=8)
def _conversion(profile: bytes, mode: str) -> Callable[[Image.Image], Image.Image] | None:
    """What makes a new sRGB image of one of ``mode`` (CMYK becomes RGB); None where nothing is to be done."""
    if profile[16:20] != _SPACES[mode] or len(profile) > _LARGEST_PROFILE:
        return None
    from PIL import ImageCms

    before, after = {"CMYK": ("CMYK", "RGB"), "LA": ("L", "RGB"), "L": ("L", "RGB")}.get(mode, (mode, mode))
    options = before, after, ImageCms.Intent.PERCEPTUAL
    quick = ImageCms.Flags.BLACKPOINTCOMPENSATION
    exact = quick | ImageCms.Flags.NOOPTIMIZE  # built in a tenth of the time, and without errors of ten in dark greys
    try:
        source, srgb = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
        transform = ImageCms.buildTransform(source, srgb, *options, exact)
        if before == "L":  # all that can happen to 256 greys; as grey, so that rounding tints none
            curve = np.asarray(transform.apply(_greys("L")))[0, :, 1]
            table = [*curve.tolist(), *range(256)][: 512 if mode == "LA" else 256]
            return None if _is_near(curve, range(256)) else lambda image: image.point(table)
        if mode != "CMYK" and _is_near(transform.apply(_colours(mode)), _colours(mode)):
            return None
        return ImageCms.buildTransform(source, srgb, *options, quick).apply
    except (OSError, ImportError, ImageCms.PyCMSError):  # a broken profile, or a Pillow without littleCMS
        return None


def _is_near(found, expected) -> bool:
    """Whether two images or rows of values differ by rounding only."""
    return np.abs(np.asarray(found, np.int16) - np.asarray(expected, np.int16)).max() <= _SRGB_TOLERANCE


def _greys(mode: str) -> Image.Image:
    """All 256 greys in one row."""
    return Image.frombytes("L", (256, 1), bytes(range(256))).convert(mode)


def _colours(mode: str) -> Image.Image:
    """Colours from everywhere in the RGB cube, with all greys among them."""
    values = np.array([0, 32, 64, 96, 128, 160, 192, 224, 255], np.uint8)
    grid = np.stack(np.meshgrid(values, values, values), -1).reshape(1, -1, 3)
    return Image.fromarray(np.concatenate([grid, np.asarray(_greys("RGB"))], 1)).convert(mode)


def _deep_grey_to_8_bits(image: Image.Image) -> Image.Image:
    """Modes I;16*, I and F to L, or to LA if one grey is marked as transparent; the profile comes along.

    16 bits have a fixed white, as in PGM files, which Pillow reads as I. Otherwise I and F name none: it is the first
    of 1 (F only), 255 and 65535 that no value exceeds; with larger values, or with some below 0, the range found is
    stretched from black to white.
    """
    values = np.asarray(image)
    whites = {"u": (65535,), "i": (255, 65535), "f": (1, 255, 65535)}[values.dtype.kind]
    if image.format == "PPM" and image.mode == "I":
        whites = (65535,)
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    black, white = next(((0, white) for white in whites if low >= 0 and high <= white), (low, high))
    with np.errstate(all="ignore"):  # what is not finite, or as large as float32 allows
        scaled = values.astype(np.float32)
        scaled -= black
        scaled *= 255 / (white - black or 1)
        np.nan_to_num(scaled, copy=False)
        grey = Image.fromarray(np.rint(scaled.clip(0, 255, out=scaled)).astype(np.uint8))
    if "transparency" in image.info:
        grey.putalpha(Image.fromarray(np.uint8(255) * (values != image.info["transparency"])))
    grey.info["icc_profile"] = image.info.get("icc_profile")
    return grey
