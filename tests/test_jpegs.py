"""JPEGs: read at the scale that is needed, from phones, and with their end cut off."""

import io
import struct

import numpy as np
import pytest
from picture_files import encode, gradient, noise, pixels, refuse
from PIL import Image

from convmixer.images import load_image
from convmixer.preprocessing import Preprocessing, resize_and_crop

pytestmark = pytest.mark.usefixtures("silent")


def with_jpeg_size(data: bytes, width: int, height: int) -> bytes:
    """The same JPEG, but its frame header claims another size."""
    start = max(data.find(marker) for marker in (b"\xff\xc0", b"\xff\xc2"))
    return data[: start + 5] + struct.pack(">HH", height, width) + data[start + 9 :]


@pytest.mark.parametrize(
    ("target_size", "size"),
    [
        (None, (400, 300)),  # the largest that fits
        (25, (100, 75)),  # three times 25
        (26, (200, 150)),
        (500, (400, 300)),  # less than wanted, but all that fits
    ],
)
def test_jpeg_over_the_limit_is_reduced(target_size, size):
    data = encode(gradient(800, 600), "JPEG", quality=95)
    reduced = load_image(data, max_pixels=200_000, target_size=target_size)
    assert reduced.size == size
    error = np.asarray(reduced, dtype=int) - np.asarray(gradient(800, 600).resize(size, Image.Resampling.BOX))
    assert abs(error).max() < 8


@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_within_the_limit_is_reduced_for_who_needs_less(progressive):
    data = encode(noise(800, 600), "JPEG", progressive=progressive)
    assert load_image(data) == load_image(data, target_size=101)  # half the sides is less than three times that
    sizes = {side: load_image(data, target_size=side).size for side in (100, 51, 50, 25, 1)}
    assert sizes == {100: (400, 300), 51: (400, 300), 50: (200, 150), 25: (100, 75), 1: (100, 75)}
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
    assert "65500 x 65500 pixels" in refuse(with_jpeg_size(small, 65500, 65500))  # too large at 1/8 too
    # These would need memory for all coefficients, at whatever scale: more than one scan.
    progressive = encode(noise(16, 16), "JPEG", progressive=True)
    start = small.index(b"\xff\xda\x00\x0c\x03")
    of_luma = small[:start] + b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00" + small[start + 14 :]
    for data in (progressive, of_luma):
        assert "12000 x 12000 pixels" in refuse(with_jpeg_size(data, 12000, 12000))


def test_phone_pictures_with_more_pictures_behind():
    data = encode(gradient(80, 60), "MPO", save_all=True, append_images=[noise(80, 60)])
    assert np.array_equal(pixels(data), np.asarray(Image.open(io.BytesIO(data))))
    assert load_image(data, max_pixels=1200).size == (40, 30)
    broken = data.replace(b"MPF\0", b"MPF\0\xff", 1)  # shifts the list of pictures, so that it makes no sense
    assert load_image(broken).size == (80, 60)


# Files that end too early


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}, {"quality": 95}], ids=str)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_jpeg_without_its_end_is_taken_and_one_without_rows_is_not(options, mode):
    coarse = noise(20, 15).resize((200, 150), Image.Resampling.BICUBIC).convert(mode)
    data = encode(coarse, "JPEG", **options)
    for cut in (1, 2):
        assert load_image(data[:-cut]) == load_image(data)
        assert load_image(data[:-cut], target_size=12) == load_image(data, target_size=12)
    begin = data.index(b"\xff\xda") + 20
    for cut in (20, *range(50, len(data) - begin, 97)):  # the last bytes hold what lies beyond the edge
        assert "damaged or cut short" in refuse(data[:-cut]), cut


def test_a_jpeg_that_lacks_rows_is_taken_on_request():
    coarse = noise(20, 15).resize((200, 150), Image.Resampling.BICUBIC)
    data = encode(coarse, "JPEG")
    expected, found = pixels(data), pixels(data[: len(data) * 2 // 3], allow_truncated=True)
    assert np.array_equal(found[:64], expected[:64])
    assert (found[-16:, -16:] == 128).all()
    assert "begins like JPEG" in refuse(data[:200], allow_truncated=True)  # nothing of it is there


@pytest.mark.parametrize("format", ["PNG", "GIF", "PPM"])
def test_other_pictures_that_lack_rows_are_taken_on_request(format):
    data = encode(noise(40, 30), format)
    found, expected = pixels(data[: len(data) * 9 // 10], allow_truncated=True), pixels(data)
    assert np.array_equal(found[:15], expected[:15]) and not np.array_equal(found, expected)


def test_damage_is_refused_all_the_same():
    data = bytearray(encode(noise(40, 30), "PNG"))
    data[len(data) // 2] ^= 255
    assert "damaged or cut short" in refuse(data, allow_truncated=True)
    refuse(encode(noise(40, 30), "TIFF")[:-900], allow_truncated=True)  # what is left cannot be told from the picture
