"""Every kind of file that Pillow mishandles."""

import io
import math
import os
import struct
import threading
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile, features

from convmixer import images
from convmixer.images import ImageError, load_image
from convmixer.preprocessing import Preprocessing, resize_and_crop

ORIENTATION = 0x0112
WHITE = (255, 255, 255)


def noise(width: int, height: int) -> Image.Image:
    values = np.random.default_rng((width, height)).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def encode(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, colour: int, rows: bytes, extra: bytes = b"") -> bytes:
    """A PNG written by hand; `rows` are the filtered rows, `extra` the chunks before the pixels."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    pixels = png_chunk(b"IDAT", zlib.compress(rows, 9))
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + extra + pixels + png_chunk(b"IEND", b"")


def png_bomb(side: int) -> bytes:
    """A complete black 1-bit PNG of side x side pixels, in a few kilobytes."""
    return png(side, side, 1, 0, bytes(side * (1 + math.ceil(side / 8))))


def with_jpeg_size(data: bytes, width: int, height: int) -> bytes:
    """The same JPEG, but its frame header claims another size."""
    start = max(data.find(marker) for marker in (b"\xff\xc0", b"\xff\xc2"))
    return data[: start + 5] + struct.pack(">HH", height, width) + data[start + 9 :]


def with_scan_of_one_component(data: bytes) -> bytes:
    """The same JPEG, but its first scan claims to hold the luma only."""
    start = data.index(b"\xff\xda\x00\x0c\x03")
    return data[:start] + b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00" + data[start + 14 :]


def refuse(source, **options) -> str:
    """The message of the ImageError that loading must end in."""
    with pytest.raises(ImageError) as caught:
        load_image(source, **options)
    message = str(caught.value)
    assert message and message.isprintable(), "a message is one line that any terminal can print"
    return message


def pixels(source, **options) -> np.ndarray:
    return np.asarray(load_image(source, **options))


@pytest.fixture
def no_decoding(monkeypatch):
    """Any attempt to decode pixels fails the test."""
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("pixels were decoded"))


@pytest.fixture(autouse=True)
def silent():
    """No warning may reach the caller, and the filters stay as they were."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# What a source may be


def test_every_kind_of_source_gives_the_same_picture(tmp_path):
    data = encode(noise(20, 10), "PNG")
    path = tmp_path / "zażółć 图.png"
    path.write_bytes(data)
    expected = np.asarray(noise(20, 10))
    already_read = io.BytesIO(data)
    already_read.read()
    sources = [path, str(path), data, bytearray(data), memoryview(data), already_read, noise(20, 10)]
    for source in sources:
        image = load_image(source)
        assert type(image) is Image.Image and image.mode == "RGB" and image.size == (20, 10)
        assert np.array_equal(np.asarray(image), expected), source
    with open(path, "rb") as file, Image.open(path) as lazy:
        assert np.array_equal(pixels(file), expected) and not file.closed
        assert np.array_equal(pixels(lazy), expected)


def test_stream_that_cannot_seek():
    reading, writing = os.pipe()
    data = encode(noise(8, 8), "PNG")
    with open(writing, "wb") as file:
        file.write(data)
    with open(reading, "rb", buffering=0) as file:
        assert np.array_equal(pixels(file), np.asarray(noise(8, 8)))


def test_result_does_not_need_its_file(tmp_path):
    path = tmp_path / "animation.gif"
    path.write_bytes(encode(noise(8, 8).convert("P"), "GIF", save_all=True, append_images=[noise(8, 8).rotate(90)]))
    image = load_image(path)
    path.unlink()
    assert image.copy().size == (8, 8) and not image.info


def test_pil_image_is_copied_and_left_alone():
    palette = Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4)).convert("P")
    palette.info["transparency"] = bytes([0, 128])
    rgb = noise(4, 4)
    rgb.info["comment"] = "kept"
    for image in (palette, rgb):
        before = image.mode, image.tobytes(), dict(image.info), image.getpalette()
        load_image(image).paste(0, (0, 0, 4, 4))
        assert (image.mode, image.tobytes(), dict(image.info), image.getpalette()) == before


@pytest.mark.parametrize("source", [None, 0, 3.5, ["dog.jpg"], np.zeros((4, 4, 3), np.uint8)], ids=repr)
def test_unknown_source(source):
    assert f"from {type(source).__name__}" in refuse(source)


def test_file_objects_that_cannot_be_read(tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(encode(noise(4, 4), "PNG"))
    with open(path, encoding="latin-1") as text:
        assert "binary mode" in refuse(text)
    closed = io.BytesIO(b"data")
    closed.close()
    assert "binary mode" in refuse(closed)
    with Image.open(path) as lazy:
        pass
    refuse(lazy)  # the file was closed before its pixels were read


def test_paths_that_are_no_picture_file(tmp_path):
    assert f"{tmp_path} is a folder" in refuse(tmp_path)
    assert "dgo.jpg cannot be opened (No such file" in refuse(tmp_path / "dgo.jpg")
    assert "cannot be opened (Not a directory)" in refuse(Path(__file__) / "x.png")
    assert "not a valid path" in refuse("dog\0.jpg")
    assert "dog?.jpg" in refuse("dog\n.jpg")
    assert len(refuse("data:image/png;base64," + "A" * 100_000)) < 500
    refuse("")
    refuse("\ud800.jpg")


def test_special_files_are_not_opened(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for path in (fifo, "/dev/zero"):
        done = threading.Thread(target=lambda path=path: refuse(path), daemon=True)
        done.start()
        done.join(timeout=5)
        assert not done.is_alive(), f"waits for {path} for ever"
        assert "not a regular file" in refuse(path)


def test_permission_denied(tmp_path, monkeypatch):
    path = tmp_path / "secret.png"
    path.touch()

    def deny(*args):
        raise PermissionError(13, "Permission denied")  # the tests may run as root, who may read everything

    monkeypatch.setattr(images, "open", deny, raising=False)
    assert "secret.png cannot be opened (Permission denied)" in refuse(path)


# Files that are no picture, or a broken one


HEIC_BRANDS = (b"heic\0\0\0\0mif1heic", b"mif1\0\0\0\0mif1heic")
NOT_PICTURES = {
    "notes.txt": b"just some notes\n",
    "bmw.txt": b"BMW makes cars, and this text begins like a BMP file\n" * 9,
    "drawing.svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
    "paper.pdf": b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj\n",
    "photo.heic": struct.pack(">I", 24) + b"ftyp" + HEIC_BRANDS[0] + bytes(64),
    "other.heic": struct.pack(">I", 24) + b"ftyp" + HEIC_BRANDS[1] + bytes(64),
    "figure.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n",
    "picture.ppm": b"P6 1 1 255 abc",
}


@pytest.mark.parametrize("name", NOT_PICTURES)
def test_other_files(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(NOT_PICTURES[name])
    message = refuse(path)
    assert name in message and "supported formats are JPEG, PNG, WebP, GIF, BMP, TIFF and AVIF" in message
    assert "the picture" in refuse(NOT_PICTURES[name])


def test_empty_file(tmp_path):
    path = tmp_path / "empty.jpg"
    path.touch()
    assert "empty.jpg is empty" in refuse(path)
    assert "the picture is empty" in refuse(b"")


FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"] + (["AVIF"] if features.check("avif") else [])


@pytest.mark.parametrize("format", FORMATS)
def test_truncated_at_any_place(format, tmp_path):
    data = encode(noise(40, 30), format)
    path = tmp_path / "photo.x"
    for part in (0.02, 0.3, 0.6, 0.9):
        path.write_bytes(data[: int(len(data) * part)])
        assert "photo.x" in refuse(path)
    assert "damaged" in refuse(path)


def test_corrupt_pixels():
    data = bytearray(encode(noise(40, 30), "PNG"))
    data[len(data) // 2] ^= 255
    assert "damaged or cut short" in refuse(data)


@pytest.mark.parametrize("error", [MemoryError, Image.DecompressionBombError, KeyError, AssertionError, zlib.error])
def test_whatever_pillow_raises_becomes_one_error(error, monkeypatch):
    def fail(self):
        raise error("line\nbreak")

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    too_large = error in (MemoryError, Image.DecompressionBombError)
    assert ("too much memory" if too_large else "damaged") in refuse(encode(noise(4, 4), "PNG"))


def test_format_that_pillow_was_built_without(monkeypatch):
    decoder, _ = Image.OPEN["BMP"]
    monkeypatch.setitem(Image.OPEN, "BMP", (decoder, lambda prefix: "BMP support not installed"))
    assert "cannot be read" in refuse(encode(noise(4, 4), "BMP"))


def test_filters_of_warnings_survive_threads():
    """A header that makes Pillow warn, loaded by many threads at once."""
    bad = png(1, 1, 8, 0, b"\0\0", extra=png_chunk(b"acTL", struct.pack(">II", 0, 0)))
    with pytest.raises(UserWarning, match="APNG"):
        Image.open(io.BytesIO(bad))
    before = list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        sizes = set(pool.map(lambda _: load_image(bad).size, range(200)))
    assert sizes == {(1, 1)}
    assert warnings.filters == before


# Limits


@pytest.mark.parametrize("side", [10_000, 20_000])
def test_png_bomb(side, no_decoding):
    data = png_bomb(side)
    assert len(data) < 50_000
    assert f"{side} x {side} pixels" in refuse(data)


def test_limit_is_exact_and_independent_of_pillows(monkeypatch):
    data = encode(noise(30, 20), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow would refuse from 200 on and warn from 100 on
    assert load_image(data, max_pixels=600).size == (30, 20)
    assert "30 x 20 pixels, more than the 599" in refuse(data, max_pixels=599)
    assert "30 x 20 pixels, more than the 599" in refuse(noise(30, 20), max_pixels=599)
    assert Image.MAX_IMAGE_PIXELS == 100


@pytest.mark.parametrize("format", FORMATS[1:])
def test_limit_is_checked_before_decoding(format, no_decoding):
    refuse(encode(noise(30, 20), format), max_pixels=599)


def test_pictures_without_pixels():
    assert "no pixels" in refuse(Image.new("RGB", (0, 5)))


def gradient(width: int, height: int) -> Image.Image:
    return Image.linear_gradient("L").resize((width, height)).convert("RGB")


@pytest.mark.parametrize(
    ("target_size", "size"),
    [
        (None, (400, 300)),  # the largest that fits
        (25, (100, 75)),  # three times 25
        (26, (200, 150)),
        (100, (400, 300)),
        (500, (400, 300)),  # less than wanted, but all that fits
    ],
)
def test_jpeg_over_the_limit_is_reduced(target_size, size):
    data = encode(gradient(800, 600), "JPEG", quality=95)
    reduced = load_image(data, max_pixels=200_000, target_size=target_size)
    assert reduced.size == size
    error = np.asarray(reduced, dtype=int) - np.asarray(gradient(800, 600).resize(size, Image.Resampling.BOX))
    assert abs(error).max() < 8
    rotated = encode(gradient(800, 600), "JPEG", exif=exif(6))
    assert load_image(rotated, max_pixels=200_000, target_size=target_size).size == size[::-1]


@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_within_the_limit_is_reduced_for_who_needs_less(progressive):
    data = encode(noise(800, 600), "JPEG", progressive=progressive)
    expected = np.asarray(Image.open(io.BytesIO(data)))
    assert np.array_equal(pixels(data, max_pixels=480_000), expected)
    assert np.array_equal(pixels(data, target_size=101), expected)  # half the sides is less than three times that
    sizes = {side: load_image(data, target_size=side).size for side in (100, 51, 50, 26, 25, 1)}
    half, quarter, eighth = (400, 300), (200, 150), (100, 75)
    assert sizes == {100: half, 51: half, 50: quarter, 26: quarter, 25: eighth, 1: eighth}
    assert load_image(encode(noise(804, 600), "JPEG"), target_size=1).size == (201, 150)  # an eighth is not whole
    assert load_image(encode(noise(801, 600), "JPEG"), target_size=1).size == (801, 600)
    assert load_image(Image.open(io.BytesIO(data)), target_size=1).size == (800, 600)  # the caller's own picture
    assert load_image(encode(noise(800, 600), "PNG"), target_size=1).size == (800, 600)


def test_a_reduced_jpeg_looks_the_same_to_the_network(photos):
    for name in ("dog", "cat", "pizza", "shuttle"):
        photo = Image.open(photos / f"{name}.jpg").convert("RGB")
        for sides, size in [((2400, 1600), 224), ((1600, 1064), 32)]:
            large = photo.resize(sides, Image.Resampling.LANCZOS)
            data, wanted = encode(large, "JPEG", quality=90), Preprocessing(size)
            reduced = load_image(data, target_size=wanted.resize)
            assert reduced.width == large.width / (2 if size == 224 else 8)
            seen = [np.asarray(resize_and_crop(image, wanted), dtype=int) for image in (load_image(data), reduced)]
            assert abs(seen[0] - seen[1]).mean() < 0.8  # of 255


def test_large_jpegs_that_stay_refused(no_decoding):
    small = encode(noise(16, 16), "JPEG", subsampling=0)
    assert "65500 x 65500 pixels" in refuse(with_jpeg_size(small, 65500, 65500))  # too large at 1/8 too
    assert "1000 x 1 pixels" in refuse(with_jpeg_size(small, 1000, 1), max_pixels=200)  # no eighth of one row
    # These would need memory for all coefficients, at whatever scale.
    progressive = encode(noise(16, 16), "JPEG", progressive=True)
    assert "12000 x 12000 pixels" in refuse(with_jpeg_size(progressive, 12000, 12000))
    assert "12000 x 12000 pixels" in refuse(with_scan_of_one_component(with_jpeg_size(small, 12000, 12000)))


def test_grey_and_cmyk_jpegs_are_reduced():
    for mode in ("L", "CMYK"):
        data = encode(gradient(80, 60).convert(mode), "JPEG")
        assert load_image(data, max_pixels=1200).size == (40, 30)


# What the pixels become


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[ORIENTATION] = orientation
    return tags


@pytest.mark.parametrize("format", ["PNG", "TIFF", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation, format):
    """EXIF says which side of the scene the first row and the first column show; this undoes it with NumPy."""
    upright = np.kron(np.array([[0, 100], [180, 250], [60, 220]], np.uint8), np.ones((16, 16), np.uint8))
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: upright.T[::-1],
        7: upright.T[::-1, ::-1],
        8: upright.T[:, ::-1],
    }[orientation]
    data = encode(Image.fromarray(np.ascontiguousarray(stored)).convert("RGB"), format, exif=exif(orientation))
    image = load_image(data)
    assert image.size == (32, 48)
    assert abs(np.asarray(image)[..., 0].astype(int) - upright).max() < 12
    assert image.tobytes() == load_image(image).tobytes(), "loading the result again must change nothing"
    assert load_image(Image.open(io.BytesIO(data))).tobytes() == image.tobytes()


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_broken_exif_is_ignored(format):
    whole = exif(6).tobytes()
    far_away = whole[:10] + b"\xff\xff\xff\xf0" + whole[14:]
    for block in (b"Exif\0\0garbage!", b"Exif\0\0", whole[:9], whole[:20], far_away):
        assert load_image(encode(noise(20, 10), format, exif=block)).size == (20, 10)
    image = noise(20, 10)
    image.getexif()[ORIENTATION] = [6]
    assert load_image(image).size == (20, 10)


def test_first_frame_of_animations():
    red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    for format in ("GIF", "PNG", "WEBP", "TIFF"):
        data = encode(red, format, save_all=True, append_images=[blue])
        assert Image.open(io.BytesIO(data)).n_frames == 2
        colour = np.asarray(load_image(data), dtype=int).reshape(-1, 3)
        assert abs(colour - (255, 0, 0)).max() <= 2, format


def test_phone_pictures_with_more_pictures_behind():
    data = encode(gradient(80, 60), "MPO", save_all=True, append_images=[noise(80, 60)])
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert np.array_equal(pixels(data), np.asarray(Image.open(io.BytesIO(data))))
    assert load_image(data, max_pixels=1200).size == (40, 30)
    broken = data.replace(b"MPF\0", b"MPF\0\xff", 1)  # shifts the list of pictures, so that it makes no sense
    assert load_image(broken).size == (80, 60)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow was built without AVIF")
def test_avif():
    tags = exif(6)
    data = encode(gradient(64, 48), "AVIF", quality=95, exif=tags)
    image = load_image(data)
    assert image.size == (48, 64)
    expected = gradient(64, 48).transpose(Image.Transpose.ROTATE_270)
    assert abs(np.asarray(image, dtype=int) - np.asarray(expected)).max() < 12


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
