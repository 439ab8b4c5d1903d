"""What the pixels of each mode and colour space become."""

import io
import struct

import numpy as np
import pytest
from picture_files import (
    SRGB,
    WIDE_PROFILE,
    encode,
    exif,
    gradient,
    heic,
    icc_gamma,
    icc_profile,
    noise,
    pixels,
    png,
    png_chunk,
    rgb_profile,
    srgb_curve,
    wide_to_srgb,
)
from PIL import Image, ImageCms

from convmixer import colours
from convmixer.images import load_image

pytestmark = pytest.mark.usefixtures("silent")

WHITE = (255, 255, 255)


def grey16() -> np.ndarray:
    return (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)


def test_16_bit_grey_is_scaled_not_clipped():
    expected = np.arange(256, dtype=np.uint8).reshape(16, 16)
    native, big_endian = Image.fromarray(grey16()), Image.frombytes("I;16B", (16, 16), grey16().astype(">u2").tobytes())
    sources = [encode(native, "PNG"), encode(native, "TIFF"), encode(big_endian, "TIFF"), native, big_endian]
    for source in sources:
        values = pixels(source)
        assert (values == expected[..., None]).all()
    assert [image.mode for image in (native, big_endian)] == ["I;16", "I;16B"]
    dim = Image.fromarray(np.full((2, 2), 200, np.uint16))
    assert (pixels(dim) == 1).all(), "16 bits keep their white even if the picture is dark"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.int32([[0, 100, 255]]), [0, 100, 255]),
        (np.int32([[0, 257, 65535]]), [0, 1, 255]),
        (np.int32([[-1000, 0, 1000]]), [0, 128, 255]),
        (np.int32([[0, 2**30, 2**31 - 1]]), [0, 128, 255]),
        (np.int32([[-7, -7, -7]]), [0, 0, 0]),
        (np.float32([[0, 0.2, 1]]), [0, 51, 255]),
        (np.float32([[0, 51, 255]]), [0, 51, 255]),
        (np.float32([[0, 257, 65535]]), [0, 1, 255]),
        (np.float32([[-1, 0, 1]]), [0, 128, 255]),
        (np.float32([[np.nan, np.inf, 1]]), [0, 255, 255]),
        (np.float32([[np.nan, np.nan, np.nan]]), [0, 0, 0]),
    ],
    ids=str,
)
def test_deep_grey(values, expected):
    image = Image.fromarray(values)
    assert image.mode in ("I", "F")
    for source in (image, encode(image, "TIFF")):
        assert pixels(source)[0, :, 0].tolist() == expected


def test_alpha_is_laid_on_white():
    rgba = Image.new("RGBA", (3, 1))
    for x, pixel in enumerate([(200, 0, 0, 255), (0, 0, 0, 128), (9, 9, 9, 0)]):
        rgba.putpixel((x, 0), pixel)
    expected = [[200, 0, 0], [127, 127, 127], [255, 255, 255]]
    for source in (rgba, encode(rgba, "PNG"), encode(rgba, "TIFF"), rgba.convert("RGBa")):
        assert pixels(source)[0].tolist() == expected
    assert abs(pixels(encode(rgba, "WEBP", lossless=True))[0].astype(int) - expected).max() <= 1
    for grey in (rgba.convert("LA"), encode(rgba.convert("LA"), "PNG"), rgba.convert("LA").convert("La")):
        assert pixels(grey)[0, 1:].tolist() == [[127] * 3, [255] * 3]


def test_transparent_palettes():
    palette = Image.new("P", (3, 1))
    palette.putpalette([200, 0, 0, 0, 0, 0, 9, 9, 9])
    palette.putdata([0, 1, 2])
    levels = encode(palette, "PNG", transparency=bytes([255, 128, 0]))
    assert pixels(levels)[0].tolist() == [[200, 0, 0], [127, 127, 127], [255, 255, 255]]
    for data in (encode(palette, "PNG", transparency=2), encode(palette, "GIF", transparency=2)):
        assert pixels(data)[0].tolist() == [[200, 0, 0], [0, 0, 0], [255, 255, 255]]
    with_alpha = palette.convert("PA")
    with_alpha.putalpha(Image.frombytes("L", (3, 1), bytes([255, 255, 0])))
    assert with_alpha.mode == "PA"
    assert pixels(with_alpha)[0].tolist() == [[200, 0, 0], [0, 0, 0], [255, 255, 255]]


def test_transparent_colours():
    rgb = png(2, 1, 8, 2, bytes([0, 1, 2, 3, 40, 50, 60]), png_chunk(b"tRNS", struct.pack(">HHH", 1, 2, 3)))
    assert pixels(rgb)[0].tolist() == [[255, 255, 255], [40, 50, 60]]
    grey = png(2, 1, 8, 0, bytes([0, 7, 40]), png_chunk(b"tRNS", struct.pack(">H", 7)))
    assert pixels(grey)[0].tolist() == [[255] * 3, [40] * 3]
    deep = png(2, 1, 16, 0, b"\0" + struct.pack(">HH", 257, 258), png_chunk(b"tRNS", struct.pack(">H", 257)))
    assert pixels(deep)[0].tolist() == [[255] * 3, [1] * 3]


def test_other_modes():
    cmyk = Image.new("CMYK", (2, 2), (0, 255, 255, 0))
    assert (pixels(encode(cmyk, "TIFF")) == (255, 0, 0)).all()
    assert abs(pixels(encode(cmyk, "JPEG", quality=100)).astype(int) - (255, 0, 0)).max() <= 2
    for mode in ("1", "L", "P", "YCbCr", "HSV", "RGBX"):
        assert (pixels(Image.new("RGB", (2, 2), "white").convert(mode)) == WHITE).all(), mode
    assert abs(pixels(Image.new("LAB", (2, 2), (255, 128, 128))).astype(int) - WHITE).max() <= 2


# Colour profiles


def without_date(profile: bytes) -> bytes:
    return profile[:24] + bytes(12) + profile[36:]


OWN_SRGB = without_date(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
PLAIN_GAMMA_SRGB = rgb_profile(SRGB, 2.2)  # what some programs call sRGB; not within rounding of it


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "HEIC"])
def test_a_profile_is_applied(format):
    picture = gradient(32, 32)
    picture = Image.merge(
        "RGB", (picture.getchannel(0), picture.getchannel(0).rotate(90), Image.new("L", (32, 32), 90))
    )
    options = {"quality": 100, "lossless": True, "subsampling": "4:4:4"}
    for profile in (WIDE_PROFILE, None):
        extra = {} if profile is None else {"icc_profile": profile}
        if format == "HEIC":
            data = heic(picture, chroma=444, **extra)
        else:
            data = encode(picture, format, **({"TIFF": {}, "PNG": {}}.get(format, options) | extra))
        found = pixels(data)
        if profile:
            converted = found
    expected = wide_to_srgb(found)  # what the format made of the values
    assert abs(converted - expected).max() < 1.6
    assert abs(converted.astype(int) - found).max() > 40


def test_a_picture_without_a_profile_or_with_srgbs_own_is_untouched():
    picture = noise(64, 64)
    for profile in (None, OWN_SRGB):
        for source in (encode(picture, "PNG", icc_profile=profile), encode(picture, "TIFF", icc_profile=profile)):
            assert np.array_equal(pixels(source), np.asarray(picture))
    data = encode(picture, "JPEG", icc_profile=OWN_SRGB)
    assert np.array_equal(pixels(data), np.asarray(Image.open(io.BytesIO(data))))
    assert abs(pixels(encode(picture, "PNG", icc_profile=PLAIN_GAMMA_SRGB)).astype(int) - np.asarray(picture)).max() > 2


def test_a_broken_or_foreign_profile_is_ignored():
    broken = [b"", b"icc", WIDE_PROFILE[:200], WIDE_PROFILE[:16] + b"CMYK" + WIDE_PROFILE[20:], bytes(500)]
    linear_grey = icc_profile(b"GRAY", {b"kTRC": icc_gamma(1)})
    link = icc_profile(b"RGB ", {b"A2B0": cmyk_table()}, b"Lab ", b"link")
    laboratory = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    for profile in (*broken, linear_grey, link, laboratory, WIDE_PROFILE + bytes(5 * 2**20)):
        picture = noise(20, 10)
        picture.info["icc_profile"] = profile
        assert np.array_equal(pixels(picture), np.asarray(picture)), profile[:40]
    rng = np.random.default_rng(0)
    for _ in range(200):
        profile = bytearray(WIDE_PROFILE)
        profile[rng.integers(len(profile))] = rng.integers(256)
        picture.info["icc_profile"] = bytes(profile)
        assert load_image(picture).size == (20, 10)


def test_the_profile_of_an_image_is_applied_once():
    picture = noise(20, 10)
    picture.info["icc_profile"] = WIDE_PROFILE
    before = picture.tobytes()
    image = load_image(picture)
    assert abs(np.asarray(image) - wide_to_srgb(np.asarray(picture))).max() < 1.6
    assert load_image(image).tobytes() == image.tobytes() and picture.tobytes() == before


def test_a_profile_under_transparency_palettes_and_turns():
    red, white = np.array([200, 40, 40], np.uint8), np.full(3, 255)
    expected = wide_to_srgb(red)
    rgba = Image.new("RGBA", (2, 1), (*red, 255))
    rgba.putpixel((1, 0), (*red, 128))
    half = expected * 128 / 255 + white * 127 / 255  # white is sRGB's
    assert abs(pixels(encode(rgba, "PNG", icc_profile=WIDE_PROFILE))[0] - [expected, half]).max() < 1.6
    palette = Image.new("P", (2, 1))
    palette.putpalette([*red, 9, 9, 9])
    palette.putpixel((1, 0), 1)
    data = encode(palette, "PNG", icc_profile=WIDE_PROFILE, transparency=bytes([255, 0]))
    assert abs(pixels(data)[0] - [expected, white]).max() < 1.6
    turned = pixels(encode(Image.new("RGB", (64, 32), tuple(red)), "JPEG", icc_profile=WIDE_PROFILE, exif=exif(6)))
    assert turned.shape == (64, 32, 3) and abs(turned - expected).max() < 4


def test_a_profile_of_a_jpeg_that_is_read_at_a_fraction():
    picture = Image.new("RGB", (800, 600), (200, 40, 40))
    reduced = pixels(encode(picture, "JPEG", icc_profile=WIDE_PROFILE, quality=100), target_size=25)
    assert reduced.shape == (75, 100, 3)
    assert abs(reduced - wide_to_srgb(np.uint8([200, 40, 40]))).max() < 4


def test_profiles_of_greys():
    profile = icc_profile(b"GRAY", {b"kTRC": icc_gamma(1)})
    greys = np.arange(256, dtype=np.uint8).reshape(16, 16)
    expected = np.repeat(srgb_curve(greys / 255)[..., None], 3, 2)
    eight, deep = Image.fromarray(greys), Image.fromarray(grey16())
    with_alpha = eight.copy()
    with_alpha.putalpha(255)
    for picture, format in ((eight, "PNG"), (eight, "TIFF"), (deep, "PNG"), (deep, "TIFF"), (with_alpha, "PNG")):
        found = pixels(encode(picture, format, icc_profile=profile))
        assert abs(found - expected).max() < 1.6, (picture.mode, format)
    with_alpha.putalpha(0)
    assert (pixels(encode(with_alpha, "PNG", icc_profile=profile)) == 255).all()
    data = encode(eight, "PNG", icc_profile=icc_profile(b"GRAY", {b"kTRC": icc_gamma(1)}), transparency=7)
    assert pixels(data)[0, 7].tolist() == [255, 255, 255] and abs(pixels(data)[0, 8] - expected[0, 8]).max() < 1.6


def cmyk_table() -> bytes:
    """Inks of a press that are all grey: 100 - 50 c - 20 m - 10 y in lightness, and k is black."""
    inks = [[node >> bit & 1 for bit in (3, 2, 1, 0)] for node in range(16)]
    lightness = [0 if k else 100 - 50 * c - 20 * m - 10 * y for c, m, y, k in inks]
    nodes = bytes(value for light in lightness for value in (round(2.55 * light), 128, 128))
    unit = struct.pack(">9i", *(65536 * (i % 4 == 0) for i in range(9)))
    return b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + unit + bytes(range(256)) * 4 + nodes + bytes(range(256)) * 3


@pytest.mark.parametrize("format", ["JPEG", "TIFF"])
def test_cmyk_goes_through_its_profile(format):
    profile = icc_profile(b"CMYK", {b"A2B0": cmyk_table()}, b"Lab ", b"prtr")
    for ink, grey in (((0, 0, 0, 0), 255), ((255, 0, 0, 0), 119), ((0, 255, 0, 0), 198), ((0, 0, 0, 255), 0)):
        picture = Image.new("CMYK", (16, 16), ink)
        quality = {"quality": 100} if format == "JPEG" else {}
        found = pixels(encode(picture, format, icc_profile=profile, **quality))
        assert abs(found.astype(int) - grey).max() <= 3, ink
        plain = picture.convert("RGB").getpixel((0, 0))
        assert abs(pixels(encode(picture, format, **quality)).astype(int) - plain).max() <= 2


def test_pillow_without_littlecms_takes_the_values_as_they_are(monkeypatch):
    def missing(*arguments):
        raise ImportError("The _imagingcms C module is not installed")

    colours._conversion.cache_clear()
    monkeypatch.setattr(ImageCms, "ImageCmsProfile", missing)
    picture = noise(4, 4)
    picture.info["icc_profile"] = WIDE_PROFILE
    assert np.array_equal(pixels(picture), np.asarray(picture))
    colours._conversion.cache_clear()
