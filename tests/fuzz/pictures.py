"""The promises of convmixer.images: any bytes give a safe RGB image, or ImageError, one line."""

import ctypes
import io
import math
import re
import struct
import zlib
from collections.abc import Callable
from functools import cache
from random import Random

import numpy as np
import pillow_heif
from hypothesis import strategies as st
from PIL import Image, ImageCms

from convmixer.images import MAX_PIXELS, ImageError, load_image
from convmixer.preprocessing import IMAGENET, resize_and_crop

pillow_heif.register_heif_opener()  # Pillow then also writes HEIC

EXTRA_MEMORY = 1536 * 2**20  # bytes: six times the 256 MB of the largest picture, for conversions
MAX_MESSAGE = 2000
WORDS = (b"acTL", b"fcTL", b"fdAT", b"ANMF", b"Exif\0\0", b"ICC_PROFILE\0", b"\xff\xda", b"\xff\xff\xff\xff")
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
MALLOPT = getattr(ctypes.CDLL(None), "mallopt", lambda option, value: None)  # only glibc has it
_M_PERTURB = -6

MODES = {
    "JPEG": "RGB L CMYK",
    "PNG": "RGB RGBA L LA P 1 I;16",
    "WEBP": "RGB RGBA",
    "GIF": "RGB P L",
    "BMP": "RGB L P 1",
    "TIFF": "RGB RGBA L P 1 I;16 I F CMYK",
    "AVIF": "RGB RGBA",
    "HEIF": "RGB RGBA",
    "PPM": "RGB L 1 I;16",
    "TGA": "RGB RGBA L P",
}
ICC = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
EXIF = Image.Exif()
EXIF[0x0112] = 6  # orientation
VARIANTS = (  # more of a format: each an option or two
    *(("TIFF", "RGB", {"compression": kind}) for kind in ("tiff_deflate", "packbits", "zstd", "jpeg")),
    ("TIFF", "CMYK", {"compression": "jpeg"}),
    ("TIFF", "RGB", {"compression": "tiff_lzw", "tiffinfo": {317: 2}, "strip_size": 64, "big_tiff": True}),
    ("JPEG", "RGB", {"progressive": True, "exif": EXIF, "restart_marker_blocks": 1, "icc_profile": ICC}),
    ("PNG", "P", {"transparency": b"\0\x80\xff", "icc_profile": ICC, "exif": EXIF, "save_all": True}),
    ("WEBP", "RGB", {"lossless": True, "icc_profile": ICC, "exif": EXIF}),
    ("GIF", "P", {"save_all": True, "transparency": 3, "disposal": 2, "interlace": 1}),
    ("TGA", "RGB", {"compression": "tga_rle"}),
)
SIZES = re.compile(rb"\xff[\xc0-\xc2]...|IHDR|ispe....|VP8X........", re.DOTALL)  # after these stand width and height


@cache
def seeds() -> list[bytes]:
    """Valid pictures, all small; the same every time."""
    plain = [(format, mode, {}) for format, modes in MODES.items() for mode in modes.split()]
    return [encoded(*each, number) for number, each in enumerate([*plain, *VARIANTS])]


def encoded(format: str, mode: str, options: dict, seed: int = 0) -> bytes:
    rng = np.random.default_rng(seed)
    picture = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)).resize((17, 13))
    if kind := {"I;16": np.uint16, "I": np.int32, "F": np.float32}.get(mode):
        picture = Image.fromarray(rng.integers(0, 65536, (13, 17)).astype(kind))
    else:
        picture = picture.convert(mode)
    film = {"append_images": [picture.rotate(180)], "duration": 50} if "save_all" in options else {}
    stream = io.BytesIO()
    picture.save(stream, format, **options, **film)
    return stream.getvalue()


def mutate(content: bytes, random: Random, havoc: Callable[[bytes], bytes]) -> bytes:
    """``content`` changed by ``havoc``, or in its size; the checksums of a PNG are right afterwards."""
    places = [found.end() for found in SIZES.finditer(content)]
    if places and random.random() < 0.2:
        at, number = (
            random.choice(places) + random.choice((0, 2)),
            random.choice((0, 255, 8000, 32767, 65535, *range(1, 40))),
        )
        return repaired(content[:at] + struct.pack(">H", number) + content[at + 2 :])
    return repaired(havoc(content)) if random.random() < 0.9 else havoc(content)


def damaged(seeds: list[bytes]) -> st.SearchStrategy[bytes]:
    """For Hypothesis: seeds in which other bytes stand from one place to another, both shares of the length."""

    def edited(content: bytes, first: float, last: float, new: bytes) -> bytes:
        return content[: int(first * len(content))] + new + content[int(last * len(content)) :]

    return st.builds(edited, st.sampled_from(seeds), st.floats(0, 1), st.floats(0, 1), st.binary(max_size=12))


def repaired(content: bytes) -> bytes:
    """A PNG with the right checksums, as far as its lengths make sense; anything else as it is."""
    if not content.startswith(PNG_MAGIC):
        return content
    fixed, at = bytearray(content), len(PNG_MAGIC)
    while at + 12 <= len(fixed):
        end = at + 8 + int.from_bytes(fixed[at : at + 4])
        if end + 4 > len(fixed):
            break
        fixed[end : end + 4] = struct.pack(">I", zlib.crc32(fixed[at + 4 : end]))
        at = end + 4
    return bytes(fixed)


def check(content: bytes) -> str:
    """Raises AssertionError, or whatever comes out of a decoder, if ``content`` breaks a promise; says what it gave."""
    for allow_truncated in (True, False):
        try:
            picture = load_image(content, allow_truncated=allow_truncated)
        except ImageError as error:
            check_message(str(error))
            continue
        assert picture.mode == "RGB", f"mode {picture.mode}"
        assert 0 < math.prod(picture.size) <= MAX_PIXELS, f"size {picture.size}"
        assert not picture.info, f"metadata left: {list(picture.info)}"
        if math.prod(picture.size) <= 4_000_000:
            MALLOPT(_M_PERTURB, 0xA5)  # what malloc hands out has another content: what reads unset memory is seen
            again = load_image(content, allow_truncated=allow_truncated)
            MALLOPT(_M_PERTURB, 0)
            assert again.tobytes() == picture.tobytes(), "the same bytes give other pixels"
    try:
        seen = resize_and_crop(load_image(content, target_size=IMAGENET.resize), IMAGENET)
    except ImageError as error:
        check_message(str(error))
        return "refused"
    assert seen.size == (IMAGENET.size, IMAGENET.size), f"the network would see {seen.size}"
    return "picture"


def check_message(message: str) -> None:
    is_short = 0 < len(message) < MAX_MESSAGE
    assert is_short and message.isprintable(), f"the message is not one printable line: {message!r:.300}"
