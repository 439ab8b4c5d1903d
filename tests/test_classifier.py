"""The classifier and its class activation maps."""

import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from convmixer import Classifier, ImageError
from convmixer import classifier as classifier_module
from convmixer.explain import HeatMap

SHIPPED = "convmixer_256_8_cifar10"
# Pictures as people have them, which went wrong once.
CASES = ["dog_DisplayP3.jpg", "dog_ProPhoto.jpg", "IMG_0001.HEIC", "dog_xmp_orientation.jpg", "dog_no_eoi.jpg"]


@pytest.fixture
def classifier(random_checkpoint):
    return Classifier(str(random_checkpoint(size=32)), device="cpu")


def test_scores_are_the_softmax_of_the_networks_logits(classifier, picture):
    with torch.inference_mode():
        logits = classifier.network(torch.from_numpy(classifier.prepare(picture()))[None])
    expected = logits[0].double().softmax(0)
    predictions = classifier.classify(picture(), top_k=100)  # there are 10
    assert [p.index for p in predictions] == expected.argsort(descending=True).tolist()
    assert [p.score for p in predictions] == pytest.approx(expected.sort(descending=True).values.tolist(), abs=1e-6)
    assert all(p.label == f"label {p.index}" and type(p.score) is float for p in predictions)
    assert classifier.classify(picture(), top_k=3) == predictions[:3]  # scores do not depend on how many are asked for
    for top_k, ask in ((0, classifier.classify), (2.0, classifier.classify), (True, classifier.classify_with_heatmaps)):
        with pytest.raises(ValueError, match="top_k is"):
            ask(picture(), top_k)


def test_many_pictures_give_what_each_gives_alone(classifier, picture, monkeypatch):
    sizes, run = [], classifier.engine.run
    monkeypatch.setattr(classifier_module, "SLICE", 3)
    monkeypatch.setattr(classifier.engine, "run", lambda batch: sizes.append(len(batch)) or run(batch))
    pictures = [picture(40 + i, 50 - i, seed=i) for i in range(8)]
    together = classifier.logits(iter(pictures))
    assert sizes == [3, 3, 2] and together.dtype == np.float32
    alone = np.concatenate([classifier.logits([p]) for p in pictures])
    assert np.allclose(together, alone, atol=1e-5) and together.std(axis=0).min() > 1e-3  # the pictures do differ
    assert [p[0].index for p in classifier.classify_many(pictures)] == alone.argmax(1).tolist()
    assert classifier.classify_many([]) == [] and classifier.logits([]).shape == (0, 10)


def test_other_pictures_are_answered_beside_a_broken_one(classifier, picture):
    sources = [picture(seed=1), b"no picture", picture(seed=2)]
    first, broken, last = classifier.classify_many(sources, errors="return")
    assert [first, last] == classifier.classify_many([sources[0], sources[2]]) and isinstance(broken, ImageError)
    with pytest.raises(ImageError, match="cannot be read as a picture"):
        classifier.classify_many(sources)
    with pytest.raises(ValueError, match="errors is 'ignore'"):
        classifier.classify_many(sources, errors="ignore")


@pytest.mark.parametrize("array", [np.zeros((32, 32, 3), np.uint8), torch.zeros(3, 75, 112), np.zeros((3, 32, 32))])
def test_an_array_is_a_prepared_picture(classifier, picture, array):
    prepared = classifier.prepare(picture())
    assert classifier.classify(torch.from_numpy(prepared)) == classifier.classify(picture())
    with pytest.raises(ImageError, match=r"is a prepared picture, float32 \(3, 32, 32\); this one is"):
        classifier.classify(array)


@pytest.mark.parametrize("name", ["dog.jpg", "cat.jpg", *CASES])
def test_what_is_in_the_picture_is_answered(photos, request, name):
    path = request.getfixturevalue("cases") / name if name in CASES else photos / name
    classifier = Classifier(SHIPPED, device="cpu")
    (best,), heatmap = classifier.classify_with_heatmap(path, top_k=1)
    assert best.label == heatmap.label == ("cat" if name == "cat.jpg" else "dog")
    assert best == classifier.classify(path, 1)[0] and best.score > 0.97


def test_the_weights_are_held_once(random_checkpoint):
    """What the kernel laid out anew is let go of; PyTorch takes over what was read."""
    torch_classifier = Classifier(random_checkpoint(), device="cpu", engine="torch")
    tensor = torch_classifier.network.blocks[1][1].weight
    assert tensor.data_ptr() == torch_classifier.weights["blocks.1.1.weight"].ctypes.data
    path = random_checkpoint(dim=64, name="other")
    classifier = Classifier(path, device="cpu", engine="kernel")
    for is_read in (False, True):
        *_, mapping = Path("/proc/self/smaps").read_text().split(f" {path}\n")
        assert (int(re.search(r"\nRss: *([0-9]+) kB", mapping)[1]) > 0) == is_read
        classifier.weights["blocks.1.1.weight"].sum()  # from the file again


def test_the_maps_of_the_best_classes_come_from_one_pass(classifier, picture, monkeypatch):
    wide, passes, run = picture(90, 30), [], classifier.engine.run
    logits, best = classifier.logits([wide])[0], classifier.classify(wide, top_k=4)
    monkeypatch.setattr(classifier.engine, "run", lambda *a, **k: passes.append(1) or run(*a, **k))
    predictions, heatmaps = classifier.classify_with_heatmaps(wide, top_k=4)
    assert passes == [1] and predictions == best
    assert [(h.index, h.label) for h in heatmaps] == [(p.index, p.label) for p in predictions]
    for heatmap in heatmaps:
        assert heatmap.values.mean(dtype=np.float64) == pytest.approx(logits[heatmap.index], abs=1e-5)
        assert np.array_equal(heatmap.values, classifier.heatmap(wide, heatmap.index).values)
        assert heatmap.box == (30, 0, 60, 30) and heatmap.values.shape == (16, 16)
    assert classifier.classify_with_heatmap(wide)[1].index == best[0].index
    with pytest.raises(ValueError, match="index is 10"):
        classifier.heatmap(wide, 10)


def test_the_network_sees_the_same_with_a_heat_map_and_without(classifier, picture):
    """A large JPEG is read at a fraction of its sides for the network, and at more of them to be shown."""
    content = io.BytesIO()
    picture(1600, 1200).save(content, "JPEG")

    class Pipe(io.BytesIO):
        def seek(self, *_):
            raise OSError("a pipe cannot go back")

    predictions, heatmap = classifier.classify_with_heatmap(Pipe(content.getvalue()))
    assert predictions == classifier.classify(content.getvalue()) and heatmap.picture.size == (1600, 1200)


def test_the_heat_map_lies_over_what_the_network_saw(classifier, picture):
    wide = picture(90, 30)
    heatmap = classifier.heatmap(wide)
    assert np.argwhere(~np.isnan(heatmap.at_picture_size()))[[0, -1]].tolist() == [[0, 30], [29, 59]]
    # Transparent at opacity 0, except that what was not seen is darker.
    seen, unseen, bare = (30, 0, 60, 30), (0, 0, 30, 30), heatmap.overlay(0)
    assert bare.crop(seen) == wide.crop(seen) != heatmap.overlay().crop(seen)
    assert np.array_equal(np.asarray(bare.crop(unseen)), np.asarray(wide.crop(unseen)) // 2)
    for size in ((1, 1), (200, 1), (1, 200)):
        assert classifier.heatmap(Image.new("RGB", size, (90, 140, 20))).overlay().size == size


def test_the_overlay_marks_the_strongest_evidence():
    values = np.full((4, 4), -1.0, np.float32)
    values[1, 2] = 5.0
    heatmap = HeatMap("x", 0, values, (0.0, 0.0, 80.0, 80.0), Image.new("RGB", (80, 80), (0, 0, 255)))
    overlay = np.asarray(heatmap.overlay(opacity=1.0)).astype(int)
    assert overlay[30, 50, 0] > 200 > overlay[30, 50, 2]  # the patch in row 1 and column 2 glows
    assert tuple(overlay[70, 10]) == (0, 0, 255)  # negative evidence leaves the picture as it is
    with pytest.raises(ValueError, match=r"opacity is 1\.5"):
        heatmap.overlay(1.5)
