"""Formats that are recognised by what is in the file, with decoders that come when they are needed."""

import struct
import sys
from io import BytesIO

import numpy as np
import pytest
from picture_files import encode, exif, gradient, heic, noise, pixels, refuse
from PIL import Image

from convmixer.images import load_image

pytestmark = pytest.mark.usefixtures("silent")


# AVIF and HEIC


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_heic(mode):
    picture = gradient(64, 48).convert(mode)
    expected = np.asarray(gradient(64, 48), int)
    if mode == "RGBA":
        picture.putalpha(128)
        expected = (expected + 256) // 2
    assert abs(pixels(heic(picture)).astype(int) - expected).max() < 8


def test_files_are_known_by_any_of_their_brands():
    data = heic(gradient(64, 48))
    for brands in (b"mif1\0\0\0\0mif1heicmiaf", b"msf1\0\0\0\0mif1miafhevc", b"mif1\0\0\0\0mif1miaftmap"):
        assert load_image(data[:8] + brands + data[28:]) == load_image(data)
    data = encode(gradient(64, 48), "AVIF")
    assert load_image(data[:8] + b"mif1" + data[12:]) == load_image(data)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_avif_and_heic_are_turned_once(orientation):
    """By the transformation in the file; what its EXIF says on top is for programs that know no better."""
    corner = Image.new("RGB", (64, 32), "black")
    corner.paste("white", (0, 0, 32, 16))
    tags = exif(orientation)
    expected, turned = pixels(encode(corner, "PNG", exif=tags)).astype(int), heic(corner, exif=tags.tobytes())
    for data in (turned, encode(corner, "AVIF", quality=95, exif=tags)):
        assert abs(pixels(data) - expected).max() < 12
    at = turned.index(b"MM\0*") + 18
    assert load_image(turned[:at] + struct.pack(">H", 3) + turned[at + 2 :]) == load_image(turned)


def test_a_heic_whose_header_lies_is_refused():
    data = heic(noise(64, 64))
    at = data.index(b"ispe") + 8
    assert "20000 x 20000 pixels" in refuse(data[:at] + struct.pack(">II", 20_000, 20_000) + data[at + 8 :])
    refuse(data[:at] + struct.pack(">II", 16, 16) + data[at + 8 :])


def test_without_pillow_heif_it_is_said_what_would_help(monkeypatch):
    data = heic(noise(8, 8))
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    assert refuse(data) == "the picture is HEIC: install pillow-heif, or save it as JPEG"


# PPM and TGA


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"P6\n# a comment\n2 1\n255\n\1\2\3\4\5\6", [[1, 2, 3], [4, 5, 6]]),
        (b"P5 2 1 65535\n\1\1\0\0", [[1] * 3, [0] * 3]),  # however dark, its white is 65535
        (b"Pf 2 1 -1.0\n" + struct.pack("<2f", 0.2, 1), [[51] * 3, [255] * 3]),
    ],
)
def test_ppm(data, expected):
    assert pixels(data)[0].tolist() == expected


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "P"])
def test_tga(mode):
    picture = noise(20, 10).convert("L").convert("LA") if mode == "LA" else noise(20, 10).convert(mode)
    for options in ({}, {"compression": "tga_rle"}, {"orientation": 1}):
        data = encode(picture, "TGA", **options)
        assert load_image(data) == load_image(picture)


def test_files_that_are_left_out():
    assert "neither 255 nor" in refuse(b"P6 1 1 1023\n" + bytes(6))
    for data in (b"P3 1 1 255\n1 2 3\n", b"P6 is a key", *(encode(noise(32, 32), it) for it in ("JPEG2000", "ICO"))):
        assert "supported formats are" in refuse(data)


def test_a_jpeg_is_read_without_the_decoders_of_other_formats(python, tmp_path):
    noise(20, 10).save(tmp_path / "photo.jpg")
    code = "import sys; from convmixer import load_image; load_image(sys.argv[1])\n"
    code += "print({'pillow_heif', 'PIL.ImageCms', 'PIL.AvifImagePlugin', 'PIL.GifImagePlugin'} & set(sys.modules))"
    assert python("-c", code, tmp_path / "photo.jpg").stdout == "set()\n"


# XMP beside EXIF


SPACES = 'xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"'
ORIENTED = 'xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"'
XMP = f"<x:xmpmeta {SPACES}><rdf:Description {ORIENTED}/></rdf:RDF></x:xmpmeta>".encode()


@pytest.mark.parametrize("format", ["JPEG", "WEBP", "TIFF", "AVIF", "HEIC"])
def test_orientation_in_xmp_is_not_applied(format):
    """Browsers show such pictures as they are stored, and so do the programs that write both."""
    picture = gradient(32, 16)
    if format == "HEIC":  # pillow-heif would turn what XMP says into a transformation
        data = heic(picture, xmp=XMP.replace(b'"6"', b'"1"')).replace(b'Orientation="1"', b'Orientation="6"')
    else:
        data = encode(picture, format, **({"tiffinfo": {700: XMP}} if format == "TIFF" else {"xmp": XMP}))
    assert XMP in data and load_image(data).size == (32, 16)
    if format in ("JPEG", "WEBP", "AVIF"):
        both, one = encode(picture, format, xmp=XMP, exif=exif(3)), encode(picture, format, exif=exif(3))
        assert load_image(both) == load_image(one) == load_image(Image.open(BytesIO(both)))
