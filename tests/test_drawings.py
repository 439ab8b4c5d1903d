"""The demo's example pictures: what they promise to show is what the shipped model sees."""

import io

import numpy as np
from PIL import Image

from convmixer import Classifier
from demo.drawings import draw_examples


def test_the_shipped_model_names_every_picture_also_after_a_jpeg_a_thumbnail_a_shift_or_a_zoom():
    examples, again = draw_examples(), draw_examples()
    assert list(again) == list(examples) and len(examples) == 6
    classifier = Classifier("convmixer_256_8_cifar10", device="cpu")
    for name, image in examples.items():
        assert (image.mode, image.size) == ("RGB", (480, 360)) and np.array_equal(image, again[name]), name
        image.save(jpeg := io.BytesIO(), "JPEG", quality=85)
        variants = [image, Image.open(jpeg), image.resize((96, 72), Image.Resampling.LANCZOS)]
        variants += [image.crop((x, y, x + 457, y + 342)) for x in (0, 22) for y in (0, 17)]
        for best in classifier.classify_many(variants, top_k=1):
            assert best[0].label == name and best[0].score > 0.8, (name, best)
