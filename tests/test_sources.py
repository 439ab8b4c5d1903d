"""Image folders, tar files, WebDataset shards and Hugging Face data sets: as timm reads them, and what is refused."""

import json
import sys
import tarfile
from collections import Counter

import numpy as np
import pytest
from picture_sets import CLASSES, encode, pictures, write_folder, write_parquet, write_shards, write_tar
from timm.data import create_dataset

from train.data.sources import MapSamples, Source, StreamSamples, open_pair, open_source
from train.errors import DataError


@pytest.fixture(scope="module", autouse=True)
def caches(tmp_path_factory):
    """A cache of this test's own for Hugging Face's libraries, and no network: as HF_HOME and HF_HUB_OFFLINE do it."""
    import datasets
    import huggingface_hub

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("hf"))
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        yield


def samples(source: Source) -> list:
    return [MapSamples(source, np.asarray, 0, False)[0, index] for index in range(len(source))]


def assert_same_as_timm(source: Source, theirs) -> None:
    ours = samples(source)
    assert len(ours) == len(theirs) > 0
    for (image, label, broken), (their_image, their_label) in zip(ours, theirs, strict=True):
        assert np.array_equal(image, np.asarray(their_image))
        assert (label, broken) == (their_label, ())
    assert source.labels().tolist() == [label for _, label, _ in ours]


# What is read


def test_a_folder_is_read_as_timm_reads_it(tmp_path):
    write_folder(tmp_path / "set/train", pictures())
    write_folder(tmp_path / "set/validation", pictures(1000))
    for split, folder in (("train", "train"), ("training", "train"), ("val", "validation"), ("valid", "validation")):
        source = open_source(str(tmp_path / "set"), split)
        assert (source.name, source.classes, source.streaming) == (f"set/{folder}", CLASSES, False)
        assert_same_as_timm(source, create_dataset("", str(tmp_path / "set" / folder)))
    flat = open_source(str(tmp_path / "set/train"), "val")
    assert flat.name == "train"
    assert_same_as_timm(flat, create_dataset("", str(tmp_path / "set/train")))


def test_a_class_may_be_called_like_a_split(tmp_path):
    files = {f"{name}/{i}.png": encode(i, "PNG") for name in ("cat", "val") for i in range(2)}
    source = open_source(str(write_folder(tmp_path / "set", files)), "val")
    assert (source.name, source.classes, len(source)) == ("set", ("cat", "val"), 4)


def test_other_formats_than_timms_are_not_passed_over(tmp_path):
    files = {f"{name}/a.webp": encode(i, "WEBP") for i, name in enumerate(CLASSES)} | {"cat/b.BMP": encode(9, "BMP")}
    assert len(open_source(str(write_folder(tmp_path / "set", files)), "train")) == 4


def test_a_tar_file_is_read_as_timm_reads_it(tmp_path):
    write_tar(tmp_path / "set/train.tar", pictures())
    write_tar(tmp_path / "set/val.tar", pictures(1000))
    for data, split, tar in (("set", "train", "train"), ("set", "val", "val"), ("set/train.tar", "val", "train")):
        source = open_source(str(tmp_path / data), split)
        assert (source.name.split("/")[-1], source.classes) == (f"{tar}.tar", CLASSES)
        assert_same_as_timm(source, create_dataset("", str(tmp_path / f"set/{tar}.tar")))


def test_shards_are_read_as_timm_reads_them(tmp_path):
    write_shards(tmp_path / "set")
    source = open_source(f"wds/{tmp_path / 'set'}", "validation")
    assert (source.name, source.streaming, len(source)) == ("set/validation", True, 24)
    assert source.classes == ("class 0", "class 1", "class 2")
    theirs = list(create_dataset("wds/", str(tmp_path / "set"), split="val"))
    ours = list(StreamSamples(source, np.asarray, 0))
    assert len(ours) == len(theirs) == 24
    for (image, label, broken), (their_image, their_label) in zip(ours, theirs, strict=True):
        assert np.array_equal(image, np.asarray(their_image))
        assert (label, broken) == (their_label, ())
    braces = open_source(f"wds/{tmp_path / 'set'}", "part-{1..2}.tar|12", classes=CLASSES)
    assert (len(braces), braces.classes) == (12, CLASSES)
    assert [label for _, label, _ in StreamSamples(braces, np.asarray, 0)] == [
        n % 3 for n in (*range(1, 24, 4), *range(2, 24, 4))
    ]


def test_hugging_face_data_is_read_as_timm_reads_it(tmp_path, capfd):
    import datasets

    labels = [i % 3 for i in range(9)]
    parquet = write_parquet(tmp_path / "named", labels, datasets.ClassLabel(names=list(CLASSES)))
    capfd.readouterr()
    source = open_source(f"hfds/{parquet}", "train")
    assert capfd.readouterr() == ("", "")
    assert (source.name, source.classes) == ("named/train", CLASSES)
    assert_same_as_timm(source, create_dataset(f"hfds/{parquet}", split="train"))

    folder = write_folder(tmp_path / "folder/train", pictures()).parent
    write_folder(folder / "test", pictures(1000))
    source = open_source(f"hfds/{folder}", "test")
    assert len(source) == 24
    assert_same_as_timm(source, create_dataset(f"hfds/{folder}", split="test"))
    assert source.filename(0).endswith("0.JPEG")

    numbers = open_source(f"hfds/{write_parquet(tmp_path / 'numbers', labels)}", "train")
    assert numbers.classes == ("class 0", "class 1", "class 2")
    words = open_source(f"hfds/{write_parquet(tmp_path / 'words', [CLASSES[i] for i in labels])}", "train")
    assert words.classes == tuple(sorted(CLASSES))
    assert [words.classes[label] for _, label, _ in samples(words)] == [CLASSES[i] for i in labels]
    assert [words.classes[label] for label in words.labels()] == [CLASSES[i] for i in labels]


def test_classes_that_were_asked_for_give_the_indices(tmp_path):
    wanted = ("bird", *reversed(CLASSES))
    for data in (
        write_folder(tmp_path / "folder", pictures()),
        write_tar(tmp_path / "set.tar", pictures()),
    ):
        plain, mapped = open_source(str(data), "train"), open_source(str(data), "train", classes=wanted)
        assert mapped.classes == wanted
        assert [wanted[i] for i in mapped.labels()] == [CLASSES[i] for i in plain.labels()]
        assert [s[1] for s in samples(mapped)] == mapped.labels().tolist()


# The held-out part


def test_the_hold_out_takes_a_share_of_each_class_and_never_overlaps(tmp_path):
    files = pictures() | {f"cat/more {i}.png": encode(500 + i, "PNG") for i in range(22)}
    files |= {"one/0.png": encode(900, "PNG"), "two/0.png": encode(901, "PNG"), "two/1.png": encode(902, "PNG")}
    data = str(write_folder(tmp_path / "set", files))
    training, held = open_pair(data, hold_out=0.1)
    assert training.classes == held.classes == (*CLASSES, "one", "two")
    assert Counter(held.labels().tolist()) == {0: 3, 1: 1, 2: 1, 4: 1}
    assert sorted([*training.indices, *held.indices]) == list(range(len(files)))
    assert held.name == "set, hold-out (10 % of each class, seed 0)"
    assert training.name == "set without the hold-out (10 % of each class, seed 0)"
    names = [held.filename(i) for i in range(len(held))]
    assert [label for _, label, _ in samples(held)] == held.labels().tolist()
    assert names == [open_pair(data, hold_out=0.1)[1].filename(i) for i in range(len(held))]
    assert names != [open_pair(data, hold_out=0.1, seed=1)[1].filename(i) for i in range(len(held))]
    assert len(open_pair(data, hold_out=0.99)[0]) >= 5  # every class keeps a picture


def test_a_validation_split_is_used_where_there_is_one(tmp_path):
    write_folder(tmp_path / "set/train", pictures())
    write_folder(tmp_path / "set/test", pictures(1000))
    data = str(tmp_path / "set")
    training, held = open_pair(data)
    assert "hold-out" in held.name  # the test pictures are left alone
    assert len(training) + len(held) == 24
    training, held = open_pair(data, "train", "test")
    assert (training.name, len(training), held.name, len(held)) == ("set/train", 24, "set/test", 24)
    write_tar(tmp_path / "set/val.tar", pictures(2000))
    assert open_pair(data)[1].name == "set/val.tar"
    write_shards(tmp_path / "shards")
    training, held = open_pair(f"wds/{tmp_path / 'shards'}")
    assert (training.reader.is_training, held.reader.is_training) == (True, False)
    assert training.classes == held.classes


# What is refused


def refused(data: object, split: str = "train", pair: bool = False, **options) -> str:
    with pytest.raises(DataError) as caught:
        if pair:
            open_pair(str(data), **options)
        else:
            open_source(str(data), split, **options)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    return message


def test_what_is_no_data_is_one_line(tmp_path):
    assert "does not exist" in refused(tmp_path / "nowhere")
    (tmp_path / "empty/cat").mkdir(parents=True)
    assert "holds no pictures (.apng, .avif" in refused(tmp_path / "empty")
    assert "no class's folder" in refused(write_folder(tmp_path / "loose", {"a.png": encode(1, "PNG")}))
    mixed = pictures() | {"stray.png": encode(1, "PNG")}
    assert "no class's folder" in refused(write_folder(tmp_path / "mixed", mixed))
    # Split folders whose pictures are not sorted into classes are no classes themselves.
    unsorted = {"train/a.png": encode(1, "PNG"), "val/b.png": encode(2, "PNG")}
    assert "no class's folder" in refused(write_folder(tmp_path / "unsorted", unsorted))
    single = write_folder(tmp_path / "single", {"cat/a.png": encode(1, "PNG")})
    assert "one class only" in refused(single, training=True)
    assert open_source(str(single), "val").classes == ("cat",)  # nothing against measuring one
    (tmp_path / "text.txt").write_text("text")
    assert "neither a folder nor a .tar file" in refused(tmp_path / "text.txt")


def test_a_split_that_is_not_there_is_one_line(tmp_path):
    write_folder(tmp_path / "set/train", pictures())
    write_folder(tmp_path / "set/test", pictures())
    assert "no split 'val' with a subfolder a class; it has train, test" in refused(tmp_path / "set", "val")
    assert "no split 'trian'" in refused(tmp_path / "set", "trian")
    assert "no split 'trian'" in refused(tmp_path / "set/train", "trian")
    assert "no split 'small'" in refused(tmp_path / "set", pair=True, val_split="small")
    assert "both" in refused(tmp_path / "set", pair=True, val_split="train")
    assert "above 0 and below 1" in refused(tmp_path / "set", pair=True, hold_out=1.0)
    ones = write_folder(tmp_path / "ones", {f"{name}/0.png": encode(1, "PNG") for name in CLASSES})
    assert "one picture a class" in refused(ones, pair=True)


def test_splits_with_other_classes_are_one_line(tmp_path):
    write_folder(tmp_path / "set/train", pictures())
    write_folder(tmp_path / "set/val", {f"{name}/0.png": encode(1, "PNG") for name in ("cat", "dog 2", "cow")})
    expected = "set/val has classes that are none of the 3 to learn: cow; those are cat, dog 2, dog 10"
    assert refused(tmp_path / "set", pair=True) == refused(tmp_path / "set", "val", classes=CLASSES) == expected


def test_a_damaged_tar_file_is_one_line(tmp_path):
    whole = write_tar(tmp_path / "set.tar", pictures()).read_bytes()
    with tarfile.open(tmp_path / "set.tar") as tar:
        last = max(member.offset_data + member.size for member in tar)
    cuts = [whole[:end] for end in (last - 10, last // 2 + 7, last // 1024 * 512, 512, 300, 0)]
    for content in (*cuts, b"no tar file" * 100, b"no tar file" * 100 + bytes(1024)):
        (tmp_path / "cut.tar").write_bytes(content)
        assert "is no tar file, or is" in refused(tmp_path / "cut.tar")
    assert "holds no pictures" in refused(write_tar(tmp_path / "none.tar", {"a/b.txt": b"text"}))
    assert "no class's folder" in refused(write_tar(tmp_path / "loose.tar", {"b.png": encode(1, "PNG")}))


def test_shards_that_cannot_be_read_are_one_line(tmp_path, capfd):
    assert "there is no folder" in refused(f"wds/{tmp_path / 'nowhere'}")
    bare = write_shards(tmp_path / "bare", info=False)
    assert 'nor an _info.json; give the shards as the split: "part-' in refused(f"wds/{bare}")
    assert "how many pictures" in refused(f"wds/{bare}", "part-{0..3}.tar")
    assert "part-{0..3}.tar" in refused(f"wds/{bare}", "part-{0..3}.tar", training=True)
    assert "is not how shards are written" in refused(f"wds/{bare}", "part-{0..3}.tar|many")
    assert "2 of 6 shards are missing" in refused(f"wds/{bare}", "part-{0..5}.tar|36")
    good = write_shards(tmp_path / "good")
    assert "no split 'test'; it has train, val" in refused(f"wds/{good}", "test")
    assert "cannot be held out" in refused(f"wds/{bare}", pair=True, train_split="part-{0..3}.tar|24")
    (good / "_info.json").write_text(json.dumps({"splits": {"train": {"name": "train"}}}))
    assert "not described in full" in refused(f"wds/{good}")
    (good / "_info.json").write_text("{")
    assert "_info.json cannot be read" in refused(f"wds/{good}")
    (bare / "part-1.tar").write_bytes((bare / "part-1.tar").read_bytes()[:3000])
    assert "part-1.tar is no tar file, or is cut short" in refused(f"wds/{bare}", "part-{0..3}.tar|24")
    assert capfd.readouterr() == ("", "")


def test_hugging_face_data_that_cannot_be_read_is_one_line(tmp_path, capfd):
    assert "there is no folder" in refused(f"hfds/{tmp_path / 'nowhere'}")
    assert "nobody/nothing-such cannot be loaded: there is no such folder, and from the Hub" in refused(
        "hfds/nobody/nothing-such"
    )
    data = write_parquet(tmp_path / "data", [0, 1, 0])
    assert "no split 'val'; it has train" in refused(f"hfds/{data}", "val")
    assert "without a label" in refused(f"hfds/{write_parquet(tmp_path / 'none', [0, 1, -1])}")
    assert "must be names or numbers" in refused(f"hfds/{write_parquet(tmp_path / 'floats', [0.5, 1.5])}")
    capfd.readouterr()
    assert "has the label 1, but there are 1 classes" in refused(f"hfds/{data}", classes=("cat",))
    assert capfd.readouterr() == ("", "")


def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch):
    for name, form in (("datasets", "hfds"), ("webdataset", "wds")):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, name, None)
            assert f"pip install {name}" in refused(f"{form}/{tmp_path}")
