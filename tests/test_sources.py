"""Image folders, tar files, WebDataset shards and Hugging Face data sets: as timm reads them, and what is refused."""

import io
import json
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from timm.data import create_dataset, create_transform
from torch.utils.data import DataLoader

from train.errors import DataError
from train.samples import data_error_line
from train.sources import MapSamples, Source, StreamSamples, open_pair, open_source, sample_seed

CLASSES = ("cat", "dog 2", "dog 10")  # in the natural order of timm, which is not the alphabet's
EACH = 8


@pytest.fixture(scope="module", autouse=True)
def caches(tmp_path_factory):
    """A cache of this test's own for Hugging Face's libraries, and no network: as HF_HOME and HF_HUB_OFFLINE do it."""
    import datasets
    import huggingface_hub

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("hf"))
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        yield


def encode(seed: int, format: str = "JPEG") -> bytes:
    rng, buffer = np.random.default_rng(seed), io.BytesIO()
    height, width = rng.integers(20, 60, 2)
    pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, format)
    return buffer.getvalue()


def pictures(first_seed: int = 0) -> dict[str, bytes]:
    """EACH pictures of each class, by path."""
    return {
        f"{name}/{i}.{'png' if i % 2 else 'JPEG'}": encode(first_seed + 100 * index + i, "PNG" if i % 2 else "JPEG")
        for index, name in enumerate(CLASSES)
        for i in range(EACH)
    }


def write_folder(folder: Path, files: dict[str, bytes]) -> Path:
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def write_shards(folder: Path, shards: int = 4, broken: dict[int, bytes] | None = None, info: bool = True) -> Path:
    """24 samples over the shards; a label is the sample's number modulo 3."""
    lengths = []
    for shard in range(shards):
        numbers = range(shard, 3 * EACH, shards)
        lengths.append(len(numbers))
        files = {}
        for number in numbers:
            files[f"{number:04}.jpg"] = (broken or {}).get(number, encode(number))
            files[f"{number:04}.cls"] = str(number % 3).encode()
        write_tar(folder / f"part-{shard}.tar", files)
    split = {
        "name": "train",
        "num_samples": 3 * EACH,
        "filenames": [f"part-{shard}.tar" for shard in range(shards)],
        "shard_lengths": lengths,
    }
    if info:
        (folder / "_info.json").write_text(json.dumps({"splits": {"train": split, "val": split | {"name": "val"}}}))
    return folder


def write_parquet(folder: Path, labels: list, feature=None) -> Path:
    import datasets

    folder.mkdir(parents=True, exist_ok=True)
    rows = {"image": [{"bytes": encode(i), "path": None} for i in range(len(labels))], "label": labels}
    table = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    if feature is not None:
        table = table.cast_column("label", feature)
    table.to_parquet(str(folder / "train-00000.parquet"))
    return folder


def samples(source: Source) -> list:
    return [MapSamples(source, np.asarray, 0, False)[0, index] for index in range(len(source))]


def assert_same_as_timm(source: Source, theirs) -> None:
    ours = samples(source)
    assert len(ours) == len(theirs) > 0
    for (image, label, broken), (their_image, their_label) in zip(ours, theirs, strict=True):
        assert np.array_equal(image, np.asarray(their_image))
        assert (label, broken) == (their_label, ())
    assert source.labels().tolist() == [label for _, label, _ in ours]


def as_it_is(sample):
    return sample


def loaded(data, workers: int, sampler=None, **options) -> DataLoader:
    """One sample after the other, as the data set gives them."""
    return DataLoader(data, batch_size=None, sampler=sampler, num_workers=workers, collate_fn=as_it_is, **options)


def key(image: np.ndarray) -> bytes:
    return image.tobytes()


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
    by_two = loaded(MapSamples(source, np.asarray, 0, False), 2, [(0, i) for i in range(24)])
    for mine, other in zip(samples(source), by_two, strict=True):  # the processes share no position in the file
        assert np.array_equal(mine[0], other[0])


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
    assert (training.dataset.reader.is_training, held.dataset.reader.is_training) == (True, False)
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
    assert "holds no pictures (.png, .jpg" in refused(tmp_path / "empty")
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
    message = refused(tmp_path / "set", pair=True)
    assert "dog 10 only in set/train; cow only in set/val" in message
    assert "not asked for: cow" in refused(tmp_path / "set", "val", classes=CLASSES)


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


# Samples


@pytest.fixture
def with_broken_pictures(tmp_path) -> Source:
    files = pictures()
    files["cat/0.JPEG"] = b""
    files["cat/2.JPEG"] = files["cat/2.JPEG"][:-400]
    files["dog 2/4.JPEG"] = b"this is text"
    source = open_source(str(write_folder(tmp_path / "set", files)), "train")
    (tmp_path / "set/dog 10/5.png").unlink()
    return source


def test_broken_pictures_are_named_and_left_out_or_replaced(with_broken_pictures):
    source = with_broken_pictures
    broken = {"cat/0.JPEG": "empty, or not", "cat/2.JPEG": "truncated", "dog 2/4.JPEG": "not a picture"}
    broken["dog 10/5.png"] = "No such file"
    names = [source.filename(i) for i in range(24)]
    expected = {next(i for i, name in enumerate(names) if name.endswith(path)): path for path in broken}
    left_out, replaced = MapSamples(source, np.asarray, 0, False), MapSamples(source, np.asarray, 0, True)
    for index in range(24):
        image, label, said = left_out[0, index]
        assert (image is None) == (index in expected)
        other, other_label, also_said = replaced[0, index]
        assert said == also_said
        if index in expected:
            assert len(said) == 1
            assert said[0].startswith(f"{names[index]}: ") and broken[expected[index]] in said[0]
            following = left_out[0, (index + 1) % 24]
            assert np.array_equal(other, following[0]) and other_label == following[1]
        else:
            assert said == () and np.array_equal(image, other) and label == other_label


def test_a_decompression_bomb_is_a_broken_picture(tmp_path, monkeypatch):
    source = open_source(str(write_folder(tmp_path / "set", pictures())), "train")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    image, _, broken = MapSamples(source, np.asarray, 0, False)[0, 0]
    assert image is None and "decompression bomb" in broken[0]


def test_nothing_but_broken_pictures_ends_in_one_line(tmp_path):
    files = dict.fromkeys(pictures(), b"broken")
    source = open_source(str(write_folder(tmp_path / "set", files)), "train")
    with pytest.raises(DataError) as caught:
        list(loaded(MapSamples(source, np.asarray, 0, True), 1, [(0, 3)]))
    line = data_error_line(caught.value)
    assert line.startswith("set: 10 pictures in a row are broken, the last is") and "\n" not in line


def random_transform():
    return create_transform((3, 24, 24), is_training=True, auto_augment="rand-m9-mstd0.5-inc1", re_prob=0.5)


def test_workers_do_not_change_a_picture(with_broken_pictures):
    data = MapSamples(with_broken_pictures, random_transform(), 7, True)
    pairs = [(epoch, index) for epoch in (0, 1) for index in range(24)]
    alone = [data[pair] for pair in pairs]
    np.random.seed(99)
    for workers in (0, 2):
        for mine, other in zip(alone, loaded(data, workers, pairs), strict=True):
            assert mine[0].equal(other[0]) and mine[1:] == other[1:]
    assert not alone[3][0].equal(alone[27][0])  # another epoch, other choices
    assert not data[0, 3][0].equal(MapSamples(with_broken_pictures, random_transform(), 8, True)[0, 3][0])
    assert sample_seed(0, 1, 2) == sample_seed(0, 1, 2) != sample_seed(0, 2, 1)


# Streams


def test_evaluation_gives_each_sample_of_a_stream_once(tmp_path):
    source = open_source(f"wds/{write_shards(tmp_path / 'set')}", "val")
    once = Counter(key(image) for image, _, _ in StreamSamples(source, np.asarray, 0))
    assert set(once.values()) == {1} and len(once) == 24
    for world, workers in ((1, 1), (1, 3), (1, 6), (2, 0), (2, 2), (3, 1)):
        seen: Counter = Counter()
        for rank in range(world):
            stream = StreamSamples(source, np.asarray, 0, rank=rank, world=world)
            seen.update(key(image) for image, _, _ in loaded(stream, workers))
        assert seen == once, (world, workers)


def test_training_streams_are_shuffled_by_epoch_and_can_be_resumed(tmp_path):
    def stream_and_loader(epoch: int):
        source = open_source(f"wds/{write_shards(tmp_path / 'set')}", "train", training=True, seed=5)
        stream = StreamSamples(source, random_transform(), 5, batch_size=5, rank=1, world=2)
        assert stream.steps(2) == 4  # 24 samples over 2 x 2 workers are 6 each, in whole batches 10
        stream.set_epoch(epoch)
        return stream, loaded(stream, 2, persistent_workers=True)

    def epoch_of(loader) -> list:
        return [(image.numpy().tobytes(), label) for image, label, _ in loader]

    stream, whole = stream_and_loader(0)
    epochs = []
    for epoch in range(3):
        stream.set_epoch(epoch)
        epochs.append(epoch_of(whole))
    assert [len(epoch) for epoch in epochs] == [20, 20, 20]
    assert epochs[0] != epochs[1] != epochs[2]
    resumed_stream, resumed = stream_and_loader(1)
    assert epoch_of(resumed) == epochs[1]
    resumed_stream.set_epoch(2)
    assert epoch_of(resumed) == epochs[2]


def test_too_many_workers_for_the_shards_are_refused(tmp_path):
    source = open_source(f"wds/{write_shards(tmp_path / 'set')}", "train", training=True)
    with pytest.raises(DataError, match="has 4 shards, too few for 6 workers"):
        StreamSamples(source, np.asarray, 0, world=2).steps(3)


def test_broken_samples_of_a_stream_are_named(tmp_path, capfd):
    whole = write_shards(tmp_path / "whole")
    broken = {2: b"", 9: encode(9)[:-400], 23: b"this is text"}  # 23 is the last of the last shard
    data = f"wds/{write_shards(tmp_path / 'set', broken=broken)}"
    good = {key(i) for n, (i, _, _) in enumerate(StreamSamples(open_source(f"wds/{whole}", "val"), np.asarray, 0))}
    for workers in (0, 2):
        stream = StreamSamples(open_source(data, "val"), np.asarray, 0)
        given = list(loaded(stream, workers))
        assert len([image for image, _, _ in given if image is not None]) == 21
        assert {key(image) for image, _, _ in given if image is not None} < good
        names = sorted(name for _, _, names in given for name in names)
        assert [name.split(":")[0] for name in names] == ["part-1.tar/0009", "part-2.tar/0002", "part-3.tar/0023"]
        assert "truncated" in names[0] and "not a picture" in names[1] and "not a picture" in names[2]
    training = StreamSamples(open_source(data, "train", training=True), np.asarray, 0, batch_size=4)
    given = list(training)
    assert len(given) == 24 and all(image is not None for image, _, _ in given)  # the round goes on to whole batches
    assert len({name for _, _, names in given for name in names}) == 3
    assert capfd.readouterr() == ("", "")


def test_a_shard_that_is_cut_short_is_named(tmp_path):
    source = open_source(f"wds/{write_shards(tmp_path / 'set')}", "val")
    shard = tmp_path / "set/part-2.tar"
    with tarfile.open(shard) as tar:
        third = tar.getmember("0010.jpg")  # of the samples 2, 6, 10, ...
    shard.write_bytes(shard.read_bytes()[: third.offset_data + 600])
    given = list(StreamSamples(source, np.asarray, 0))
    assert len([image for image, _, _ in given if image is not None]) == 20
    names = [name for _, _, names in given for name in names]
    assert names == ["part-2.tar: unexpected end of data"]


def test_a_stream_of_other_labels_or_of_nothing_is_one_line(tmp_path):
    data = f"wds/{write_shards(tmp_path / 'set', broken=dict.fromkeys(range(24), b''))}"
    with pytest.raises(DataError, match="no picture could be read, the first is part-"):
        list(StreamSamples(open_source(data, "train", training=True), np.asarray, 0))
    data = f"wds/{write_shards(tmp_path / 'other')}"
    with pytest.raises(DataError, match="other/val has the label 2 and 2 classes"):
        list(StreamSamples(open_source(data, "val", classes=CLASSES[:2]), np.asarray, 0))
