"""CIFAR-10 and CIFAR-100 in their two layouts, and the splits."""

import hashlib
import pickle

import numpy as np
import pytest
from torchvision import datasets as torchvision_datasets

from train.data.cifar import CIFAR10_CLASSES, DataError, LabelledImages, load_cifar, split_cifar

FINE = tuple(f"fine{i}" for i in range(100))


@pytest.fixture
def cifar100_folder(tmp_path):
    """CIFAR-100's binary layout: a coarse and a fine label before each picture, 50 training and 20 test pictures."""
    folder = tmp_path / "cifar100" / "cifar-100-binary"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, n in (("train.bin", 50), ("test.bin", 20)):
        labels = np.stack([rng.integers(0, 20, n), np.arange(n) * 2], 1).astype(np.uint8)
        np.concatenate([labels, rng.integers(0, 256, (n, 3072), dtype=np.uint8)], 1).tofile(folder / name)
    (folder / "fine_label_names.txt").write_text("\n".join(FINE))
    return folder.parent


def test_the_binary_layouts(cifar10_folder, cifar100_folder):
    train = load_cifar(cifar10_folder, train=True)
    assert (train.images.shape, train.images.dtype, train.labels.dtype) == ((200, 32, 32, 3), np.uint8, np.int64)
    record = np.fromfile(cifar10_folder / "cifar-10-batches-bin" / "data_batch_2.bin", np.uint8)[3073 * 5 : 3073 * 6]
    assert train.labels[45] == record[0]
    assert np.array_equal(train.images[45].transpose(2, 0, 1).ravel(), record[1:])  # red, green, blue

    train, test = (load_cifar(cifar100_folder, train=train) for train in (True, False))
    assert train.labels.tolist() == list(range(0, 100, 2))  # the fine ones
    assert (train.name, test.name, len(test)) == ("CIFAR-100 training set", "CIFAR-100 test", 20)
    assert train.classes == FINE
    record = np.fromfile(cifar100_folder / "cifar-100-binary" / "train.bin", np.uint8)[3074:6148]
    assert np.array_equal(train.images[1].transpose(2, 0, 1).ravel(), record[2:])


@pytest.mark.parametrize("classes", [10, 100])
def test_torchvisions_layout(tmp_path, monkeypatch, classes):
    """Files of the form that torchvision downloads, read by torchvision itself, checksums included."""
    official = {10: torchvision_datasets.CIFAR10, 100: torchvision_datasets.CIFAR100}[classes]
    key, names = ("", CIFAR10_CLASSES) if classes == 10 else ("fine_", FINE)
    folder = tmp_path / official.base_folder
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (30, 3072), dtype=np.uint8)
    content = pickle.dumps({"data": pixels, f"{key}labels": [i % classes for i in range(30)]})
    meta = pickle.dumps({f"{key}label_names": list(names)})
    (folder / "data_batch_1").write_bytes(content)
    (folder / official.meta["filename"]).write_bytes(meta)
    monkeypatch.setattr(official, "train_list", [["data_batch_1", hashlib.md5(content).hexdigest()]])
    monkeypatch.setattr(official, "test_list", [])
    monkeypatch.setitem(official.meta, "md5", hashlib.md5(meta).hexdigest())
    read = load_cifar(tmp_path, train=True)
    assert np.array_equal(read.images.transpose(0, 3, 1, 2).reshape(30, -1), pixels)
    assert (read.labels.tolist(), read.classes) == ([i % classes for i in range(30)], names)
    (folder / "data_batch_1").write_bytes(b"tampered")
    with pytest.raises(DataError, match=f"torchvision cannot give CIFAR-{classes}"):
        load_cifar(tmp_path, train=True)


def test_what_is_missing_or_damaged_is_named(tmp_path, cifar10_folder, cifar100_folder):
    path, names = cifar10_folder / "cifar-10-batches-bin/data_batch_3.bin", cifar100_folder / "cifar-100-binary"
    for file, content, said in (
        (path, b"\0" * 3072, "holds 3072 bytes, which is not a whole number"),
        (path, b"\x0b" * 3073, "has the label 11"),
        (path, None, "cannot be read"),
        (names / "fine_label_names.txt", b"one\n", "names 1 classes; CIFAR-100 has 100"),
        (names / "fine_label_names.txt", None, "cannot be read"),
    ):
        file.unlink() if content is None else file.write_bytes(content)
        with pytest.raises(DataError, match=f"{file} {said}"):
            load_cifar(file.parent, train=True)
    with pytest.raises(DataError, match="holds no CIFAR: expected one of cifar-10-batches-bin, cifar-10-batches-py"):
        load_cifar(tmp_path / "nowhere", train=True)


def test_the_splits_of_the_real_sizes():
    indices = np.arange(50_000)
    whole = LabelledImages("CIFAR-10 training set", indices, indices, CIFAR10_CLASSES)
    for split, kind, first, last in (("holdout", "hold-out", 45_000, 50_000), ("tune", "tuning split", 40_000, 45_000)):
        train, held_out = split_cifar(whole, split)
        assert np.array_equal(train.labels, indices[:first]) and np.array_equal(held_out.images, indices[first:last])
        assert held_out.name == f"CIFAR-10 {kind} (training images {first}-{last - 1})"
    assert split_cifar(whole, "full", test_set=held_out) == (whole, held_out)
