"""The classifier and its class activation maps."""

import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from convmixer import CheckpointError, Classifier, ImageError, ModelError, torch_engine
from convmixer import classifier as classifier_module
from convmixer.explain import HeatMap
from convmixer.preprocessing import preprocess


@pytest.fixture
def classifier(random_checkpoint):
    return Classifier(str(random_checkpoint(size=32)), device="cpu")


def test_scores_are_the_softmax_of_the_networks_logits(classifier, picture):
    with torch.inference_mode():
        prepared = torch.from_numpy(preprocess(picture(), classifier.preprocessing))
        logits = classifier.network(prepared[None])
    predictions = classifier.classify(picture(), top_k=10)
    expected = torch.tensor([np.exp(v) for v in logits[0].double().tolist()], dtype=torch.float64)
    expected /= expected.sum()
    assert [p.index for p in predictions] == expected.argsort(descending=True).tolist()
    assert [p.score for p in predictions] == pytest.approx(expected.sort(descending=True).values.tolist(), abs=1e-6)
    assert all(p.label == f"label {p.index}" and type(p.score) is float for p in predictions)


def test_top_k_takes_the_best_of_all_classes(classifier, picture):
    everything = classifier.classify(picture(), top_k=100)  # there are 10
    assert len(everything) == 10
    assert sum(p.score for p in everything) == pytest.approx(1, abs=1e-6)
    assert classifier.classify(picture(), top_k=3) == everything[:3]  # scores do not depend on how many are asked for


@pytest.mark.parametrize("top_k", [0, -1, 2.0, "5", True])
def test_an_impossible_top_k_is_named(classifier, picture, top_k):
    with pytest.raises(ValueError, match="top_k is"):
        classifier.classify(picture(), top_k)


def test_many_pictures_give_what_each_gives_alone(classifier, picture, monkeypatch):
    sizes, run = [], classifier.engine.run
    monkeypatch.setattr(classifier_module, "SLICE", 3)
    monkeypatch.setattr(classifier.engine, "run", lambda batch: sizes.append(len(batch)) or run(batch))
    pictures = [picture(40 + i, 50 - i, seed=i) for i in range(8)]
    together = classifier.logits(iter(pictures))
    assert sizes == [3, 3, 2]
    assert together.shape == (8, 10) and together.dtype == np.float32
    alone = np.concatenate([classifier.logits([p]) for p in pictures])
    assert np.allclose(together, alone, atol=1e-5)
    assert together.std(axis=0).min() > 1e-3  # the pictures do differ
    assert [p[0].index for p in classifier.classify_many(pictures)] == alone.argmax(1).tolist()


def test_pytorch_on_a_cpu_runs_as_many_at_once_as_its_cache_holds(random_checkpoint, picture, monkeypatch):
    sizes, classifier = [], Classifier(random_checkpoint(), device="cpu", engine="torch")
    monkeypatch.setattr(torch_engine, "CPU_SLICE_BYTES", 3 * 4 * 16 * 16 * 16)  # three pictures of 16 channels
    classifier.network.stem.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    x = np.stack([classifier.prepare(picture(seed=seed)) for seed in range(8)])
    together, features = classifier.engine.run(x, stages=1)
    assert sizes == [3, 3, 2]
    with torch.inference_mode():
        assert np.allclose(together, classifier.network(torch.from_numpy(x)), atol=1e-5)
        assert np.allclose(features[0], classifier.network.forward_features(torch.from_numpy(x)), atol=1e-5)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((3, 750, 1125), np.float32),
        torch.zeros(3, 750, 1125),
        np.zeros((32, 32, 3), np.uint8),
        np.zeros((3, 32, 32)),
        np.zeros((1, 3, 32, 32), np.float32),
    ],
)
def test_an_array_that_is_no_prepared_picture_is_refused(classifier, array):
    with pytest.raises(ImageError, match=r"is a prepared picture, float32 \(3, 32, 32\); this one is"):
        classifier.classify(array)


def test_the_weights_are_held_once(random_checkpoint):
    """What the kernel laid out anew is let go of; PyTorch takes over what was read."""
    torch_classifier = Classifier(random_checkpoint(), device="cpu", engine="torch")
    tensor = torch_classifier.network.blocks[1][1].weight
    assert tensor.data_ptr() == torch_classifier.weights["blocks.1.1.weight"].ctypes.data
    path = random_checkpoint(dim=64, name="other")
    classifier = Classifier(path, device="cpu", engine="kernel")
    assert kilobytes_of(path) == 0
    classifier.weights["blocks.1.1.weight"].sum()
    assert kilobytes_of(path) > 0  # read from the file again


def kilobytes_of(path) -> int:
    """Of a file, mapped into this process and read."""
    *_, mapping = Path("/proc/self/smaps").read_text().split(f" {path}\n")
    return int(re.search(r"^Rss: *([0-9]+) kB", mapping, re.MULTILINE)[1])


def test_no_pictures_give_no_answers(classifier):
    assert classifier.classify_many([]) == []
    assert classifier.logits([]).shape == (0, 10)


def test_every_kind_of_source_gives_the_same_answer(classifier, picture, tmp_path):
    path = tmp_path / "picture.png"
    picture().save(path)
    expected = classifier.classify(picture())
    prepared = classifier.prepare(path)
    pictures = [path, str(path), path.read_bytes(), path.open("rb"), Image.open(path)]
    for source in (*pictures, prepared, torch.from_numpy(prepared)):
        assert classifier.classify(source) == expected


def test_a_broken_picture_raises_an_image_error(classifier, tmp_path):
    path = tmp_path / "broken.png"
    path.write_bytes(b"no picture")
    with pytest.raises(ImageError, match=r"broken\.png"):
        classifier.classify(path)


def test_a_picture_that_is_cut_short_is_taken_on_request(classifier, random_checkpoint, picture):
    stream = io.BytesIO()
    picture(400, 300).save(stream, "JPEG")
    cut = stream.getvalue()[:-200]
    for method in (classifier.classify, classifier.heatmap):
        with pytest.raises(ImageError, match="cut short"):
            method(cut)
    lenient = Classifier(random_checkpoint(size=32), device="cpu", allow_truncated=True)
    assert len(lenient.classify(cut)) == 5 and lenient.heatmap(cut).picture.size == (400, 300)


def test_the_mean_of_the_activation_map_is_the_logit(classifier, picture):
    logits = classifier.logits([picture()])[0]
    for index in range(10):
        heatmap = classifier.heatmap(picture(), index)
        assert heatmap.values.shape == (16, 16)
        assert heatmap.values.mean(dtype=np.float64) == pytest.approx(logits[index], abs=1e-5)
        assert (heatmap.index, heatmap.label) == (index, f"label {index}")


def test_the_activation_map_is_of_the_best_class_by_default(classifier, picture):
    predictions, heatmap = classifier.classify_with_heatmap(picture(), top_k=2)
    assert predictions == classifier.classify(picture(), top_k=2)
    assert heatmap.index == predictions[0].index
    with pytest.raises(ValueError, match="index is 10"):
        classifier.heatmap(picture(), 10)


def test_the_heat_map_lies_over_what_the_network_saw(classifier, picture):
    wide = picture(90, 30)
    heatmap = classifier.heatmap(wide)
    values = heatmap.at_picture_size()
    assert values.shape == (30, 90)
    assert np.isnan(values[:, :30]).all()
    assert np.isnan(values[:, 60:]).all()
    assert np.isfinite(values[:, 30:60]).all()
    overlay = heatmap.overlay()
    assert (overlay.size, overlay.mode) == ((90, 30), "RGB")
    # Transparent at opacity 0, except that what was not seen is darker.
    seen, unseen = (30, 0, 60, 30), (0, 0, 30, 30)
    bare = heatmap.overlay(0)
    assert bare.crop(seen) == wide.crop(seen)
    assert np.array_equal(np.asarray(bare.crop(unseen)), np.asarray(wide.crop(unseen)) // 2)
    assert overlay.crop(seen) != wide.crop(seen)


def test_the_overlay_marks_the_strongest_evidence():
    values = np.full((4, 4), -1.0, np.float32)
    values[1, 2] = 5.0
    heatmap = HeatMap("x", 0, values, (0.0, 0.0, 80.0, 80.0), Image.new("RGB", (80, 80), (0, 0, 255)))
    overlay = np.asarray(heatmap.overlay(opacity=1.0)).astype(int)
    assert overlay[30, 50, 0] > 200  # the patch in row 1 and column 2 glows
    assert overlay[30, 50, 2] < 200
    assert tuple(overlay[70, 10]) == (0, 0, 255)  # negative evidence leaves the picture as it is
    negative = HeatMap("x", 0, values * 0 - 1, heatmap.box, heatmap.picture)
    assert negative.overlay() == heatmap.picture
    with pytest.raises(ValueError, match=r"opacity is 1\.5"):
        heatmap.overlay(1.5)


def test_the_heat_map_of_a_thin_picture(classifier):
    for size in ((1, 1), (200, 1), (1, 200)):
        heatmap = classifier.heatmap(Image.new("RGB", size, (90, 140, 20)))
        assert heatmap.overlay().size == size
        assert np.isfinite(heatmap.at_picture_size()).any()


def test_a_model_or_device_that_is_not_there_is_named(tmp_path, random_checkpoint):
    with pytest.raises(ModelError, match="convmixer_768_32"):
        Classifier("convmixer_768_33")
    with pytest.raises(CheckpointError, match=r"missing\.safetensors"):
        Classifier(str(tmp_path / "missing.safetensors"))
    with pytest.raises(ValueError, match="device 'tpux' cannot be used"):
        Classifier(str(random_checkpoint()), device="tpux")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_cuda_gives_the_cpus_answer(random_checkpoint, picture):
    path = str(random_checkpoint())
    cpu, cuda = Classifier(path, device="cpu"), Classifier(path)
    assert cuda.device.type == "cuda"
    assert torch.allclose(cpu.logits([picture()]), cuda.logits([picture()]), atol=1e-3)
