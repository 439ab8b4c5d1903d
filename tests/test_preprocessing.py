"""Preprocessing: equal to timm's evaluation transform bit for bit, and harmless for extreme shapes."""

import json
import math

import numpy as np
import pytest
from picture_files import noise
from PIL import Image
from timm.data import create_transform

from convmixer import preprocessing as preprocessing_module
from convmixer.preprocessing import CIFAR10, IMAGENET, Preprocessing, crop_box, preprocess, resize_and_crop


def test_settings_survive_json():
    for preprocessing, resize in ((IMAGENET, 233), (CIFAR10, 32), (Preprocessing(224, 0.875), 256)):
        settings = json.loads(json.dumps(preprocessing.to_dict()))
        assert settings["resize"] == resize
        assert Preprocessing.from_dict(settings | {"colour": "any"}) == preprocessing


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("size", [0, 4097, 224.0, "224", True, None]),
        ("resize", [232, "233"]),
        ("crop_pct", [0, 1.01, 0.01, math.nan, "0.96"]),
        ("interpolation", ["cubic", None, ["bicubic"]]),
        ("mean", [None, 0.5, [0.5, 0.5], [0.5, 0.5, math.nan], [0, 0, 10**400], [0, 0, "0"]]),
        ("std", [[1, 1, 0], [1, math.inf, 1], [[1, 1, 1]], {"r": 1}]),
    ],
)
def test_malformed_settings_are_named_in_one_line(name, values):
    for value in values:
        with pytest.raises(ValueError, match=f"^{name} is ") as caught:
            Preprocessing.from_dict(IMAGENET.to_dict() | {name: value})
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
    with pytest.raises(ValueError, match="must be given interpolation, mean, std"):
        Preprocessing.from_dict({"size": 224, "crop_pct": 0.96})
    for image, line in ((Image.new("RGBA", (4, 4)), "RGBA"), (Image.new("RGB", (0, 4)), "at least one pixel")):
        with pytest.raises(ValueError, match=line):
            preprocess(image, CIFAR10)


@pytest.mark.parametrize("size", [(1, 1), (300, 1), (7, 1000), (233, 233), (235, 233), (375, 500), (640, 481)], ids=str)
@pytest.mark.parametrize(
    "preprocessing",
    [IMAGENET, CIFAR10, *(Preprocessing(48, 0.875, each) for each in ("nearest", "bilinear", "hamming", "lanczos"))],
)
def test_equal_to_timm(size, preprocessing):
    given = {"crop_pct": preprocessing.crop_pct, "mean": preprocessing.mean, "std": preprocessing.std}
    transform = create_transform(preprocessing.size, interpolation=preprocessing.interpolation, **given)
    prepared = preprocess(noise(*size), preprocessing)
    assert prepared.dtype == np.float32 and prepared.shape == (3, preprocessing.size, preprocessing.size)
    assert np.array_equal(prepared, transform(noise(*size)))


@pytest.mark.parametrize("size", [(1, 60_000), (64_000, 3)], ids=str)
def test_extreme_shapes_need_little_memory(size, monkeypatch):
    resized, resize = [], Image.Image.resize

    def record(self, size, *arguments):
        resized.append(size[0] * size[1])
        return resize(self, size, *arguments)

    monkeypatch.setattr(Image.Image, "resize", record)
    assert resize_and_crop(noise(*size), IMAGENET).size == (224, 224)
    assert 0 < max(resized) < 1_000_000


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
def test_middle_equals_the_whole_up_to_rounding(interpolation, monkeypatch):
    for size in ((601, 3), (5, 333), (300, 200), (61, 67)):
        preprocessing = Preprocessing(40, 0.9, interpolation)
        whole = np.asarray(resize_and_crop(noise(*size), preprocessing), dtype=int)
        with monkeypatch.context() as patch:
            patch.setattr(preprocessing_module, "MAX_PIXELS", 0)
            middle = np.asarray(resize_and_crop(noise(*size), preprocessing), dtype=int)
        assert abs(whole - middle).max() <= 1, size


def test_crop_box_is_what_the_network_sees():
    assert crop_box((466, 466), IMAGENET) == (8, 8, 456, 456)  # resized to 233; the crop begins at 4, not 4.5
    left, top, right, bottom = (round(side) for side in crop_box((932, 466), IMAGENET))
    image = Image.new("RGB", (932, 466), "grey")
    image.paste("white", (left, top, right, bottom))
    inside = np.asarray(resize_and_crop(image, IMAGENET))
    assert (inside[3:-3, 3:-3] == 255).all()
    image.paste("grey", (left + 4, top + 4, right - 4, bottom - 4))
    border = np.asarray(resize_and_crop(image, IMAGENET))
    assert min(edge.mean() for edge in (border[0], border[-1], border[:, 0], border[:, -1])) > 200
