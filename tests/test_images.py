"""What a source may be, files that are no picture or a broken one, limits, and which way is up."""

import io
import os
import struct
import threading
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from picture_files import ORIENTATION, encode, exif, noise, pixels, png, png_bomb, png_chunk, refuse
from PIL import Image, ImageFile, features

from convmixer import images
from convmixer.images import load_image

pytestmark = pytest.mark.usefixtures("silent")


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
    "picture.ppm": b"P3 1 1 255 1 2 3",
}


@pytest.mark.parametrize("name", NOT_PICTURES)
def test_other_files(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(NOT_PICTURES[name])
    message = refuse(path)
    assert (
        name in message and "supported formats are JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF, HEIC, PPM and TGA" in message
    )
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


def test_warnings_are_kept_from_the_caller_in_all_threads_and_from_nobody_else():
    """Headers that make Pillow warn, and filters that would make each warning an error."""
    bad = png(1, 1, 8, 0, b"\0\0", extra=png_chunk(b"acTL", struct.pack(">II", 0, 0)))
    tiff = bytearray(encode(noise(8, 8), "TIFF"))
    tiff[10:14] = b"\x0e\1\2\0"  # the first entry: a text beyond the end of the file
    tiff[14:22] = struct.pack("<II", 100, 10**6)
    damaged = exif(6).tobytes()[:-8]
    sources = [bad, bytes(tiff), encode(noise(8, 8), "JPEG", exif=damaged)]
    outcomes = {load_or_refuse(source) for source in sources}
    before = list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(load_or_refuse, sources * 100)) == outcomes
    assert load_image(bad).size == (1, 1) and warnings.filters == before
    at = bad.index(b"acTL") - 4
    late = bad[:at] + bad[at + 20 : -12] + bad[at : at + 20] + bad[-12:]  # read when the pixels are
    assert load_image(Image.open(io.BytesIO(late))).size == (1, 1)
    with pytest.raises(UserWarning, match="APNG"):
        Image.open(io.BytesIO(bad))


def load_or_refuse(source: bytes) -> str:
    try:
        return str(load_image(source).size)
    except images.ImageError as error:
        return str(error)


def test_pictures_are_decoded_side_by_side(monkeypatch):
    """One that takes long does not make another one wait."""
    is_slow, may_end, load = threading.Event(), threading.Event(), ImageFile.ImageFile.load

    def slow_load(self):
        if self.size == (9, 9):
            is_slow.set()
            assert may_end.wait(60)
        return load(self)

    monkeypatch.setattr(ImageFile.ImageFile, "load", slow_load)
    slow, quick = encode(noise(9, 9), "BMP"), encode(noise(4, 4), "PNG")
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(load_image, slow)
        assert is_slow.wait(60)
        assert pool.submit(load_image, quick).result(60).size == (4, 4)
        assert not waiting.done()
        may_end.set()
        assert waiting.result(60).size == (9, 9)


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


# Which way is up


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
