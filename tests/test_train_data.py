"""Every kind of data goes through a whole run of the ImageNet recipe, in small, and comes out as a model that opens."""

import csv
import shutil
import sys
from collections.abc import Callable

import pytest
import torch
from conftest import write_cifar10
from picture_sets import CLASSES, pictures, write_folder, write_parquet, write_shards, write_tar

from convmixer import Classifier, load_checkpoint
from convmixer.config import ConvMixerConfig
from convmixer.preprocessing import Preprocessing
from train import run as train_run
from train.data.batches import StreamBatches
from train.data.sources import open_source
from train.distributed import World
from train.errors import TrainingError
from train.recipe import Augmentation, Recipe

SMALL = ["--recipe", "imagenet_1536_20", "--model.dim", "16", "--model.depth", "1", "--model.patch-size", "4"]
SMALL += ["--model.kernel-size", "3", "--preprocessing.size", "24", "--epochs", "1", "--workers", "1"]
SMALL += ["--batch-size", "8", "--micro-batch", "4"]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """A function that trains for an epoch in this process; gives (exit code, what it said, row of the CSV)."""

    def call(*arguments: object):
        out = tmp_path / "run"
        monkeypatch.setattr(sys, "argv", ["run.py", *SMALL, "--out", str(out), *map(str, arguments)])
        code = train_run.main()
        rows = list(csv.DictReader((out / "metrics.csv").read_text().splitlines())) if code == 0 else [None]
        return code, capsys.readouterr(), rows[-1]

    return call


def test_a_folder_with_a_broken_picture(run, tmp_path):
    folder = write_folder(tmp_path / "pets" / "train", pictures())
    write_folder(tmp_path / "pets" / "val", pictures(first_seed=1000))
    broken = folder / CLASSES[1] / "3.png"
    broken.write_bytes(b"broken")
    code, said, row = run("--data", tmp_path / "pets")
    assert code == 0
    assert said.out.count(str(broken)) == 1
    assert row["skipped"] == "1"
    assert row["train_top1"] == ""  # mixed pictures have no one class
    checkpoint = load_checkpoint(tmp_path / "run" / "model.safetensors")
    assert checkpoint.labels == tuple(CLASSES)
    assert "top5" not in checkpoint.accuracy and row["held_out_top5"] == ""  # of three classes it would always be 100
    assert str(tmp_path) not in str(checkpoint.training) + (tmp_path / "run" / "README.md").read_text()
    assert "--data pets" in checkpoint.training["command"]
    assert checkpoint.name == "convmixer_16_1_pets"
    assert (checkpoint.accuracy["data"], checkpoint.accuracy["images"]) == ("pets/val", 24)
    assert Classifier(str(tmp_path / "run" / "model.safetensors")).classify(folder / CLASSES[0] / "0.JPEG")


def test_what_was_understood_is_said_before_the_first_epoch_and_other_data_is_refused(run, tmp_path):
    pets = write_folder(tmp_path / "pets" / "train", pictures() | {"cow/1.txt": b"text", ".git/x.png": b""}).parent
    write_folder(pets / "val", {path: content for path, content in pictures(1000).items() if "cat" not in path})
    code, said, _ = run("--data", pets)
    assert code == 0, said
    understood = said.out.split("epoch    loss")[0].splitlines()
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
        assert line in understood

    def resumed(change: Callable, undo: Callable) -> str:
        change()
        code, said, _ = run("--data", pets, "--resume")
        undo()
        assert (code, said.err.count("\n")) == (2, 1)
        return said.err

    cat, dog, picture = pets / "train/cat", pets / "train/dogs", pets / "train/cat/0.JPEG"
    assert "class 0 is 'bat' and was 'cat'" in resumed(
        lambda: cat.rename(cat.with_name("bat")), lambda: cat.with_name("bat").rename(cat)
    )
    assert "it has 4 classes and had 3" in resumed(
        lambda: write_folder(dog, {"1.png": b"x"}), lambda: shutil.rmtree(dog)
    )
    content = picture.read_bytes()
    assert "7 training pictures are 'cat' and 8 were; give the data that it began with, or --out" in resumed(
        picture.unlink, lambda: picture.write_bytes(content)
    )
    assert run("--data", pets, "--resume")[0] == 0


def test_a_tar_file_without_a_validation_split(run, tmp_path):
    code, _, row = run("--data", write_tar(tmp_path / "pets.tar", pictures()), "--hold-out", 0.25)
    assert (code, row["skipped"]) == (0, "0")
    accuracy = load_checkpoint(tmp_path / "run" / "model.safetensors").accuracy
    assert (accuracy["images"], accuracy["data"]) == (6, "pets.tar, hold-out (25 % of each class, seed 42)")


def test_webdataset_shards(run, tmp_path):
    write_shards(tmp_path / "shards")
    (tmp_path / "shards" / "_info.json").unlink()
    code, said, _ = run(
        *("--data", f"wds/{tmp_path / 'shards'}", "--train-split", "part-{0..2}.tar", "--samples", 18),
        *("--val-split", "part-3.tar|6"),
    )
    assert code == 0, said
    checkpoint = load_checkpoint(tmp_path / "run" / "model.safetensors")
    assert checkpoint.labels == ("class 0", "class 1", "class 2")
    assert checkpoint.accuracy["images"] == 6


def test_the_class_names_of_shards_come_from_a_file(run, tmp_path):
    data, names = f"wds/{write_shards(tmp_path / 'shards')}", tmp_path / "names.txt"
    names.write_text("cat\ndog\n")
    code, said, _ = run("--data", data, "--class-names", names)
    assert (code, said.err.count("\n")) == (2, 1) and "the label 2, but there are names of 2 classes" in said.err
    names.write_text("cat\ndog\ncow\nbird\n")
    code, said, _ = run("--data", data, "--class-names", names)
    assert code == 0, said
    assert "classes   4: cat (8), dog (8), cow (8), bird (0)" in said.out.splitlines()
    assert load_checkpoint(tmp_path / "run" / "model.safetensors").labels == ("cat", "dog", "cow", "bird")
    assert run("--data", data, "--class-names", tmp_path / "none.txt")[1].err.count("\n") == 1


def test_a_hugging_face_data_set(run, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = write_parquet(tmp_path / "pets", [i % 3 for i in range(24)], datasets.ClassLabel(names=list("abc")))
    code, said, _ = run("--data", f"hfds/{folder}")
    assert code == 0, said
    assert load_checkpoint(tmp_path / "run" / "model.safetensors").labels == ("a", "b", "c")


def test_what_does_not_fit_the_data_is_one_line(run, tmp_path):
    write_folder(tmp_path / "pets", pictures())
    for arguments, part in (
        (["--data", tmp_path / "pets", "--augmentation.ra-n", 2], "--augmentation.aa"),
        (["--data", write_cifar10(tmp_path)], "choose a cifar recipe"),
    ):
        code, said, _ = run(*arguments)
        assert (code, said.err.count("\n")) == (2, 1)
        assert part in said.err
    assert not (tmp_path / "run").exists()


STREAMED = Recipe(
    "streamed",
    ConvMixerConfig(16, 1, 3, 4, 3),
    Preprocessing(24),
    epochs=1,
    batch_size=8,
    micro_batch=4,
    augmentation=Augmentation(scale=0.5, aa="rand-m9-mstd0.5-inc1"),
)


def stream(folder, rank: int = 0, size: int = 1, epoch: int = 3, first_step: int = 0, workers: int = 2) -> list:
    source = open_source(f"wds/{folder}", "train", training=True)
    loader = StreamBatches(source, STREAMED, World(torch.device("cpu"), rank, size), workers)
    return list(loader.parts(epoch, first_step))


def test_a_stream_that_is_taken_up_in_the_middle_goes_on_the_same(tmp_path):
    folder = write_shards(tmp_path / "shards")
    whole, rest = stream(folder), stream(folder, first_step=2)
    assert [len(part.labels) for part in whole] == [4] * 6
    assert len(rest) == 2
    for a, b in zip(whole[4:], rest, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)
    assert not torch.equal(whole[0].images, stream(folder, epoch=4)[0].images)


def test_a_stream_is_shared_by_shards(tmp_path):
    folder = write_shards(tmp_path / "shards")
    shares = [stream(folder, rank, 2, workers=1) for rank in (0, 1)]
    assert [[len(part.labels) for part in mine] for mine in shares] == [[4] * 3] * 2
    with pytest.raises(TrainingError, match="parts of one size: 8 pictures do not divide"):
        stream(folder, 0, 3)
