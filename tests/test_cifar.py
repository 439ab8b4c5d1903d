"""CIFAR-10 and CIFAR-100 in their two layouts, and the splits."""

import hashlib
import io
import pickle

import numpy as np
import pytest
from PIL import Image
from torchvision import datasets as torchvision_datasets

from train.data import cifar
from train.data.cifar import DataError, LabelledImages, load_cifar, split_cifar


def test_the_binary_layout(cifar10_folder):
    train = load_cifar(cifar10_folder, train=True)
    assert (train.images.shape, train.images.dtype, train.labels.dtype) == ((200, 32, 32, 3), np.uint8, np.int64)
    record = np.fromfile(cifar10_folder / "cifar-10-batches-bin" / "data_batch_2.bin", np.uint8)[3073 * 5 : 3073 * 6]
    assert train.labels[45] == record[0]
    assert np.array_equal(train.images[45][:, :, 0].ravel(), record[1:1025])  # red
    assert np.array_equal(train.images[45][:, :, 2].ravel(), record[2049:])  # blue
    inside = load_cifar(cifar10_folder / "cifar-10-batches-bin", train=True)
    assert np.array_equal(inside.images, train.images)
    assert len(load_cifar(cifar10_folder, train=False)) == 20


def test_torchvisions_layout(cifar10_folder, tmp_path, monkeypatch):
    """Files of the form that torchvision downloads, read by torchvision itself, checksums included."""
    expected = load_cifar(cifar10_folder, train=True)
    folder = tmp_path / "python" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    sums = []
    for i in range(5):
        part = slice(40 * i, 40 * i + 40)
        pixels = expected.images[part].transpose(0, 3, 1, 2).reshape(40, -1)
        content = pickle.dumps({"data": pixels, "labels": expected.labels[part].tolist()})
        (folder / f"data_batch_{i + 1}").write_bytes(content)
        sums.append([f"data_batch_{i + 1}", hashlib.md5(content).hexdigest()])
    meta = pickle.dumps({"label_names": list(cifar.CIFAR10_CLASSES)})
    (folder / "batches.meta").write_bytes(meta)
    official = torchvision_datasets.CIFAR10
    monkeypatch.setattr(official, "train_list", sums)
    monkeypatch.setattr(official, "test_list", [])
    monkeypatch.setitem(official.meta, "md5", hashlib.md5(meta).hexdigest())
    read = load_cifar(tmp_path / "python", train=True)
    assert np.array_equal(read.images, expected.images)
    assert np.array_equal(read.labels, expected.labels)
    (folder / "data_batch_3").write_bytes(b"tampered")
    with pytest.raises(DataError, match="torchvision cannot give CIFAR-10"):
        load_cifar(tmp_path / "python", train=True)


@pytest.fixture
def cifar100_folder(tmp_path):
    """CIFAR-100's binary layout: a coarse and a fine label before each picture, 50 training and 20 test pictures."""
    folder = tmp_path / "cifar100" / "cifar-100-binary"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, n in (("train.bin", 50), ("test.bin", 20)):
        labels = np.stack([rng.integers(0, 20, n), np.arange(n) * 2], 1).astype(np.uint8)
        np.concatenate([labels, rng.integers(0, 256, (n, 3072), dtype=np.uint8)], 1).tofile(folder / name)
    (folder / "fine_label_names.txt").write_text("".join(f"fine{i}\n" for i in range(100)))
    return folder.parent


def test_cifar100s_binary_layout(cifar100_folder):
    train, test = (load_cifar(cifar100_folder, train=train) for train in (True, False))
    assert train.labels.tolist() == list(range(0, 100, 2))  # the fine ones
    assert (train.name, test.name, len(test)) == ("CIFAR-100 training set", "CIFAR-100 test", 20)
    assert (len(train.classes), train.classes[7]) == (100, "fine7")
    record = np.fromfile(cifar100_folder / "cifar-100-binary" / "train.bin", np.uint8)[3074:6148]
    assert np.array_equal(train.images[1][:, :, 1].ravel(), record[2 + 1024 : 2 + 2048])  # green
    assert split_cifar(train, "holdout")[1].name == "CIFAR-100 hold-out (training images 45-49)"
    (cifar100_folder / "cifar-100-binary" / "fine_label_names.txt").write_text("one\n")
    with pytest.raises(DataError, match="names 1 classes; CIFAR-100 has 100"):
        load_cifar(cifar100_folder, train=True)


def test_torchvisions_layout_of_cifar100(tmp_path, monkeypatch):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    rng = np.random.default_rng(0)
    content = pickle.dumps({"data": rng.integers(0, 256, (30, 3072), dtype=np.uint8), "fine_labels": list(range(30))})
    meta = pickle.dumps({"fine_label_names": [f"fine{i}" for i in range(100)]})
    (folder / "train").write_bytes(content)
    (folder / "meta").write_bytes(meta)
    official = torchvision_datasets.CIFAR100
    monkeypatch.setattr(official, "train_list", [["train", hashlib.md5(content).hexdigest()]])
    monkeypatch.setattr(official, "test_list", [])
    monkeypatch.setitem(official.meta, "md5", hashlib.md5(meta).hexdigest())
    read = load_cifar(tmp_path, train=True)
    assert read.images.shape == (30, 32, 32, 3)
    assert read.labels.tolist() == list(range(30))
    assert read.classes[99] == "fine99"


def test_a_folder_without_cifar_is_named(tmp_path):
    with pytest.raises(DataError, match="holds no CIFAR: expected one of cifar-10-batches-bin, cifar-10-batches-py"):
        load_cifar(tmp_path, train=True)


def test_a_damaged_binary_file_is_named(cifar10_folder):
    path = cifar10_folder / "cifar-10-batches-bin" / "data_batch_3.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(DataError, match=r"data_batch_3\.bin holds .* not a whole number"):
        load_cifar(cifar10_folder, train=True)
    path.write_bytes(b"\x0b" + whole[1:])
    with pytest.raises(DataError, match="has the label 11"):
        load_cifar(cifar10_folder, train=True)
    path.unlink()
    with pytest.raises(DataError, match=r"data_batch_3\.bin cannot be read"):
        load_cifar(cifar10_folder, train=True)


def test_the_splits_of_the_real_sizes():
    indices = np.arange(50_000)
    whole = LabelledImages("CIFAR-10 training set", indices, indices, cifar.CIFAR10_CLASSES)
    train, held_out = split_cifar(whole, "holdout")
    assert (train.labels[0], train.labels[-1], len(train)) == (0, 44_999, 45_000)
    assert (held_out.labels[0], held_out.labels[-1], len(held_out)) == (45_000, 49_999, 5_000)
    assert held_out.name == "CIFAR-10 hold-out (training images 45000-49999)"
    train, tuning = split_cifar(whole, "tune")
    assert (train.labels[-1], tuning.labels[0], tuning.labels[-1]) == (39_999, 40_000, 44_999)
    train, report = split_cifar(whole, "full", test_set=held_out)
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

    assert not cifar.looks_recompressed(noisy)
    assert cifar.looks_recompressed(np.stack([through_jpeg(image) for image in noisy]))
