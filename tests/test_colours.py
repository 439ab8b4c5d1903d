"""What the pixels of each mode and colour space become."""

import struct

import numpy as np
import pytest
from picture_files import (
    WIDE_PROFILE,
    encode,
    gradient,
    heic,
    icc_gamma,
    icc_profile,
    noise,
    pixels,
    png,
    png_chunk,
    srgb_curve,
    wide_to_srgb,
)
from PIL import Image, ImageCms

pytestmark = pytest.mark.usefixtures("silent")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.uint16([[0, 200, 514]]), [0, 1, 2]),  # 16 bits keep their white even if the picture is dark
        (np.int32([[0, 257, 65535]]), [0, 1, 255]),
        (np.int32([[-1000, 0, 1000]]), [0, 128, 255]),
        (np.float32([[0, 0.2, 1]]), [0, 51, 255]),
        (np.float32([[np.nan, np.inf, 1]]), [0, 255, 255]),
    ],
)
def test_deep_grey(values, expected):
    for source in (Image.fromarray(values), encode(Image.fromarray(values), "TIFF")):
        assert pixels(source)[0, :, 0].tolist() == expected


def test_transparency_is_laid_on_white():
    rgba = Image.fromarray(np.uint8([[(200, 0, 0, 255), (0, 0, 0, 128), (9, 9, 9, 0)]]))
    palette = Image.new("P", (3, 1))
    palette.putpalette([200, 0, 0, 0, 0, 0, 9, 9, 9])
    palette.putdata([0, 1, 2])
    levels = encode(palette, "PNG", transparency=bytes([255, 128, 0]))
    for source in (encode(rgba, "PNG"), encode(rgba, "TIFF"), rgba.convert("RGBa"), levels):
        assert pixels(source)[0].tolist() == [[200, 0, 0], [127, 127, 127], [255, 255, 255]]
    assert pixels(encode(rgba.convert("LA"), "PNG"))[0, 1:].tolist() == [[127, 127, 127], [255, 255, 255]]
    one_grey = png_chunk(b"tRNS", struct.pack(">H", 257))
    assert pixels(png(2, 1, 16, 0, b"\0\1\1\1\2", one_grey))[0].tolist() == [[255] * 3, [1] * 3]


def test_other_modes():
    for mode in ("1", "P", "YCbCr", "HSV", "RGBX", "CMYK"):
        assert (pixels(Image.new("RGB", (2, 2), "white").convert(mode)) == 255).all(), mode
    assert abs(pixels(Image.new("LAB", (2, 2), (255, 128, 128))).astype(int) - 255).max() <= 2


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "HEIC"])
def test_a_profile_is_applied(format):
    channels = gradient(32, 32).getchannel(0), gradient(32, 32).getchannel(0).rotate(90), Image.new("L", (32, 32), 90)
    options = {"quality": 100, "lossless": True, "subsampling": "4:4:4"} if format not in ("TIFF", "PNG") else {}

    def written(**profile):
        picture = Image.merge("RGB", channels)
        if format == "HEIC":
            return heic(picture, chroma=444, **profile)
        return encode(picture, format, **options, **profile)

    converted, plain = pixels(written(icc_profile=WIDE_PROFILE)), pixels(written())
    assert abs(converted - wide_to_srgb(plain)).max() < 1.6
    assert abs(converted.astype(int) - plain).max() > 40


def test_srgbs_own_profile_changes_nothing():
    own, picture = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), noise(64, 64)
    assert np.array_equal(pixels(encode(picture, "PNG", icc_profile=own)), np.asarray(picture))


def test_a_broken_or_foreign_profile_is_ignored():
    of_grey = icc_profile(b"GRAY", {b"kTRC": icc_gamma(1)})
    for profile in (b"icc", WIDE_PROFILE[:200], bytes(500), of_grey, WIDE_PROFILE + bytes(5 * 2**20)):
        picture = noise(20, 10)
        picture.info["icc_profile"] = profile
        assert np.array_equal(pixels(picture), np.asarray(picture)), profile[:40]


def test_a_profile_under_transparency_palettes_and_reductions():
    red, white = np.array([200, 40, 40], np.uint8), np.full(3, 255)
    expected = wide_to_srgb(red)
    palette = Image.new("P", (2, 1))
    palette.putpalette([*red, *red])
    palette.putpixel((1, 0), 1)
    data = encode(palette, "PNG", icc_profile=WIDE_PROFILE, transparency=bytes([255, 128]))
    half = expected * 128 / 255 + white * 127 / 255  # white is sRGB's
    assert abs(pixels(data)[0] - [expected, half]).max() < 1.6
    large = encode(Image.new("RGB", (800, 600), tuple(red)), "JPEG", icc_profile=WIDE_PROFILE)
    assert abs(pixels(large, target_size=25) - expected).max() < 4


def test_profiles_of_greys():
    profile, greys = icc_profile(b"GRAY", {b"kTRC": icc_gamma(1)}), np.arange(256, dtype=np.uint8).reshape(16, 16)
    expected, deep = srgb_curve(greys / 255)[..., None], Image.fromarray(greys * np.uint16(257))
    assert abs(pixels(encode(deep, "TIFF", icc_profile=profile)) - expected).max() < 1.6
    found = pixels(encode(Image.fromarray(greys), "PNG", icc_profile=profile, transparency=7))
    assert found[0, 7].tolist() == [255] * 3 and abs(found[1:] - expected[1:]).max() < 1.6


def test_cmyk_goes_through_its_profile():
    """Of a press whose inks are all grey: 100 - 50 c - 20 m - 10 y in lightness, and k is black."""
    inks = [[node >> bit & 1 for bit in (3, 2, 1, 0)] for node in range(16)]
    lightness = [0 if k else 100 - 50 * c - 20 * m - 10 * y for c, m, y, k in inks]
    nodes = bytes(value for light in lightness for value in (round(2.55 * light), 128, 128))
    unit = struct.pack(">9i", *(65536 * (i % 4 == 0) for i in range(9)))
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + unit + bytes(range(256)) * 4 + nodes + bytes(range(256)) * 3
    profile = icc_profile(b"CMYK", {b"A2B0": table}, b"Lab ", b"prtr")
    for ink, grey in (((0, 0, 0, 0), 255), ((255, 0, 0, 0), 119), ((0, 255, 0, 0), 198), ((0, 0, 0, 255), 0)):
        found = pixels(encode(Image.new("CMYK", (16, 16), ink), "JPEG", icc_profile=profile, quality=100))
        assert abs(found.astype(int) - grey).max() <= 3, ink
