"""Samples for the DataLoader: the same with any number of workers, broken pictures named, every one counted once."""

import io
import tarfile
from collections import Counter
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from picture_files import WIDE_PROFILE, exif
from picture_files import encode as encode_as
from picture_sets import CLASSES, encode, pictures, write_folder, write_shards, write_tar
from PIL import Image
from timm.data import create_transform
from torch.utils.data import DataLoader

from convmixer.images import load_image
from train.data.samples import MapSamples, Source, StreamSamples, as_timm, data_error_line, sample_seed
from train.data.sources import open_source
from train.errors import DataError


def as_it_is(sample):
    return sample


def loaded(data, workers: int, sampler=None, **options) -> DataLoader:
    """One sample after the other, as the data set gives them."""
    return DataLoader(data, batch_size=None, sampler=sampler, num_workers=workers, collate_fn=as_it_is, **options)


def key(image: np.ndarray) -> bytes:
    return image.tobytes()


def test_worker_processes_do_not_disturb_each_other_in_a_tar_file(tmp_path):
    source = open_source(str(write_tar(tmp_path / "set.tar", pictures())), "train")
    data = MapSamples(source, np.asarray, 0, False)
    pairs = [(0, index) for index in range(24)]
    alone = [data[pair] for pair in pairs]  # a file that this process had open would be theirs, too
    for mine, other in zip(alone, loaded(data, 2, pairs), strict=True):
        assert np.array_equal(mine[0], other[0]) and mine[1:] == other[1:]


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
    broken = {"cat/0.JPEG": "is empty", "cat/2.JPEG": "cut short", "dog 2/4.JPEG": "cannot be read as a picture"}
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


def test_a_broken_picture_is_replaced_by_one_of_the_same_part(with_broken_pictures):
    indices = np.array([9, 11, 12])  # the last one is dog 2/4.JPEG, which is text
    part = replace(with_broken_pictures, indices=indices)
    image, label, broken = MapSamples(part, np.asarray, 0, True)[0, 2]
    assert len(broken) == 1 and "dog 2/4.JPEG" in broken[0]
    assert np.array_equal(image, MapSamples(with_broken_pictures, np.asarray, 0, True)[0, 9][0]) and label == 1


def test_a_decompression_bomb_is_a_broken_picture(tmp_path, monkeypatch):
    source = open_source(str(write_folder(tmp_path / "set", pictures())), "train")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    image, _, broken = MapSamples(source, np.asarray, 0, False, as_timm)[0, 0]
    assert image is None and "decompression bomb" in broken[0]
    small = partial(load_image, max_pixels=10)
    image, _, broken = MapSamples(source, np.asarray, 0, False, small)[0, 0]
    assert image is None and "more than the 10" in broken[0]


@pytest.mark.parametrize("decode", [load_image, as_timm])
def test_pictures_are_decoded_as_every_door_does_or_as_timm_does(tmp_path, decode):
    """Turned as EXIF says, not as XMP says, and their colour profile applied, from files and from shards."""
    picture = Image.new("RGB", (32, 16), (200, 40, 40))
    kinds = ({"exif": exif(6)}, {"icc_profile": WIDE_PROFILE}, {"xmp": b'<tiff:Orientation="6"/>'})
    odd = [encode_as(picture, "JPEG", **options) for options in kinds]
    if decode is load_image:
        expected = [np.asarray(load_image(content)) for content in odd]
        assert [image.shape for image in expected] == [(32, 16, 3), (16, 32, 3), (16, 32, 3)]
    else:
        expected = [np.asarray(Image.open(io.BytesIO(content))) for content in odd]
    files = pictures() | {f"cat/{number}.JPEG": content for number, content in zip((0, 2, 4), odd, strict=True)}
    source = open_source(str(write_folder(tmp_path / "set", files)), "train")
    found = {source.filename(i)[-10:]: MapSamples(source, np.asarray, 0, False, decode)[0, i][0] for i in range(24)}
    for number, image in zip((0, 2, 4), expected, strict=True):
        assert np.array_equal(found[f"cat/{number}.JPEG"], image)
    shards = write_shards(tmp_path / "shards", broken=dict(enumerate(odd)))
    seen = {key(i) for i, _, _ in StreamSamples(open_source(f"wds/{shards}", "val"), np.asarray, 0, decode=decode)}
    assert seen > {key(image) for image in expected}


def test_a_picture_of_a_stream_that_is_too_large_is_named_and_left_out(tmp_path):
    source = open_source(f"wds/{write_shards(tmp_path / 'set')}", "val")
    given = list(StreamSamples(source, np.asarray, 0, decode=partial(load_image, max_pixels=1000)))
    images = [image for image, _, _ in given if image is not None]
    assert 0 < len(images) < 24 and all(image.size <= 3000 for image in images)
    assert any("more than the 1,000" in line for _, _, said in given for line in said)


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


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores, on purpose
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


def test_samples_of_one_shard_are_shuffled_by_epoch(tmp_path):
    source = open_source(f"wds/{write_shards(tmp_path / 'set', shards=1)}", "train", training=True)
    stream = StreamSamples(source, np.asarray, 0)
    orders = []
    for epoch in (0, 1, 0):
        stream.set_epoch(epoch)
        orders.append([key(image) for image, _, _ in stream])
    assert sorted(orders[0]) == sorted(orders[1])
    assert orders[0] == orders[2] != orders[1]


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
