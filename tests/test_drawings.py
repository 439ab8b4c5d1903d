"""The demo's example pictures: what they promise to show is what the shipped model sees."""

import io

import numpy as np
import pytest
from PIL import Image

from convmixer import Classifier
from demo.drawings import draw_examples


@pytest.fixture(scope="module")
def examples() -> dict[str, Image.Image]:
    return draw_examples()


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    return Classifier("convmixer_256_8_cifar10", device="cpu")


def as_jpeg(image: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return Image.open(buffer)


def moved(image: Image.Image, x: int, y: int, zoom: float) -> Image.Image:
    """Enlarged around a point beside the centre, so that nothing from outside the picture is needed."""
    return image.transform(
        image.size, Image.Transform.AFFINE, (1 / zoom, 0, x, 0, 1 / zoom, y), Image.Resampling.BICUBIC
    )


def test_pictures_are_rgb_of_one_size_and_the_same_every_time(examples):
    again = draw_examples()
    assert list(again) == list(examples) and len(examples) == 6
    for name, image in examples.items():
        assert (image.mode, image.size) == ("RGB", (480, 360)), name
        assert np.array_equal(image, again[name]), name


def test_shipped_model_names_every_picture(examples, classifier):
    for name, best in zip(examples, classifier.classify_many(examples.values(), top_k=1), strict=True):
        assert best[0].label == name and best[0].score > 0.8, (name, best)


def test_shipped_model_does_so_after_a_jpeg_a_thumbnail_a_shift_or_a_zoom(examples, classifier):
    for name, image in examples.items():
        variants = [as_jpeg(image), image.resize((96, 72), Image.Resampling.LANCZOS)]
        variants += [moved(image, x, y, 1.05) for x in (0, 22) for y in (0, 17)]
        for best in classifier.classify_many(variants, top_k=1):
            assert best[0].label == name and best[0].score > 0.8, (name, best)
