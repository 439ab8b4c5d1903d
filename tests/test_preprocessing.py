"""Preprocessing: equal to timm's evaluation transform bit for bit, and harmless for extreme shapes."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from convmixer import preprocessing as preprocessing_module
from convmixer.preprocessing import CIFAR10, IMAGENET, Preprocessing, crop_box, preprocess, resize_and_crop


def noise(width: int, height: int) -> Image.Image:
    values = np.random.default_rng((width, height)).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def test_settings():
    assert (IMAGENET.size, IMAGENET.resize) == (224, 233)
    assert (CIFAR10.size, CIFAR10.resize) == (32, 32)
    assert Preprocessing(224, 0.875).resize == 256
    settings = json.loads(json.dumps(IMAGENET.to_dict()))
    assert settings == {
        "size": 224,
        "resize": 233,
        "crop_pct": 0.96,
        "interpolation": "bicubic",
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
    }
    for preprocessing in (IMAGENET, CIFAR10):
        assert Preprocessing.from_dict(preprocessing.to_dict() | {"colour": "any"}) == preprocessing
    del settings["resize"]
    assert Preprocessing.from_dict(settings) == IMAGENET
    assert len({IMAGENET, Preprocessing.from_dict(settings)}) == 1


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("size", [0, -1, 4097, 224.0, "224", True, None, [224], 10**5000]),
        ("resize", [232, "233", None]),
        ("crop_pct", [0, -0.5, 1.01, 5e-324, 0.01, math.nan, math.inf, "0.96", None, True]),
        ("interpolation", ["cubic", "BICUBIC", "", None, 3, ["bicubic"]]),
        ("mean", [None, 0.5, "abc", [], [0.5, 0.5], [0.5] * 4, [0.5, 0.5, math.nan], [0, 0, 10**400], [0, 0, "0"]]),
        ("std", [None, [1, 1], [1, 1, 0], [1, 1, -1], [1, math.inf, 1], [1, 1, True], [[1, 1, 1]], {"r": 1}]),
    ],
)
def test_malformed_settings(name, values):
    for value in values:
        with pytest.raises(ValueError) as caught:
            Preprocessing.from_dict(IMAGENET.to_dict() | {name: value})
        message = str(caught.value)
        assert "\n" not in message and len(message) < 300
        assert name in message or value == 10**5000  # Python itself refuses to print that one


def test_incomplete_settings():
    for name in ("size", "crop_pct", "interpolation", "mean", "std"):
        settings = IMAGENET.to_dict()
        del settings[name]
        with pytest.raises(ValueError, match=name):
            Preprocessing.from_dict(settings)
    for settings in (None, [], "size", 5):
        with pytest.raises(ValueError, match="mapping"):
            Preprocessing.from_dict(settings)


def by_timm(image: Image.Image, preprocessing: Preprocessing) -> torch.Tensor:
    transform = create_transform(
        input_size=(3, preprocessing.size, preprocessing.size),
        is_training=False,
        interpolation=preprocessing.interpolation,
        crop_pct=preprocessing.crop_pct,
        mean=preprocessing.mean,
        std=preprocessing.std,
    )
    return transform(image)


SIZES = [(1, 1), (3000, 1), (1, 3000), (233, 233), (232, 234), (224, 224), (500, 375), (375, 500), (640, 481)]
SIZES += [(7, 1000), (2000, 1333), (32, 32), (33, 32), (235, 233), (233, 235)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("preprocessing", [IMAGENET, CIFAR10], ids=["imagenet", "cifar"])
def test_equal_to_timm(size, preprocessing):
    image = noise(*size)
    prepared = preprocess(image, preprocessing)
    assert prepared.dtype == np.float32 and prepared.shape == (3, preprocessing.size, preprocessing.size)
    assert np.array_equal(prepared, by_timm(image, preprocessing))


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"])
def test_equal_to_timm_with_every_filter(interpolation):
    preprocessing = Preprocessing(48, 0.875, interpolation)
    for size in ((100, 71), (30, 41)):
        assert np.array_equal(preprocess(noise(*size), preprocessing), by_timm(noise(*size), preprocessing))


@pytest.mark.parametrize("size", [(60_000, 1), (1, 60_000), (64_000, 3), (3000, 1)], ids=str)
def test_extreme_shapes_need_little_memory(size, monkeypatch):
    resized = []
    resize = Image.Image.resize

    def record(self, size, *args, **kwargs):
        resized.append(size[0] * size[1])
        return resize(self, size, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "resize", record)
    image = noise(*size)
    assert resize_and_crop(image, IMAGENET).size == (224, 224)
    assert 0 < max(resized) < 1_000_000
    # What comes out is the middle: crop_box names the source pixel under the centre of each resized one.
    left, top, right, bottom = crop_box(size, IMAGENET)
    nearest = resize_and_crop(image, Preprocessing(224, 0.96, "nearest"))
    for position in (0, 100, 223):
        x = int(left + (right - left) * (position + 0.5) / 224)
        y = int(top + (bottom - top) * (position + 0.5) / 224)
        assert nearest.getpixel((position, position)) == image.getpixel((x, y))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "hamming", "lanczos"])
def test_middle_equals_the_whole_up_to_rounding(interpolation, monkeypatch):
    for size in ((601, 3), (5, 333), (300, 200), (61, 67)):
        preprocessing = Preprocessing(40, 0.9, interpolation)
        whole = np.asarray(resize_and_crop(noise(*size), preprocessing), dtype=int)
        with monkeypatch.context() as patch:
            patch.setattr(preprocessing_module, "MAX_PIXELS", 0)
            middle = np.asarray(resize_and_crop(noise(*size), preprocessing), dtype=int)
        assert abs(whole - middle).max() <= 1, size


def test_only_rgb_with_pixels_is_preprocessed():
    with pytest.raises(ValueError, match="RGBA"):
        preprocess(Image.new("RGBA", (4, 4)), CIFAR10)
    with pytest.raises(ValueError, match="at least one pixel"):
        preprocess(Image.new("RGB", (0, 4)), CIFAR10)
    with pytest.raises(ValueError, match="at least one pixel"):
        crop_box((4, 0), CIFAR10)


def test_crop_box():
    assert crop_box((32, 32), CIFAR10) == (0, 0, 32, 32)
    assert crop_box((64, 32), CIFAR10) == (16, 0, 48, 32)
    assert crop_box((32, 64), CIFAR10) == (0, 16, 32, 48)
    assert crop_box((500, 375), IMAGENET) == pytest.approx(
        (43 * 500 / 310, 4 * 375 / 233, 267 * 500 / 310, 228 * 375 / 233)
    )
    assert crop_box((466, 466), IMAGENET) == (8, 8, 456, 456)  # resized to 233; the crop begins at 4, not 4.5


def test_crop_box_is_what_the_network_sees():
    """Grey outside the box and white inside must come out white, and the reverse must show a border."""
    left, top, right, bottom = (round(side) for side in crop_box((932, 466), IMAGENET))
    image = Image.new("RGB", (932, 466), "grey")
    image.paste("white", (left, top, right, bottom))
    inside = np.asarray(resize_and_crop(image, IMAGENET))
    assert (inside[3:-3, 3:-3] == 255).all()
    image.paste("grey", (left + 4, top + 4, right - 4, bottom - 4))
    border = np.asarray(resize_and_crop(image, IMAGENET))
    for edge in (border[0], border[-1], border[:, 0], border[:, -1]):
        assert edge.mean() > 200
    assert (border[5:-5, 5:-5] == 128).all()
