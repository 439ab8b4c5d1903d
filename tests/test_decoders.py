"""Formats that are recognised by what is in the file, with decoders that come when they are needed."""

import struct
import subprocess
import sys
from io import BytesIO

import numpy as np
import pytest
from picture_files import encode, exif, gradient, heic, noise, pixels, refuse
from PIL import Image, features

from convmixer.images import load_image

pytestmark = pytest.mark.usefixtures("silent")


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow was built without AVIF")
def test_avif():
    tags = exif(6)
    data = encode(gradient(64, 48), "AVIF", quality=95, exif=tags)
    image = load_image(data)
    assert image.size == (48, 64)
    expected = gradient(64, 48).transpose(Image.Transpose.ROTATE_270)
    assert abs(np.asarray(image, dtype=int) - np.asarray(expected)).max() < 12


# HEIC


def with_brands(data: bytes, major: bytes, *others: bytes) -> bytes:
    """The same file, but with other names of what is in it, of which there are four."""
    assert data[:8] == struct.pack(">I", 28) + b"ftyp"
    return data[:8] + major + data[12:16] + b"".join(others) + data[28:]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_heic(mode):
    picture = gradient(64, 48).convert(mode)
    if mode == "RGBA":
        picture.putalpha(128)
    expected = np.asarray(gradient(64, 48), int)
    expected = (expected + 256) // 2 if mode == "RGBA" else expected
    data = heic(picture)
    image = load_image(data)
    assert image.mode == "RGB" and image.size == (64, 48) and not image.info
    assert abs(np.asarray(image, int) - expected).max() < 8
    for brands in (
        (b"mif1", b"mif1", b"heic", b"miaf"),
        (b"msf1", b"mif1", b"miaf", b"hevc"),
        (b"heix", b"mif1", b"heic", b"miaf"),
        (b"mif1", b"mif1", b"miaf", b"tmap"),
    ):
        assert load_image(with_brands(data, *brands)) == image


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow was built without AVIF")
def test_avif_under_the_name_of_pictures_in_general():
    data = encode(gradient(64, 48), "AVIF")
    assert load_image(data[:8] + b"mif1" + data[12:]) == load_image(data)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_heic_is_turned_once(orientation):
    """By the transformation in the file; what its EXIF says on top is for programs that know no better."""
    corner = Image.new("RGB", (64, 32), "black")
    corner.paste("white", (0, 0, 32, 16))
    tags = exif(orientation).tobytes()
    turned = heic(corner, exif=tags)
    assert orientation == 1 or b"irot" in turned or b"imir" in turned
    expected = load_image(encode(corner, "PNG", exif=tags))
    assert abs(pixels(turned).astype(int) - np.asarray(expected)).max() < 12
    at = turned.index(b"MM\0*") + 18
    for said in (1, 3, 6):  # in EXIF
        assert load_image(turned[:at] + struct.pack(">H", said) + turned[at + 2 :]) == load_image(turned)


def test_of_several_pictures_in_a_heic_it_is_the_one_that_is_named_first():
    pillow_heif = pytest.importorskip("pillow_heif")
    red, blue = Image.new("RGB", (64, 64), "red"), Image.new("RGB", (80, 64), "blue")
    collection = pillow_heif.from_pillow(red)
    collection.add_from_pillow(blue)
    for index, size in enumerate(((64, 64), (80, 64))):
        stream = BytesIO()
        collection.save(stream, primary_index=index)
        assert load_image(stream.getvalue()).size == size


def test_a_heic_that_is_cut_short_or_damaged_is_refused():
    data = heic(noise(64, 48))
    for part in (0.1, 0.5, 0.99):
        refuse(data[: int(len(data) * part)])
    refuse(data[: len(data) // 2], allow_truncated=True)
    rng = np.random.default_rng(0)
    for _ in range(100):
        damaged = bytearray(data)
        damaged[rng.integers(len(data))] ^= 1 << rng.integers(8)
        try:
            assert load_image(damaged).mode == "RGB"
        except ValueError as error:
            assert str(error).isprintable()


def test_the_size_of_a_heic_is_known_before_it_is_decoded():
    data = heic(noise(64, 64))
    assert "64 x 64 pixels, more than the 4,095" in refuse(data, max_pixels=4095)
    at = data.index(b"ispe") + 8
    assert "20000 x 20000 pixels" in refuse(data[:at] + struct.pack(">II", 20_000, 20_000) + data[at + 8 :])
    large = heic(noise(16, 16).resize((640, 480)))
    at = large.index(b"ispe") + 8
    refuse(large[:at] + struct.pack(">II", 64, 48) + large[at + 8 :])  # the header lies


def test_without_pillow_heif_it_is_said_what_would_help(monkeypatch, tmp_path):
    data = heic(noise(8, 8))
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    path = tmp_path / "IMG_0001.HEIC"
    path.write_bytes(data)
    line = "is HEIC: install pillow-heif, or save it as JPEG"
    assert refuse(path).endswith(f"IMG_0001.HEIC {line}")
    for brand in (b"mif1", b"msf1", b"hevc"):
        assert line in refuse(data[:8] + brand + data[12:])


# PPM and TGA


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"P6 2 1 255\n\1\2\3\4\5\6", [[1, 2, 3], [4, 5, 6]]),
        (b"P6\n# a comment\n2 1\n255\n\1\2\3\4\5\6", [[1, 2, 3], [4, 5, 6]]),
        (b"P5 2 1 255\n\7\xff", [[7] * 3, [255] * 3]),
        (b"P5 2 1 65535\n\1\1\0\0", [[1] * 3, [0] * 3]),  # however dark, its white is 65535
        (b"P4 2 1\n\x80", [[0] * 3, [255] * 3]),
        (b"Pf 2 1 -1.0\n" + struct.pack("<2f", 0.2, 1), [[51] * 3, [255] * 3]),
    ],
)
def test_ppm(data, expected):
    assert pixels(data)[0].tolist() == expected
    assert "damaged or cut short" in refuse(data[:-1])
    assert "pixels, more than the 1 " in refuse(data, max_pixels=1)


def test_ppm_that_is_left_out():
    assert "neither 255 nor" in refuse(b"P6 1 1 1023\n" + bytes(6))
    assert "neither 255 nor" in refuse(b"P5 1 1 100\n" + bytes(1))
    for text in (b"P3 1 1 255\n1 2 3\n", b"P1 1 1\n1\n", b"P2 1 1 255\n1\n", b"P7\nWIDTH 1\n", b"P6 is a key"):
        assert "supported formats are" in refuse(text)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P"])
@pytest.mark.parametrize("options", [{}, {"compression": "tga_rle"}, {"orientation": 1}], ids=str)
def test_tga(mode, options):
    picture = noise(20, 10).convert(mode) if mode != "LA" else noise(20, 10).convert("L").convert("LA")
    data = encode(picture, "TGA", **options)
    assert load_image(data) == load_image(picture)
    assert "20 x 10 pixels" in refuse(data, max_pixels=199)
    assert "damaged" in refuse(data[:60] + data[-18:])
    assert "cannot be read as a picture" in refuse(data[:-18])  # nothing else tells it from other files


@pytest.mark.parametrize("format", ["JPEG2000", "ICO", "PCX", "SGI", "DDS"])
def test_formats_that_are_left_out(format):
    assert "cannot be read as a picture" in refuse(encode(noise(32, 32), format))


def test_a_jpeg_is_read_without_the_decoders_of_other_formats(tmp_path):
    path = tmp_path / "photo.jpg"
    noise(20, 10).save(path)
    code = (
        f"import sys; from convmixer import load_image; load_image({str(path)!r})\n"
        "rare = 'pillow_heif', 'PIL.ImageCms', 'PIL.AvifImagePlugin', 'PIL.GifImagePlugin'\n"
        "print(*set(rare) & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "\n"
