"""Folders and tar files as people lay them out: what is a class, what is a split, and what is left out by name."""

import io
import os
import tarfile
from collections import Counter

import numpy as np
import pytest
from picture_files import encode as encode_as
from picture_files import heic
from picture_sets import encode, write_folder, write_tar
from PIL import Image

from train.data.sources import MapSamples, open_pair, open_source
from train.errors import DataError

PNG = encode(1, "PNG")


def laid_out(kind: str, tmp_path, paths: str) -> str:
    """Pictures at these paths (a path that ends in "/" is an empty folder), as a folder or as a tar file."""
    files = {path: PNG if path.endswith(("png", "jpg")) else b"text" for path in paths.split() if path[-1] != "/"}
    folder = write_folder(tmp_path / "set", files)
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
    ("paths", "classes", "notes"),
    [
        ("ant/day/1.png ant/night/1.png ant/2.png bee/day/far/1.png", {"ant": 3, "bee": 1}, []),
        (
            "ant/1.png bee/1.png .ipynb_checkpoints/1.png ant/.ipynb_checkpoints/2.png bee/.2.png",
            {"ant": 1, "bee": 1},
            [],
        ),
        ("ant/1.png bee/1.png cow/ pig/day/ .git/", {"ant": 1, "bee": 1}, ["no picture: 2 folders (cow, pig)"]),
        ("ant/1.png bee/1.png fly/a.txt", {"ant": 1, "bee": 1}, ["endings: 1 .txt", "1 folder (fly)"]),
        ("ant/1.png bee/1.png ant/a.txt README bee/b.txt", {"ant": 1, "bee": 1}, ["2 .txt, 1 without an ending"]),
        ("train/ant/1.png train/bee/x/1.png val/ant/3.png test/ant/4.png", {"ant": 1, "bee": 1}, []),
        ("training/ant/1.png training/bee/x/1.png .val/ant/3.png", {"ant": 1, "bee": 1}, []),
        ("Train/ant/1.png Train/bee/x/1.png Val/ant/3.png TEST/ant/4.png", {"ant": 1, "bee": 1}, []),
        ("bee/1.png bee/2.png Bee/1.png ant²1/1.png", {"ant²1": 1, "Bee": 1, "bee": 2}, []),
        ("ant/train/1.png bee/1.png", {"ant": 1, "bee": 1}, []),  # nothing is held out below it
    ],
)
def test_the_class_is_the_first_level_and_what_is_left_out_is_named(kind, tmp_path, paths, classes, notes):
    source = open_source(laid_out(kind, tmp_path, paths), "train", training=True)
    assert list(zip(source.classes, source.counts(), strict=True)) == list(classes.items())
    assert len(source.notes) == len({note.split(":")[0] for note in source.notes}) <= len(notes)
    assert all(any(note in said for said in source.notes) for note in notes)
    for index, label in enumerate(source.labels()):
        image, read, broken = MapSamples(source, np.asarray, 0, False)[0, index]
        assert image.shape and (read, broken) == (label, ())
        assert f"/{source.classes[label]}/" in source.filename(index)


@both
@pytest.mark.parametrize(
    ("paths", "said"),
    [
        (
            "pets/train/ant/1.png pets/train/bee/1.png pets/val/ant/1.png",
            "train/ and val/ in pets/; give {}/pets",
        ),
        ("pets/Train/ant/1.png pets/Train/bee/1.png pets/Val/ant/1.png", "train/ and val/ in pets/; give {}/pets"),
        ("x/pets/train/ant/1.png x/pets/test/ant/1.png", "pets/; give {}/x/pets"),
        ("ant/train/1.png bee/train/1.png ant/val/2.png bee/val/2.png", "as in train/ant and val/ant"),
        (
            "pets/ant/1.png pets/bee/1.png",
            "one class only, pets; a classifier needs two or more; if ant, bee are",
        ),
        ("train/ant/1.png train/2.png val/ant/1.png", "in no class's folder, such as 2.png"),
        ("train/1.png val/2.png", "in no class's folder, such as train/1.png"),
        ("ant/a.txt ant/b.txt bee/c.md", "there are 2 .txt, 1 .md"),
        ("val/ant/1.png val/bee/1.png", "no split 'train' with a subfolder a class; it has val"),
    ],
)
def test_another_layout_is_refused_with_what_was_meant(kind, tmp_path, paths, said):
    data = laid_out(kind, tmp_path, paths)
    if kind == "tar" and said.startswith("one class"):
        assert open_source(data, "train", training=True).classes == ("ant", "bee")  # the folder that was packed
        return
    with pytest.raises(DataError) as caught:
        open_pair(data)
    assert said.format(data) in str(caught.value) and "\n" not in str(caught.value)


@both
def test_the_path_that_was_meant_can_be_given(kind, tmp_path):
    paths = "pets/train/ant/1.png pets/train/bee/1.png pets/train/cow/1.png pets/val/ant/1.png pets/val/cow/1.png"
    training, held_out = open_pair(laid_out(kind, tmp_path, paths) + "/pets")
    assert training.classes == held_out.classes == ("ant", "bee", "cow")
    assert (training.counts(), held_out.counts()) == ([1, 1, 1], [1, 0, 1])  # the validation split lacks a class
    assert training.name.endswith("pets/train") and held_out.name.endswith("pets/val")
    if kind == "tar":
        with pytest.raises(DataError, match="holds no folder pest; it has pets"):
            open_source(str(tmp_path / "set.tar/pest"), "train")


def test_every_format_that_is_read_is_found(tmp_path):
    picture = Image.new("RGB", (9, 7), (200, 40, 40))
    endings = {"JPEG": "jfif", "PNG": "PNG", "PPM": "ppm", "TIFF": "tif", "WEBP": "webp", "AVIF": "avif"}
    files = {f"ant/{i}.{ending}": encode_as(picture, format) for i, (format, ending) in enumerate(endings.items())}
    files |= {"bee/grey.pgm": encode_as(picture.convert("L"), "PPM"), "bee/1.HEIC": heic(picture)}
    source = open_source(str(write_folder(tmp_path / "set", files)), "train")
    assert (len(source), source.notes) == (len(files), ())
    assert all(MapSamples(source, np.asarray, 0, False)[0, i][0].shape == (7, 9, 3) for i in range(len(source)))


def test_heic_without_its_decoder_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    source = open_source(laid_out("folder", tmp_path, "ant/1.png bee/1.png bee/2.HEIC bee/3.heif"), "train")
    assert len(source) == 2
    assert "1 .heic (pip install pillow-heif)" in source.notes[0] and "1 .heif (pip" in source.notes[0]


def test_links_and_pipes(tmp_path):
    folder = write_folder(tmp_path / "set", {"ant/1.png": PNG, "bee/1.png": PNG})
    write_folder(tmp_path / "elsewhere", {"1.png": PNG, "2.png": PNG})
    (folder / "cow").symlink_to(tmp_path / "elsewhere")
    (folder / "bee/round").symlink_to(folder)
    (folder / "ant/gone.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(folder / "ant/pipe.png")
    source = open_source(str(folder), "train")
    found = Counter(source.classes[label] for label in source.labels())
    assert found == {"ant": 2, "bee": 1, "cow": 2}
    assert source.notes == ("not read: 1 that are no regular files",)


def test_a_tar_file_of_tar_files_and_of_hard_links(tmp_path):
    inner = write_tar(tmp_path / "ant.tar", {"1.png": PNG, "2.png": encode(2, "PNG")}).read_bytes()
    path = write_tar(tmp_path / "set.tar", {"ant.tar": inner, "bee/1.png": encode(3, "PNG")})
    with tarfile.open(path, "a") as tar:
        member = tarfile.TarInfo("bee/again.png")
        member.type, member.linkname = tarfile.LNKTYPE, "bee/1.png"
        tar.addfile(member)
    source = open_source(str(path), "train")
    assert dict(zip(source.classes, source.counts(), strict=True)) == {"ant": 2, "bee": 2}
    contents = {source.filename(i).split("set.tar/")[1]: source.reader[i][0].read() for i in range(4)}
    three = encode(3, "PNG")
    assert contents == {"ant/1.png": PNG, "ant/2.png": encode(2, "PNG"), "bee/1.png": three, "bee/again.png": three}
    assert Image.open(io.BytesIO(contents["bee/again.png"])).size


def test_a_folder_that_may_not_be_read_is_one_line(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "set", {"ant/1.png": PNG, "bee/1.png": PNG})
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("bee"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr("os.scandir", refuse)  # root, who runs some tests, may read every folder
    with pytest.raises(DataError, match="bee cannot be read"):
        open_source(str(folder), "train")
