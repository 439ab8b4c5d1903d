"""Formats, known by what is in the file; JPEGs at the scale that is needed; and files that end too early."""

import io
import struct
import sys

import numpy as np
import pytest
from picture_files import encode, exif, gradient, heic, noise, pixels, refuse
from PIL import Image

from convmixer.images import load_image
from convmixer.preprocessing import Preprocessing, resize_and_crop

pytestmark = pytest.mark.usefixtures("silent")


def test_files_are_known_by_any_of_their_brands():
    data = heic(gradient(64, 48))
    assert abs(pixels(data).astype(int) - np.asarray(gradient(64, 48))).max() < 8
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
        assert load_image(encode(picture, "TGA", **options)) == load_image(picture)


def test_files_that_are_left_out():
    assert "neither 255 nor" in refuse(b"P6 1 1 1023\n" + bytes(6))
    for data in (b"P3 1 1 255\n1 2 3\n", b"P6 is a key", *(encode(noise(32, 32), it) for it in ("JPEG2000", "ICO"))):
        assert "supported formats are" in refuse(data)


def test_a_jpeg_is_read_without_the_decoders_of_other_formats(python, tmp_path):
    noise(20, 10).save(tmp_path / "photo.jpg")
    code = "import sys; from convmixer import load_image; load_image(sys.argv[1])\n"
    code += "print({'pillow_heif', 'PIL.ImageCms', 'PIL.AvifImagePlugin', 'PIL.GifImagePlugin'} & set(sys.modules))"
    assert python("-c", code, tmp_path / "photo.jpg").stdout == "set()\n"


SPACES = 'xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"'
ORIENTED = 'xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"'
XMP = f"<x:xmpmeta {SPACES}><rdf:Description {ORIENTED}/></rdf:RDF></x:xmpmeta>".encode()


@pytest.mark.parametrize("format", ["JPEG", "WEBP", "TIFF", "AVIF"])
def test_orientation_in_xmp_is_not_applied(format):
    """Browsers show such pictures as they are stored, and so do the programs that write both."""
    data = encode(gradient(32, 16), format, **({"tiffinfo": {700: XMP}} if format == "TIFF" else {"xmp": XMP}))
    assert XMP in data and load_image(data).size == load_image(Image.open(io.BytesIO(data))).size == (32, 16)


@pytest.mark.parametrize(
    ("target_size", "size"),
    [
        (None, (400, 300)),  # the largest that fits
        (25, (100, 75)),  # three times 25
        (500, (400, 300)),  # less than wanted, but all that fits
    ],
)
def test_jpeg_over_the_limit_is_reduced(target_size, size):
    data = encode(gradient(800, 600), "JPEG", quality=95)
    reduced = pixels(data, max_pixels=200_000, target_size=target_size).astype(int)
    assert abs(reduced - np.asarray(gradient(800, 600).resize(size, Image.Resampling.BOX))).max() < 8


@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_within_the_limit_is_reduced_for_who_needs_less(progressive):
    data = encode(noise(800, 600), "JPEG", progressive=progressive)
    sizes = {side: load_image(data, target_size=side).size for side in (101, 100, 51, 50, 25, 1)}
    half, quarter, eighth = (400, 300), (200, 150), (100, 75)
    assert sizes == {101: (800, 600), 100: half, 51: half, 50: quarter, 25: eighth, 1: eighth}
    assert load_image(encode(noise(804, 600), "JPEG"), target_size=1).size == (201, 150)  # an eighth is not whole


def test_a_reduced_jpeg_looks_the_same_to_the_network(photos):
    photo = Image.open(photos / "dog.jpg").convert("RGB")
    for sides, size, scale in [((2400, 1600), 224, 2), ((1600, 1064), 32, 8)]:
        data, wanted = encode(photo.resize(sides, Image.Resampling.LANCZOS), "JPEG", quality=90), Preprocessing(size)
        reduced = load_image(data, target_size=wanted.resize)
        assert reduced.width == sides[0] / scale
        seen = [np.asarray(resize_and_crop(image, wanted), dtype=int) for image in (load_image(data), reduced)]
        assert abs(seen[0] - seen[1]).mean() < 0.8  # of 255


def test_large_jpegs_that_stay_refused(no_decoding):
    small = encode(noise(16, 16), "JPEG", subsampling=0)
    # Those of more than one scan would need memory for all coefficients, at whatever scale.
    progressive, scan = encode(noise(16, 16), "JPEG", progressive=True), small.index(b"\xff\xda\x00\x0c\x03")
    of_luma = small[:scan] + b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00" + small[scan + 14 :]
    for data, side in ((small, 65500), (progressive, 12000), (of_luma, 12000)):
        at = max(data.find(marker) for marker in (b"\xff\xc0", b"\xff\xc2")) + 5
        assert f"{side} x {side} pixels" in refuse(data[:at] + struct.pack(">HH", side, side) + data[at + 4 :])


def test_phone_pictures_with_more_pictures_behind():
    data = encode(gradient(80, 60), "MPO", save_all=True, append_images=[noise(80, 60)])
    broken = data.replace(b"MPF\0", b"MPF\0\xff", 1)  # shifts the list of pictures, so that it makes no sense
    for each in (data, broken):
        assert np.array_equal(pixels(each), np.asarray(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}], ids=str)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_jpeg_without_its_end_is_taken_and_one_without_rows_on_request(options, mode):
    data = encode(noise(20, 15).resize((200, 150), Image.Resampling.BICUBIC).convert(mode), "JPEG", **options)
    for cut in (1, 2):
        assert load_image(data[:-cut]) == load_image(data)
        assert load_image(data[:-cut], target_size=12) == load_image(data, target_size=12)
    begin = data.index(b"\xff\xda") + 20
    for cut in (20, *range(50, len(data) - begin, 97)):  # the last bytes hold what lies beyond the edge
        assert "damaged or cut short" in refuse(data[:-cut]), cut
    assert "begins like JPEG" in refuse(data[:100], allow_truncated=True)  # nothing of it is there
    found = pixels(data[: len(data) * 2 // 3], allow_truncated=True)
    if not options:
        assert np.array_equal(found[:64], pixels(data)[:64]) and (found[-16:, -16:] == 128).all()


@pytest.mark.parametrize("format", ["PNG", "GIF", "PPM"])
def test_other_pictures_that_lack_rows_are_taken_on_request(format):
    data = encode(noise(40, 30), format)
    found, expected = pixels(data[: len(data) * 9 // 10], allow_truncated=True), pixels(data)
    assert np.array_equal(found[:15], expected[:15]) and not np.array_equal(found, expected)


def test_damage_is_refused_all_the_same():
    data = bytearray(encode(noise(40, 30), "PNG"))
    data[len(data) // 2] ^= 255
    assert "damaged or cut short" in refuse(data, allow_truncated=True)
