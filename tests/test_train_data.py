"""Every kind of data goes through a whole run of the ImageNet recipe, in small, and comes out as a model that opens."""

import csv
import shutil

import pytest
from conftest import write_cifar10
from picture_sets import CLASSES, pictures, write_folder, write_parquet, write_shards, write_tar

from convmixer import Classifier, load_checkpoint
from train.run import main

SMALL = ["--recipe", "imagenet_1536_20", "--model.dim", "16", "--model.depth", "1", "--model.patch-size", "4"]
SMALL += ["--model.kernel-size", "3", "--preprocessing.size", "24", "--epochs", "1", "--workers", "1"]
SMALL += ["--batch-size", "8", "--micro-batch", "4"]


@pytest.fixture
def run(tmp_path, call_main):
    """A function that trains for an epoch in this process; gives (exit code, standard output, standard error)."""
    return lambda *arguments: call_main(main, *SMALL, "--out", tmp_path / "run", *arguments)


def test_a_folder_with_a_broken_picture(run, tmp_path):
    files = pictures() | {"cow/1.txt": b"text", ".git/x.png": b"", "dog 2/3.png": b"broken"}
    pets = write_folder(tmp_path / "pets" / "train", files).parent
    write_folder(pets / "val", {path: content for path, content in pictures(1000).items() if "cat" not in path})
    code, said, error = run("--data", pets)
    assert code == 0, error
    for line in (
        "training  pets/train: 24 pictures, 8 a class",
        "classes   3: cat (8), dog 2 (8), dog 10 (8)",
        "held out  pets/val: 16 pictures, 8 a class",
        "missing   cat: no picture to measure on",
        "left out  pets/train: not read, by their endings: 1 .txt",
        "left out  pets/train: no classes, as they hold no picture: 1 folder (cow)",
        "start     random weights, seed 42",
        "plan      1 epoch, 24 training pictures, 3 steps an epoch of 8 = 1 process x 2 parts of 4",
    ):
        assert line in said.split("epoch    loss")[0].splitlines()
    assert said.count(str(pets / "train/dog 2/3.png")) == 1
    (row,) = csv.DictReader((tmp_path / "run" / "metrics.csv").read_text().splitlines())
    assert row["skipped"] == "1"
    assert row["train_top1"] == ""  # mixed pictures have no one class
    checkpoint = load_checkpoint(tmp_path / "run" / "model.safetensors")
    assert (checkpoint.labels, checkpoint.name) == (CLASSES, "convmixer_16_1_pets")
    assert "top5" not in checkpoint.accuracy and row["held_out_top5"] == ""  # of three classes it would always be 100
    assert (checkpoint.accuracy["data"], checkpoint.accuracy["images"]) == ("pets/val", 16)
    assert str(tmp_path) not in str(checkpoint.training) + (tmp_path / "run" / "README.md").read_text()
    assert "--data pets" in checkpoint.training["command"]
    assert Classifier(str(tmp_path / "run" / "model.safetensors")).classify(pets / "train/cat/0.JPEG")

    cat = pets / "train/cat"
    for change, said in (
        (
            (cat / "0.JPEG").unlink,
            "7 training pictures are 'cat' and 8 were; give the data that it began with, or --out",
        ),
        (lambda: cat.rename(pets / "train/bat"), "class 0 is 'bat' and was 'cat'"),
        (lambda: write_folder(pets / "train/cow", {"1.png": b"x"}), "it has 4 classes and had 3"),
    ):
        change()
        code, _, error = run("--data", pets, "--resume")
        assert (code, error.count("\n")) == (2, 1) and said in error


def test_a_tar_file_shards_and_a_hugging_face_data_set(run, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    tar = write_tar(tmp_path / "pets.tar", pictures())
    shards = f"wds/{write_shards(tmp_path / 'shards', info=False)}"
    splits = ("--train-split", "part-{0..2}.tar", "--samples", 18, "--val-split", "part-3.tar|6")
    parquet = write_parquet(tmp_path / "rows", [i % 3 for i in range(24)], datasets.ClassLabel(names=list("abc")))
    (tmp_path / "names.txt").write_text("cat\ndog\ncow\nbird\n")
    for data, options, labels, images in (
        (tar, ("--hold-out", 0.25), CLASSES, 6),
        (shards, (*splits, "--class-names", tmp_path / "names.txt"), ("cat", "dog", "cow", "bird"), 6),
        (f"hfds/{parquet}", (), ("a", "b", "c"), 3),
    ):
        code, said, error = run("--data", data, *options)
        assert code == 0, error
        checkpoint = load_checkpoint(tmp_path / "run" / "model.safetensors")
        assert (checkpoint.labels, checkpoint.accuracy["images"]) == (labels, images)
        assert "bird" not in labels or "classes   4: cat (6), dog (6), cow (6), bird (0)" in said.splitlines()
        shutil.rmtree(tmp_path / "run")


def test_what_does_not_fit_the_data_is_one_line(run, tmp_path):
    pets, cifar = write_folder(tmp_path / "pets", pictures()), write_cifar10(tmp_path)
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    shards = f"wds/{write_shards(tmp_path / 'shards')}"
    for arguments, part in (
        (["--data", pets, "--augmentation.ra-n", 2], "--augmentation.aa"),
        (["--data", cifar], "choose a cifar recipe"),
        (["--data", cifar, "--preprocessing.size", 32], "CIFAR takes --augmentation.ra-n 2"),
        (["--data", cifar, "--class-names", tmp_path / "names.txt"], "leave out --class-names"),
        (["--data", shards, "--class-names", tmp_path / "names.txt"], "label 2, but there are names of 2 classes"),
        (["--data", shards, "--class-names", tmp_path / "none.txt"], "none.txt"),
    ):
        code, _, error = run(*arguments)
        assert (code, error.count("\n")) == (2, 1) and part in error
    assert not (tmp_path / "run").exists()
