"""Valid pictures of many kinds, all small: what the fuzzing of pictures starts from."""

import io
from functools import lru_cache

import numpy as np
import pillow_heif
from PIL import ExifTags, Image, ImageCms, PngImagePlugin

from fuzz.mutations import Rng, chance, pick, some_bytes

pillow_heif.register_heif_opener()  # Pillow then also writes HEIC

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF", "PPM", "TGA")
KINDS = 600  # different valid pictures for one seed; number n has the format n % 10
# A picture with alpha needs an encoder for it; what a format cannot hold is converted to the first mode.
MODES = {
    "JPEG": ("RGB", "L", "CMYK", "RGB"),
    "PNG": ("RGB", "RGBA", "L", "LA", "P", "1", "I;16"),
    "WEBP": ("RGB", "RGBA", "L"),
    "GIF": ("RGB", "P", "L", "1", "RGBA"),
    "BMP": ("RGB", "L", "P", "1", "RGBA"),
    "TIFF": ("RGB", "RGBA", "L", "LA", "P", "1", "I;16", "I", "F", "CMYK", "YCbCr", "LAB"),
    "AVIF": ("RGB", "RGBA"),
    "HEIF": ("RGB", "RGBA", "L"),
    "PPM": ("RGB", "L", "1", "I;16", "F"),
    "TGA": ("RGB", "RGBA", "L", "LA", "P", "1"),
}
TIFF_COMPRESSIONS = (
    "raw",
    "tiff_lzw",
    "tiff_deflate",
    "tiff_adobe_deflate",
    "packbits",
    "jpeg",
    "group3",
    "group4",
    "lzma",
    "zstd",
)


@lru_cache(maxsize=KINDS)
def valid_picture(seed: int, kind: int) -> bytes:
    """The encoded picture number ``kind``, below KINDS, of a seed."""
    rng = np.random.default_rng((seed, kind, 1))
    format = FORMATS[kind % len(FORMATS)]
    mode = pick(rng, MODES[format])
    size, count = _size(rng), int(pick(rng, (1, 1, 1, 2, 4)))
    if format == "AVIF":
        count = 1  # the encoder of libavif 1.4.2, which no door of this project uses, crashes for some films
    frames = [_drawing(rng, mode, size) for _ in range(count)]
    stream = io.BytesIO()
    frames[0].save(stream, format, **_options(rng, format, frames))
    return stream.getvalue()


def _size(rng: Rng) -> tuple[int, int]:
    most = int(pick(rng, (1, 3, 8, 17, 40, 40, 90)))
    size = int(rng.integers(1, most + 1)), int(rng.integers(1, most + 1))
    return (int(rng.integers(500, 3000)), size[1] % 4 + 1)[:: int(pick(rng, (1, -1)))] if chance(rng, 0.05) else size


def _drawing(rng: Rng, mode: str, size: tuple[int, int]) -> Image.Image:
    width, height = size
    if mode in ("I;16", "I", "F"):
        values = rng.integers(0, pick(rng, (2, 256, 65536)), (height, width))
        return Image.fromarray(values.astype({"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]))
    coarse = Image.fromarray(rng.integers(0, 256, (3, 4, 4), dtype=np.uint8))  # RGBA
    picture = coarse.resize(size, Image.Resampling.BILINEAR if chance(rng, 0.7) else Image.Resampling.NEAREST)
    if mode == "LAB":
        return Image.frombytes("LAB", size, picture.convert("RGB").tobytes())
    if mode in ("RGBA", "LA"):
        return picture.convert(mode)
    return picture.convert("RGB").convert(mode)


def _exif(rng: Rng, format: str) -> Image.Exif:
    exif, wrong = Image.Exif(), () if format == "TIFF" else (0, 9)  # libtiff does not write these
    exif[ExifTags.Base.Orientation] = int(pick(rng, (*range(1, 9), *wrong)))
    if chance(rng, 0.5):
        exif[ExifTags.Base.Make] = "camera"
        exif[ExifTags.Base.Software] = some_bytes(rng).hex()
    return exif


def _profile(rng: Rng) -> bytes:
    """sRGB's profile, or one in which a few numbers are others: another colour space, or a broken one."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    profile[24:36] = bytes(12)  # the date at which it was made
    for _ in range(int(pick(rng, (0, 1, 3)))):
        profile[int(rng.integers(128, len(profile)))] = int(rng.integers(256))
    return bytes(profile)


def _options(rng: Rng, format: str, frames: list[Image.Image]) -> dict:
    mode, options = frames[0].mode, {}
    if len(frames) > 1 and format in ("PNG", "WEBP", "GIF", "TIFF"):
        options |= {"save_all": True, "append_images": frames[1:]}
        if format != "TIFF":
            options |= {"duration": 50}
    if format in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF", "HEIF") and chance(rng, 0.4):
        options["exif"] = _exif(rng, format)
    if format in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF", "HEIF") and mode in ("RGB", "RGBA") and chance(rng, 0.4):
        options["icc_profile"] = _profile(rng)
    return options | _FORMAT_OPTIONS.get(format, lambda rng, picture: {})(rng, frames[0])


def _jpeg_options(rng: Rng, picture: Image.Image) -> dict:
    options = {"quality": int(rng.integers(1, 101)), "progressive": chance(rng, 0.4), "optimize": chance(rng, 0.5)}
    if picture.mode == "RGB":
        options["subsampling"] = int(rng.integers(3))
    if chance(rng, 0.2):
        options["restart_marker_blocks"] = int(rng.integers(1, 5))
    if chance(rng, 0.2):
        options["comment"] = some_bytes(rng)
    return options


def _png_options(rng: Rng, picture: Image.Image) -> dict:
    options = {"compress_level": int(rng.integers(10))}
    if picture.mode == "P" and chance(rng, 0.5):
        options["transparency"] = some_bytes(rng, 200)
    elif picture.mode in ("L", "1", "I;16") and chance(rng, 0.4):
        options["transparency"] = int(rng.integers(256))
    elif picture.mode == "RGB" and chance(rng, 0.3):
        options["transparency"] = tuple(int(value) for value in rng.integers(0, 256, 3))
    if chance(rng, 0.3):
        options["pnginfo"] = PngImagePlugin.PngInfo()
        options["pnginfo"].add_text("Title", "text " * int(rng.integers(1, 50)), zip=chance(rng, 0.5))
        options["pnginfo"].add_itxt("Comment", "zażółć", "pl", "", zip=chance(rng, 0.5))
    if picture.mode == "P" and chance(rng, 0.3):
        options["bits"] = int(pick(rng, (1, 2, 4, 8)))
    return options


def _webp_options(rng: Rng, picture: Image.Image) -> dict:
    return {"lossless": chance(rng, 0.4), "quality": int(rng.integers(1, 101)), "method": 0, "exact": chance(rng, 0.5)}


def _gif_options(rng: Rng, picture: Image.Image) -> dict:
    options = {"interlace": int(chance(rng, 0.5)), "disposal": int(rng.integers(4))}
    return options | ({"transparency": int(rng.integers(256))} if chance(rng, 0.3) else {})


def _tiff_options(rng: Rng, picture: Image.Image) -> dict:
    compression = pick(rng, TIFF_COMPRESSIONS)
    if compression.startswith("group") and picture.mode != "1":
        compression = "tiff_lzw"
    if picture.mode == "YCbCr":
        compression = "jpeg"  # Pillow does not read what it writes with the others
    if compression == "jpeg" and picture.mode not in ("L", "RGB", "CMYK", "YCbCr"):
        compression = "tiff_deflate"
    options = {"compression": compression, "big_tiff": chance(rng, 0.2)}
    if compression != "jpeg" and chance(rng, 0.3):
        options["strip_size"] = int(pick(rng, (1, 64, 1000)))
    if compression in ("tiff_lzw", "tiff_deflate") and picture.mode in ("L", "RGB") and chance(rng, 0.3):
        options["tiffinfo"] = {317: 2}  # differences between neighbours
    return options


def _avif_options(rng: Rng, picture: Image.Image) -> dict:
    options = {"speed": 10, "quality": int(rng.integers(1, 101)), "max_threads": 1}
    return options | {"subsampling": pick(rng, ("4:2:0", "4:4:4"))}


def _tga_options(rng: Rng, picture: Image.Image) -> dict:
    compression = {"compression": "tga_rle"} if picture.mode != "1" and chance(rng, 0.5) else {}
    return compression | {"orientation": int(pick(rng, (1, -1)))}


_FORMAT_OPTIONS = {
    "JPEG": _jpeg_options,
    "PNG": _png_options,
    "WEBP": _webp_options,
    "GIF": _gif_options,
    "TIFF": _tiff_options,
    "AVIF": _avif_options,
    "HEIF": lambda rng, picture: {"quality": int(rng.integers(1, 101))},
    "TGA": _tga_options,
}
