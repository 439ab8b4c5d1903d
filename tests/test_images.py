"""What a source may be, files that are no picture or a broken one, limits, and which way is up."""

import io
import os
import struct
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from picture_files import encode, exif, heic, noise, pixels, png, png_bomb, png_chunk, refuse
from PIL import Image, ImageFile

from convmixer.images import load_image

pytestmark = pytest.mark.usefixtures("silent")

FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIC", "PPM", "TGA"]


def test_every_kind_of_source_gives_the_same_picture(tmp_path):
    data = encode(noise(20, 10), "PNG")
    path = tmp_path / "zażółć 图.png"
    path.write_bytes(data)
    reading, writing = os.pipe()  # a stream that cannot seek
    with open(writing, "wb") as pipe:
        pipe.write(data)
    already_read = io.BytesIO(data)
    already_read.read()
    with open(path, "rb") as file, Image.open(path) as lazy, open(reading, "rb", buffering=0) as pipe:
        for source in (path, str(path), data, memoryview(data), already_read, noise(20, 10), file, lazy, pipe):
            image = load_image(source)
            assert type(image) is Image.Image and image.mode == "RGB" and not image.info
            assert np.array_equal(np.asarray(image), np.asarray(noise(20, 10))), source
        assert not file.closed


def test_a_pil_image_is_copied_and_left_alone():
    palette = Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4)).convert("P")
    palette.info["transparency"] = bytes([0, 128])
    for image in (palette, noise(4, 4)):
        before = image.mode, image.tobytes(), dict(image.info), image.getpalette()
        load_image(image).paste(0, (0, 0, 4, 4))
        assert (image.mode, image.tobytes(), dict(image.info), image.getpalette()) == before


def test_sources_that_cannot_be_read(tmp_path):
    assert "binary mode" in refuse(io.StringIO("text"))
    assert "from ndarray" in refuse(np.zeros((4, 4, 3), np.uint8))
    assert f"{tmp_path} is a folder" in refuse(tmp_path)
    assert "dgo.jpg cannot be opened (No such file" in refuse(tmp_path / "dgo.jpg")
    assert "not a valid path" in refuse("dog\0.jpg")
    assert "dog?.jpg" in refuse("dog\n.jpg") and len(refuse("A" * 100_000)) < 500
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", "/dev/zero"):  # opened, they would wait or give for ever
        assert "not a regular file" in refuse(path)


@pytest.mark.parametrize(
    "content",
    [
        b"just some notes\n",
        b"BMW makes cars, and this text begins like a BMP file\n" * 9,
        struct.pack(">I", 24) + b"ftypheic\0\0\0\0mif1heic" + bytes(64),
        b"",
    ],
)
def test_other_files(content, tmp_path):
    (tmp_path / "notes.txt").write_bytes(content)
    message = refuse(tmp_path / "notes.txt")
    assert "supported formats are JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF, HEIC, PPM and TGA" in message
    assert "notes.txt" in message and "the picture" in refuse(content)


@pytest.mark.parametrize("format", FORMATS)
def test_cut_short_anywhere_too_large_or_without_memory(format, monkeypatch):
    data = heic(noise(40, 30)) if format == "HEIC" else encode(noise(40, 30), format)
    end = data[-18:] if format == "TGA" else b""  # which alone tells it from other files
    for part in (0.02, 0.3, 0.9):
        assert "the picture" in refuse(data[: int((len(data) - len(end)) * part)] + end)

    def fail(self):
        raise MemoryError

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    assert "too much memory" in refuse(data)
    if format != "JPEG":  # which is reduced
        assert "40 x 30 pixels, more than the 1,199" in refuse(data, max_pixels=1199)


def test_warnings_are_kept_from_the_caller_in_all_threads_and_from_nobody_else():
    """A header that makes Pillow warn, and filters that would make each warning an error."""
    bad = png(1, 1, 8, 0, b"\0\0", extra=png_chunk(b"acTL", struct.pack(">II", 0, 0)))
    with ThreadPoolExecutor(8) as pool:
        assert {image.size for image in pool.map(load_image, [bad] * 200)} == {(1, 1)}
    with pytest.raises(UserWarning, match="APNG"):
        Image.open(io.BytesIO(bad))


def test_the_limit_is_exact_and_known_before_anything_is_decoded(no_decoding):
    bomb = png_bomb(10_000)
    assert len(bomb) < 50_000 and "10000 x 10000 pixels" in refuse(bomb)
    assert "30 x 20 pixels, more than the 599" in refuse(noise(30, 20), max_pixels=599)
    assert load_image(noise(30, 20), max_pixels=600) == noise(30, 20)
    assert "no pixels" in refuse(Image.new("RGB", (0, 5)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation):
    """EXIF says which side of the scene the first row and the first column show; this undoes it with NumPy."""
    upright = np.kron(np.array([[0, 100], [180, 250], [60, 220]], np.uint8), np.ones((16, 16), np.uint8))
    turned = upright.T if orientation > 4 else upright
    rows, columns = [(1, 1), (1, -1), (-1, -1), (-1, 1), (1, 1), (-1, 1), (-1, -1), (1, -1)][orientation - 1]
    stored = Image.fromarray(np.ascontiguousarray(turned[::rows, ::columns])).convert("RGB")
    for format in ("PNG", "TIFF", "JPEG", "WEBP"):
        data = encode(stored, format, exif=exif(orientation))
        image = load_image(data)
        assert image.size == (32, 48) and abs(np.asarray(image)[..., 0].astype(int) - upright).max() < 12
        assert load_image(image) == image, "loading the result again must change nothing"
        assert load_image(Image.open(io.BytesIO(data))) == image


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_broken_exif_is_ignored(format):
    whole = exif(6).tobytes()
    for block in (b"Exif\0\0garbage!", whole[:9], whole[:10] + b"\xff\xff\xff\xf0" + whole[14:]):
        assert load_image(encode(noise(20, 10), format, exif=block)).size == (20, 10)


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_first_frame_of_animations(format):
    red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    data = encode(red, format, save_all=True, append_images=[blue])
    assert abs(pixels(data).astype(int) - (255, 0, 0)).max() <= 2
