"""CIFAR-10's two layouts, its splits, and the augmented batches."""

import hashlib
import io
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets as torchvision_datasets
from torchvision import transforms

from convmixer.preprocessing import CIFAR10
from train import data
from train.data import (
    AugmentedImages,
    DataError,
    LabelledImages,
    load_cifar10,
    split_cifar10,
    training_batches,
)
from train.recipes import RECIPES, Augmentation, Recipe


def images_of(n: int, seed: int = 0) -> LabelledImages:
    rng = np.random.default_rng(seed)
    return LabelledImages("made", rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8), rng.integers(0, 10, n))


def test_the_binary_layout(cifar10_folder):
    train = load_cifar10(cifar10_folder, train=True)
    assert (train.images.shape, train.images.dtype, train.labels.dtype) == ((200, 32, 32, 3), np.uint8, np.int64)
    record = np.fromfile(cifar10_folder / "cifar-10-batches-bin" / "data_batch_2.bin", np.uint8)[3073 * 5 : 3073 * 6]
    assert train.labels[45] == record[0]
    assert np.array_equal(train.images[45][:, :, 0].ravel(), record[1:1025])  # red
    assert np.array_equal(train.images[45][:, :, 2].ravel(), record[2049:])  # blue
    inside = load_cifar10(cifar10_folder / "cifar-10-batches-bin", train=True)
    assert np.array_equal(inside.images, train.images)
    assert len(load_cifar10(cifar10_folder, train=False)) == 20


def test_torchvisions_layout(cifar10_folder, tmp_path, monkeypatch):
    """Files of the form that torchvision downloads, read by torchvision itself, checksums included."""
    expected = load_cifar10(cifar10_folder, train=True)
    folder = tmp_path / "python" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    sums = []
    for i in range(5):
        part = slice(40 * i, 40 * i + 40)
        pixels = expected.images[part].transpose(0, 3, 1, 2).reshape(40, -1)
        content = pickle.dumps({"data": pixels, "labels": expected.labels[part].tolist()})
        (folder / f"data_batch_{i + 1}").write_bytes(content)
        sums.append([f"data_batch_{i + 1}", hashlib.md5(content).hexdigest()])
    meta = pickle.dumps({"label_names": list(data.CIFAR10_CLASSES)})
    (folder / "batches.meta").write_bytes(meta)
    official = torchvision_datasets.CIFAR10
    monkeypatch.setattr(official, "train_list", sums)
    monkeypatch.setattr(official, "test_list", [])
    monkeypatch.setitem(official.meta, "md5", hashlib.md5(meta).hexdigest())
    read = load_cifar10(tmp_path / "python", train=True)
    assert np.array_equal(read.images, expected.images)
    assert np.array_equal(read.labels, expected.labels)
    (folder / "data_batch_3").write_bytes(b"tampered")
    with pytest.raises(DataError, match="torchvision cannot give CIFAR-10"):
        load_cifar10(tmp_path / "python", train=True)


def test_a_folder_without_cifar10_is_named(tmp_path):
    with pytest.raises(DataError, match=r"holds no CIFAR-10: expected a folder cifar-10-batches-bin"):
        load_cifar10(tmp_path, train=True)


def test_a_damaged_binary_file_is_named(cifar10_folder):
    path = cifar10_folder / "cifar-10-batches-bin" / "data_batch_3.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(DataError, match=r"data_batch_3\.bin holds .* not a whole number"):
        load_cifar10(cifar10_folder, train=True)
    path.write_bytes(b"\x0b" + whole[1:])
    with pytest.raises(DataError, match="has the label 11"):
        load_cifar10(cifar10_folder, train=True)
    path.unlink()
    with pytest.raises(DataError, match=r"data_batch_3\.bin cannot be read"):
        load_cifar10(cifar10_folder, train=True)


def test_the_splits_of_the_real_sizes():
    indices = np.arange(50_000)
    whole = LabelledImages("CIFAR-10 training set", indices, indices)
    train, held_out = split_cifar10(whole, "holdout")
    assert (train.labels[0], train.labels[-1], len(train)) == (0, 44_999, 45_000)
    assert (held_out.labels[0], held_out.labels[-1], len(held_out)) == (45_000, 49_999, 5_000)
    assert held_out.name == "CIFAR-10 hold-out (training images 45000-49999)"
    train, tuning = split_cifar10(whole, "tune")
    assert (train.labels[-1], tuning.labels[0], tuning.labels[-1]) == (39_999, 40_000, 44_999)
    train, report = split_cifar10(whole, "full", test_set=held_out)
    assert (len(train), report) == (50_000, held_out)


def test_pictures_decoded_from_jpeg_are_told_apart(picture):
    colourful = np.stack([np.asarray(picture(32, 32, seed=i), np.float64) for i in range(16)])
    grey = colourful.mean(-1, keepdims=True)  # photographs have little colour, and JPEG keeps only a quarter of it
    noise = np.random.default_rng(0).normal(0, 4, grey.shape)
    noisy = (grey + 0.3 * (colourful - grey) + noise).clip(0, 255).astype(np.uint8)

    def through_jpeg(image):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=75)
        return np.asarray(Image.open(buffer))

    assert not data.looks_recompressed(noisy)
    assert data.looks_recompressed(np.stack([through_jpeg(image) for image in noisy]))


def test_the_published_augmentation_in_the_authors_order():
    recipe = RECIPES["cifar10"]
    steps = data.picture_augmentation(recipe.augmentation, 32).transforms
    assert [type(step).__name__ for step in steps] == ["RandomResizedCrop", "RandomHorizontalFlip", "RandAugment"]
    crop, flip, randaugment = steps
    assert (crop.size, crop.scale, crop.ratio, flip.p) == ((32, 32), (1.0, 1.0), (1.0, 1.0), 0.5)
    assert (randaugment.num_ops, randaugment.magnitude, recipe.augmentation.reprob) == (2, 12, 0)
    jittered = data.picture_augmentation(Augmentation(jitter=0.2, ra_n=0), 32).transforms
    assert [type(step).__name__ for step in jittered][2:] == ["ColorJitter"]


def test_a_sample_depends_on_seed_epoch_and_index_alone():
    made = images_of(4)
    samples = AugmentedImages(made, Augmentation(reprob=0.5), seed=3)
    first = samples[2, 1]
    torch.rand(7)  # whatever else draws random numbers
    again = AugmentedImages(made, Augmentation(reprob=0.5), seed=3)[2, 1]
    assert np.array_equal(first[0], again[0])
    assert first[1:] == again[1:]
    others = [samples[epoch, 1][0] for epoch in range(3, 12)]
    assert sum(np.array_equal(first[0], other) for other in others) < 3


def epoch_batches(workers: int, epoch: int, recipe: Recipe) -> list:
    loader, sampler = training_batches(images_of(50), recipe, workers)
    sampler.epoch = epoch
    return list(loader)


def test_batches_do_not_depend_on_the_number_of_workers():
    recipe = Recipe("x", RECIPES["cifar10"].model, epochs=1, batch_size=16)
    here, there = epoch_batches(0, 1, recipe), epoch_batches(2, 1, recipe)
    assert [len(labels) for _, labels, _ in here] == [16, 16, 16, 2]  # the last partial batch is kept
    for a, b in zip(here, there, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    labels = torch.cat([labels for _, labels, _ in here])
    assert sorted(labels.tolist()) == sorted(images_of(50).labels.tolist())
    other = torch.cat([labels for _, labels, _ in epoch_batches(0, 2, recipe)])
    assert not torch.equal(labels, other)


def test_normalise_equals_torchvisions():
    made = images_of(5)
    expected = transforms.Compose([transforms.ToTensor(), transforms.Normalize(CIFAR10.mean, CIFAR10.std)])
    uint8 = torch.from_numpy(made.images).permute(0, 3, 1, 2)
    normalised = data.normalise(uint8, CIFAR10)
    assert torch.equal(normalised, torch.stack([expected(Image.fromarray(image)) for image in made.images]))
    assert normalised.is_contiguous(memory_format=torch.channels_last)


def test_erasing():
    images = torch.ones(3, 3, 8, 8)
    erased = data.erase(images, torch.tensor([[0, 0, 0, 0], [1, 2, 3, 4], [0, 0, 8, 8]]))
    assert torch.equal(erased[0], images[0])
    assert erased[1].sum() == 3 * (64 - 12)
    assert (erased[1, :, 1:4, 2:6] == 0).all()
    assert erased[2].sum() == 0
    torch.manual_seed(0)
    boxes = [data.erasing_box(Augmentation(reprob=0.3), 32) for _ in range(400)]
    hit = [box for box in boxes if box[2]]
    assert 80 < len(hit) < 160
    assert all(top + height <= 32 and left + width <= 32 for top, left, height, width in hit)
    assert data.erasing_box(Augmentation(reprob=0.0), 32) == (0, 0, 0, 0)
