"""Folders, tar files, WebDataset shards and Hugging Face data sets: what is read, as timm does, and what is refused."""

import os
import shutil
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from picture_files import encode as encode_as
from picture_files import heic
from picture_sets import CLASSES, encode, pictures, write_folder, write_parquet, write_shards, write_tar
from PIL import Image
from timm.data import create_dataset

from train.data.sources import MapSamples, StreamSamples, open_pair, open_source
from train.errors import DataError

PNG = encode(1, "PNG")


@pytest.fixture(scope="module")
def at(tmp_path_factory) -> Iterator[Path]:
    """Data of every kind, which no test changes; and no network, as HF_HUB_OFFLINE does it."""
    import datasets
    import huggingface_hub

    root = tmp_path_factory.mktemp("data")
    for split, seed in (("train", 0), ("validation", 1000)):
        write_folder(root / "pets" / split, pictures(seed))
        write_tar(root / "tars" / f"{split}.tar", pictures(seed))
    for folder in ("tested/train", "tested/test", "other/train"):
        write_folder(root / folder, pictures())
    write_folder(root / "other/val", {f"{name}/0.png": PNG for name in ("cat", "cow")})
    write_folder(root / "ones", {f"{name}/0.png": PNG for name in CLASSES})
    write_shards(root / "shards")
    write_shards(root / "bare", info=False)
    write_parquet(root / "named", [i % 3 for i in range(9)], datasets.ClassLabel(names=list(CLASSES)))
    write_parquet(root / "numbers", [0, 1, 0])
    write_parquet(root / "floats", [0.5, 1.5])
    write_parquet(root / "words", [CLASSES[i % 3] for i in range(9)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", root / "cache")
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        yield root


def samples(source) -> list:
    if source.streaming:
        return list(StreamSamples(source, np.asarray, 0))
    return [MapSamples(source, np.asarray, 0, False)[0, index] for index in range(len(source))]


def refused(data: object, **options) -> str:
    with pytest.raises(DataError) as caught:
        open_pair(str(data), **options)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    return message


@pytest.mark.parametrize(
    ("data", "split", "name", "theirs"),
    [
        ("{}/pets", "val", "pets/validation", ("", "pets/validation")),
        ("{}/pets/train", "val", "train", ("", "pets/train")),
        ("{}/tars", "training", "tars/train.tar", ("", "tars/train.tar")),
        ("wds/{}/shards", "validation", "shards/validation", ("wds/", "shards")),
        ("hfds/{}/named", "train", "named/train", ("hfds/{}/named", None)),
    ],
)
def test_everything_is_read_as_timm_reads_it(at, capfd, data, split, name, theirs):
    kind, root = theirs
    expected = list(create_dataset(kind.format(at), root and str(at / root), split=split.removesuffix("idation")))
    capfd.readouterr()
    ours = samples(source := open_source(data.format(at), split))
    assert capfd.readouterr() == ("", "")
    assert (source.name, len(source)) == (name, len(expected)) and len(expected) >= 9
    assert source.classes == (("class 0", "class 1", "class 2") if source.streaming else CLASSES)
    for (image, label, broken), (their_image, their_label) in zip(ours, expected, strict=True):
        assert np.array_equal(image, np.asarray(their_image)) and (label, broken) == (their_label, ())
    assert source.streaming or source.labels().tolist() == [label for _, label, _ in ours]


def test_the_classes_of_labels_without_names_and_of_names_without_labels(at):
    assert open_source(f"hfds/{at}/numbers", "train").classes == ("class 0", "class 1")
    words = open_source(f"hfds/{at}/words", "train")
    assert words.classes == tuple(sorted(CLASSES))
    assert [words.classes[label] for _, label, _ in samples(words)] == [CLASSES[i % 3] for i in range(9)]


def laid_out(kind: str, tmp_path: Path, paths: str) -> str:
    """Pictures at these paths (a path that ends in "/" is an empty folder), as a folder or as a tar file."""
    folder = write_folder(
        tmp_path / "set", {p: PNG if p.endswith("png") else b"" for p in paths.split() if p[-1] != "/"}
    )
    for path in paths.split():
        (folder / path if path[-1] == "/" else folder).mkdir(parents=True, exist_ok=True)
    if kind == "folder":
        return str(folder)
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        tar.add(folder, ".")
    return str(tmp_path / "set.tar")


both = pytest.mark.parametrize("kind", ["folder", "tar"])


@both
@pytest.mark.parametrize(
    ("paths", "classes", "said"),
    [
        ("ant/day/1.png ant/night/1.png ant/2.png bee/day/far/1.png", "ant 3, bee 1", ""),
        ("ant/1.png bee/1.png .ipynb_checkpoints/1.png ant/.trash/2.png bee/.2.png", "ant 1, bee 1", ""),
        ("ant/1.png bee/1.png ant/a.txt bee/b.txt README", "ant 1, bee 1", "endings: 2 .txt, 1 without an ending"),
        ("ant/1.png bee/1.png cow/ pig/day/ .git/", "ant 1, bee 1", "no picture: 2 folders (cow, pig)"),
        ("Train/ant/1.png Train/bee/x/1.png Val/ant/3.png TEST/ant/4.png", "ant 1, bee 1", ""),
        ("bee10/1.png bee9/1.png bee9/2.png Bee9/1.png", "Bee9 1, bee9 2, bee10 1", ""),
        ("ant/train/1.png val/1.png", "ant 1, val 1", ""),  # nothing is held out below them
        ("pets/Train/ant/1.png pets/Train/bee/1.png pets/Val/ant/1.png", "", "train/ and val/ in pets/; give {}/pets"),
        ("ant/train/1.png bee/train/1.png ant/val/2.png bee/val/2.png", "", "as in train/ant and val/ant"),
        ("train/ant/1.png train/2.png val/ant/1.png", "", "in no class's folder, such as 2.png"),
        ("train/1.png val/2.png", "", "in no class's folder, such as train/1.png"),
        ("ant/a.txt ant/b.txt bee/c.md", "", "; there are 2 .txt, 1 .md"),
        ("val/ant/1.png val/bee/1.png", "", "no split 'train' with a subfolder a class; it has val"),
    ],
)
def test_the_class_is_the_first_level_and_what_is_left_out_or_was_meant_is_said(kind, tmp_path, paths, classes, said):
    data = laid_out(kind, tmp_path, paths)
    if not classes:
        assert said.format(data) in refused(data)
        return
    source = open_source(data, "train", training=True)
    found = zip(source.classes, source.counts(), strict=True)
    assert ", ".join(f"{name} {count}" for name, count in found) == classes
    assert len(source.notes) == bool(said) and said in "".join(source.notes)
    for index, (_, label, broken) in enumerate(samples(source)):
        assert broken == () and f"/{source.classes[label]}/" in source.filename(index)


@both
def test_the_folder_that_was_packed_and_the_path_that_was_meant(kind, tmp_path):
    data = laid_out(kind, tmp_path / "a", "pets/ant/1.png pets/bee/1.png")
    if kind == "tar":
        assert open_source(data, "train", training=True).classes == ("ant", "bee")
    else:
        assert "one class only, pets; a classifier needs two or more; if ant, bee are" in refused(data)
    data = laid_out(kind, tmp_path / "b", "pets/train/ant/1.png pets/train/bee/1.png pets/val/ant/1.png")
    training, held_out = open_pair(data + "/pets")
    assert training.classes == held_out.classes == ("ant", "bee")
    assert (training.counts(), held_out.counts()) == ([1, 1], [1, 0])  # the validation split lacks a class


def test_every_format_that_is_read_is_found(tmp_path):
    picture = Image.new("RGB", (9, 7), (200, 40, 40))
    endings = {"JPEG": "jfif", "PNG": "PNG", "PPM": "ppm", "TIFF": "tif", "WEBP": "webp", "AVIF": "avif", "BMP": "BMP"}
    files = {f"ant/{i}.{ending}": encode_as(picture, format) for i, (format, ending) in enumerate(endings.items())}
    source = open_source(str(write_folder(tmp_path / "set", files | {"bee/1.HEIC": heic(picture)})), "train")
    assert (len(source), source.notes) == (len(files) + 1, ())
    assert all(image.shape == (7, 9, 3) for image, _, _ in samples(source))


def test_links_pipes_and_tar_files_in_tar_files(tmp_path):
    folder = write_folder(tmp_path / "set", {"ant/1.png": PNG, "bee/1.png": PNG})
    write_folder(tmp_path / "elsewhere", {"1.png": PNG, "2.png": PNG})
    (folder / "cow").symlink_to(tmp_path / "elsewhere")
    (folder / "bee/round").symlink_to(folder)
    (folder / "ant/gone.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(folder / "ant/pipe.png")
    source = open_source(str(folder), "train")
    assert (source.counts(), source.notes) == ([2, 1, 2], ("not read: 1 that are no regular files",))

    inner = write_tar(tmp_path / "ant.tar", {"1.png": PNG, "2.png": encode(2, "PNG")}).read_bytes()
    source = open_source(str(write_tar(tmp_path / "set.tar", {"ant.tar": inner, "bee/1.png": PNG})), "train")
    contents = {source.filename(i).split("set.tar/")[1]: source.reader[i][0].read() for i in range(3)}
    assert contents == {"ant/1.png": PNG, "ant/2.png": encode(2, "PNG"), "bee/1.png": PNG}


def test_the_hold_out_takes_a_share_of_each_class_and_never_overlaps(at, tmp_path):
    files = pictures() | {f"cat/more {i}.png": PNG for i in range(19)}
    files |= {"one/0.png": PNG, "two/0.png": PNG, "two/1.png": PNG}
    data = str(write_folder(tmp_path / "set", files))
    training, held = open_pair(data, hold_out=0.1)
    assert training.classes == held.classes == (*CLASSES, "one", "two")
    assert held.counts() == [3, 1, 1, 0, 1]
    assert sorted([*training.indices, *held.indices]) == list(range(len(files)))
    assert [label for _, label, _ in samples(held)] == held.labels().tolist()
    again, other = (open_pair(data, hold_out=0.1, seed=seed)[1] for seed in (0, 1))
    assert again.indices.tolist() == held.indices.tolist() != other.indices.tolist()
    assert all(open_pair(data, hold_out=0.99)[0].counts())  # every class keeps a picture
    assert open_pair(f"{at}/tested")[1].name == "tested/train, hold-out (10 % of each class, seed 0)"  # and no test set
    assert open_pair(f"{at}/tested", "train", "test")[1].name == "tested/test"


@pytest.mark.parametrize(
    ("data", "options", "said"),
    [
        ("{}/nowhere", {}, "does not exist"),
        (__file__, {}, "neither a folder nor a .tar file"),
        ("{}/tars/train.tar/cow", {}, "holds no folder cow; it has cat, dog 2, dog 10"),
        ("{}/tested", {"val_split": "small"}, "no split 'small'; it has train, test"),
        ("{}/tested", {"val_split": "train"}, "both the training and the validation split"),
        ("{}/tested", {"hold_out": 1.0}, "above 0 and below 1"),
        ("{}/ones", {}, "one picture a class"),
        ("{}/other", {}, "other/val has classes that are none of the 3 to learn: cow; those are cat, dog 2, dog 10"),
        ("wds/{}/nowhere", {}, "there is no folder"),
        ("wds/{}/bare", {}, 'nor an _info.json; give the shards as the split: "part-'),
        ("wds/{}/bare", {"train_split": "part-{0..3}.tar|many"}, "is not how shards are written"),
        ("wds/{}/bare", {"train_split": "part-{0..5}.tar|36"}, "2 of 6 shards are missing"),
        ("wds/{}/bare", {"train_split": "part-{0..3}.tar|24"}, "cannot be held out"),
        ("wds/{}/shards", {"val_split": "part-3.tar"}, "how many pictures"),
        ("hfds/{}/nowhere", {}, "there is no folder"),
        ("hfds/nobody/nothing-such", {}, "cannot be loaded: there is no such folder, and from the Hub"),
        ("hfds/{}/floats", {}, "must be names or numbers"),
        ("hfds/{}/numbers", {"train_split": "val"}, "no split 'val'; it has train"),
        ("hfds/{}/numbers", {"classes": ("cat",)}, "has the label 1, but there are 1 classes"),
    ],
)
def test_what_cannot_be_opened_is_one_line(at, capfd, data, options, said):
    assert said in refused(data.format(at), **options)
    assert capfd.readouterr() == ("", "")


def test_damaged_files_are_one_line(at, tmp_path, monkeypatch):
    whole = (at / "tars/train.tar").read_bytes()
    for content in (whole[: len(whole) // 1024 * 512], b"", b"no tar file" * 100 + bytes(1024)):
        (tmp_path / "cut.tar").write_bytes(content)
        assert "is no tar file, or is" in refused(tmp_path / "cut.tar")
    shards = shutil.copytree(at / "shards", tmp_path / "shards")
    (shards / "part-1.tar").write_bytes((shards / "part-1.tar").read_bytes()[:3000])
    assert "part-1.tar is no tar file, or is cut short" in refused(f"wds/{shards}")
    for content, said in (
        ('{"splits": {"train": {"name": "train"}}}', "not described in full"),
        ("{", "cannot be read"),
    ):
        (shards / "_info.json").write_text(content)
        assert said in refused(f"wds/{shards}")
    assert "without a label" in refused(f"hfds/{write_parquet(tmp_path / 'none', [0, 1, -1])}")
    for name, form in (("datasets", "hfds"), ("webdataset", "wds")):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, name, None)
            assert f"pip install {name}" in refused(f"{form}/{tmp_path}")
    monkeypatch.setattr("os.scandir", lambda path: os.listdir(path / "not a folder"))  # root may read every folder
    assert "cannot be read (No such file" in refused(at / "ones")
