"""Samples for the DataLoader: broken pictures named, left out or replaced, and every picture of a stream given once."""

from collections import Counter
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from picture_files import WIDE_PROFILE, exif
from picture_files import encode as encode_as
from picture_sets import CLASSES, encode, pictures, write_folder, write_shards
from PIL import Image
from torch.utils.data import DataLoader

from convmixer.images import load_image
from train.data.samples import MapSamples, StreamSamples, data_error_line
from train.data.sources import open_source
from train.errors import DataError


def loaded(data, workers: int, sampler=None) -> DataLoader:
    """One sample after the other, as the data set gives them."""
    return DataLoader(data, batch_size=None, sampler=sampler, num_workers=workers, collate_fn=lambda sample: sample)


def stream(path, split: str = "val", classes=None, **options) -> StreamSamples:
    source = open_source(f"wds/{path}", split, training=split == "train", classes=classes)
    return StreamSamples(source, np.asarray, 0, **options)


def whole(samples) -> Counter:
    return Counter(image.tobytes() for image, _, _ in samples if image is not None)


def said(samples) -> list[str]:
    return [message for _, _, messages in samples for message in messages]


def test_broken_pictures_are_named_and_left_out_or_replaced(tmp_path):
    files = pictures()
    files |= {"cat/0.JPEG": b"", "cat/2.JPEG": files["cat/2.JPEG"][:-400], "dog 2/4.JPEG": b"this is text"}
    source = open_source(str(write_folder(tmp_path / "set", files)), "train")
    (tmp_path / "set/dog 10/5.png").unlink()
    broken = {"cat/0.JPEG": "is empty", "cat/2.JPEG": "cut short", "dog 2/4.JPEG": "cannot be read as a picture"}
    broken |= {"dog 10/5.png": "No such file"}
    left_out, replaced = MapSamples(source, np.asarray, 0, False), MapSamples(source, np.asarray, 0, True)
    for index in range(24):
        (image, label, messages), (other, other_label, same) = left_out[0, index], replaced[0, index]
        assert messages == same
        name = source.filename(index)
        if reason := broken.pop(name.split("set/")[1], None):
            assert image is None
            assert len(messages) == 1 and messages[0].startswith(f"{name}: ") and reason in messages[0]
            image, label, _ = left_out[0, (index + 1) % 24]
        assert np.array_equal(image, other) and label == other_label
    assert not broken
    part = replace(source, indices=np.array([9, 11, 12]))  # the last is text, and its place takes one of the same part
    image, label, _ = MapSamples(part, np.asarray, 0, True)[0, 2]
    assert np.array_equal(image, replaced[0, 9][0]) and label == 1
    write_folder(tmp_path / "set", dict.fromkeys(files, b"broken"))
    with pytest.raises(DataError) as caught:
        list(loaded(replaced, 1, [(0, 3)]))
    line = data_error_line(caught.value)
    assert line.startswith("set: 10 pictures in a row are broken, the last is") and "\n" not in line


def test_pictures_that_are_too_large_are_named_and_left_out(tmp_path):
    small = partial(load_image, max_pixels=1000)
    source = open_source(str(write_folder(tmp_path / "set", pictures())), "train")
    shards = stream(write_shards(tmp_path / "shards"), decode=small)
    for samples in (list(shards), [MapSamples(source, np.asarray, 0, False, small)[0, i] for i in range(24)]):
        images = [image for image, _, _ in samples if image is not None]
        assert 0 < len(images) < 24 and all(image.size <= 3000 for image in images)
        assert len(said(samples)) + len(images) == 24 and all("more than the 1,000" in line for line in said(samples))


def test_pictures_are_decoded_as_every_door_does(tmp_path):
    """Turned as EXIF says, not as XMP says, and their colour profile applied, from files and from shards."""
    picture = Image.new("RGB", (32, 16), (200, 40, 40))
    kinds = ({"exif": exif(6)}, {"icc_profile": WIDE_PROFILE}, {"xmp": b'<tiff:Orientation="6"/>'})
    odd = [encode_as(picture, "JPEG", **options) for options in kinds]
    expected = [np.asarray(load_image(content)) for content in odd]
    assert [image.shape for image in expected] == [(32, 16, 3), (16, 32, 3), (16, 32, 3)]
    folder = write_folder(tmp_path / "set", {f"cat/{i}.jpg": content for i, content in enumerate(odd)})
    source = MapSamples(open_source(str(folder), "val"), np.asarray, 0, False)
    assert all(np.array_equal(source[0, index][0], image) for index, image in enumerate(expected))
    shards = write_shards(tmp_path / "shards", broken=dict(enumerate(odd)))
    assert whole(stream(shards)).keys() > {image.tobytes() for image in expected}


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores, on purpose
def test_evaluation_gives_each_sample_of_a_stream_once(tmp_path):
    shards = write_shards(tmp_path / "set")
    once = whole(stream(shards))
    assert set(once.values()) == {1} and len(once) == 24
    for world, workers in ((1, 6), (2, 0), (2, 2), (3, 1)):
        streams = [stream(shards, rank=rank, world=world) for rank in range(world)]
        assert sum((whole(loaded(mine, workers)) for mine in streams), Counter()) == once, (world, workers)


def test_broken_samples_of_a_stream_are_named(tmp_path, capfd):
    broken = {2: b"", 9: encode(9)[:-400], 23: b"this is text"}  # 23 is the last of the last shard
    shards, good = write_shards(tmp_path / "set", broken=broken), whole(stream(write_shards(tmp_path / "whole")))
    for workers in (0, 2):
        given = list(loaded(stream(shards), workers))
        assert whole(given).total() == 21 and whole(given) < good
        names = sorted(said(given))
        assert [name.split(":")[0] for name in names] == ["part-1.tar/0009", "part-2.tar/0002", "part-3.tar/0023"]
        assert "truncated" in names[0] and "not a picture" in names[1] and "not a picture" in names[2]
    given = list(stream(shards, "train", batch_size=4))
    assert len(given) == whole(given).total() == 24  # the round goes on to whole batches
    assert len({*said(given)}) == 3
    assert capfd.readouterr() == ("", "")


def test_streams_that_cannot_be_read_are_one_line(tmp_path):
    shards = write_shards(tmp_path / "set")
    samples, shard = stream(shards), shards / "part-2.tar"
    shard.write_bytes(shard.read_bytes()[:1100])  # after it was opened
    given = list(samples)
    assert whole(given).total() == 18 and said(given) == ["part-2.tar: unexpected end of data"]
    shards = write_shards(tmp_path / "set")
    with pytest.raises(DataError, match="has 4 shards, too few for 6 workers"):
        stream(shards, "train", world=2).steps(3)
    with pytest.raises(DataError, match="set/val has the label 2 and 2 classes"):
        list(stream(shards, classes=CLASSES[:2]))
    empty = write_shards(tmp_path / "empty", broken=dict.fromkeys(range(24), b""))
    with pytest.raises(DataError, match="no picture could be read, the first is part-"):
        list(stream(empty, "train"))
