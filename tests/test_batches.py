"""The pictures of a run, in memory and through worker processes, and the plan that deals them out."""

import dataclasses

import numpy as np
import pytest
import torch
from picture_sets import pictures, write_shards, write_tar
from PIL import Image
from torchvision import transforms

from convmixer.config import ConvMixerConfig
from convmixer.preprocessing import CIFAR10, Preprocessing
from train.data import batches
from train.data.batches import MemoryBatches, SourceBatches, StreamBatches, memory_batches
from train.data.cifar import LabelledImages
from train.data.sources import open_source
from train.distributed import World
from train.errors import TrainingError
from train.plan import Plan, epoch_order
from train.recipe import Augmentation, Recipe

CPU = torch.device("cpu")
CROPS = Augmentation(scale=0.5, ratio=(0.75, 1.33), ra_n=2, jitter=0.2)
RECIPE = Recipe("x", ConvMixerConfig(16, 1, 5, 2, 10), CIFAR10, epochs=1, batch_size=16, augmentation=CROPS)
READ = dataclasses.replace(
    RECIPE,
    preprocessing=Preprocessing(24),
    batch_size=8,
    micro_batch=4,
    augmentation=Augmentation(scale=0.3, aa="rand-m9-mstd0.5-inc1", interpolation="random"),
)


def images_of(n: int) -> LabelledImages:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
    return LabelledImages("made", images, rng.integers(0, 10, n), tuple("abcdefghij"))


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
@pytest.mark.parametrize("micro_batch", [1, 5, 16, 100])
@pytest.mark.parametrize("images", [50, 64, 7, 33])
def test_every_picture_is_dealt_once(images, micro_batch, processes):
    plan = Plan(images, 16, micro_batch, False, processes)
    seen = []
    for step in range(plan.steps):
        parts = [plan.parts(step, rank) for rank in range(processes)]
        assert len({len(mine) for mine in parts}) == 1  # all processes meet at each part
        sizes = [part.stop - part.start for mine in parts for part in mine]
        assert sum(sizes) == plan.size(step) and min(sizes) >= 1
        assert max(sizes) <= max(micro_batch, -(-plan.size(step) // processes) if micro_batch == 1 else 0)
        seen += [p for mine in parts for part in mine for p in range(part.start, part.stop)]
    assert seen == list(range(len(seen)))
    assert images - len(seen) < processes  # only where a last batch has fewer pictures than there are processes


@pytest.mark.parametrize(
    ("processes", "parts", "said"),
    [
        (1, [64] * 10, "1 process x 10 parts of 64"),
        (4, [53, 53, 54], "4 processes x 3 parts of 54"),
        (8, [40, 40], "8 processes x 2 parts of 40"),
        (10, [64], "10 processes x 1 part of 64"),
    ],
)
def test_the_published_batch_stays_640_on_any_number_of_gpus(processes, parts, said):
    plan = Plan(1_281_167, 640, 64, True, processes)
    assert [part.stop - part.start for part in plan.parts(2000, 0)] == parts
    assert plan.describe() == f"1,281,167 training pictures, 2,001 steps an epoch of 640 = {said}"
    with pytest.raises(TrainingError, match="a batch of 640 cannot be shared by 641 processes"):
        Plan(1_281_167, 640, 64, True, 641)
    with pytest.raises(TrainingError, match="639 training pictures do not fill one batch of 640"):
        Plan(639, 640, 64, True)


def same(some: list, others: list) -> bool:
    assert len(some) == len(others) > 0
    pairs = list(zip(some, others, strict=True))
    return all(torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) for a, b in pairs)


def taken_in_turns(*shares: list) -> list:
    return [part for turn in zip(*shares, strict=True) for part in turn]


def in_memory(n: int = 64, rank: int = 0, size: int = 1, epoch: int = 1, first_step: int = 0, ahead=None, **fields):
    recipe = dataclasses.replace(RECIPE, **{"micro_batch": 8} | fields)
    return list(MemoryBatches(images_of(n), recipe, World(CPU, rank, size), ahead).parts(epoch, first_step))


def test_an_epoch_holds_every_picture_once_and_the_last_batch_is_kept():
    parts, made = in_memory(50, micro_batch=16, augmentation=Augmentation(flip=0.0)), images_of(50)
    assert [len(part.labels) for part in parts] == [16, 16, 16, 2]
    order = epoch_order(50, 0, 1)
    assert sorted(order) == list(range(50))
    assert np.array_equal(torch.cat([part.images for part in parts]).permute(0, 2, 3, 1), made.images[order])
    assert torch.cat([part.labels for part in parts]).tolist() == made.labels[order].tolist()


def test_pictures_in_memory_do_not_depend_on_processes_resumption_or_how_many_parts_are_augmented_together():
    """Bit for bit, so that a run may be taken up with other numbers."""
    alone = in_memory()
    assert len(alone) == 8
    assert same(alone, taken_in_turns(in_memory(rank=0, size=2), in_memory(rank=1, size=2)))
    assert same(alone[4:], in_memory(first_step=2))
    for ahead in (2, 3, 9):
        assert same(alone, in_memory(ahead=ahead)) and same(alone[2:], in_memory(first_step=1, ahead=ahead))
    assert not same(alone, in_memory(epoch=2)) and not same(alone, in_memory(seed=1))


def test_held_out_pictures_come_once_over_all_processes_normalised_as_torchvision_does():
    made = images_of(23)
    theirs = transforms.Compose([transforms.ToTensor(), transforms.Normalize(CIFAR10.mean, CIFAR10.std)])
    expected = {theirs(Image.fromarray(image)).numpy().tobytes() for image in made.images}
    for size in (1, 2, 5):
        shares = [list(memory_batches(made, CIFAR10, World(CPU, rank, size), 4)) for rank in range(size)]
        assert sorted(int(i) for share in shares for _, labels in share for i in labels) == sorted(made.labels)
        assert {image.numpy().tobytes() for share in shares for images, _ in share for image in images} == expected


def loader(data, workers: int = 0, rank: int = 0, size: int = 1) -> SourceBatches | StreamBatches:
    source = open_source(str(data), "train", training=True)
    return (StreamBatches if source.streaming else SourceBatches)(source, READ, World(CPU, rank, size), workers)


def test_pictures_from_a_tar_file_do_not_depend_on_workers_processes_or_resumption(tmp_path):
    files = pictures() | {"cat/0.JPEG": b"broken", "cat/more.png": b"broken"}
    tar = write_tar(tmp_path / "pets.tar", files)  # whose workers must not move each other's position in the file
    alone = list(loader(tar).parts(1, 0))
    assert [len(part.labels) for part in alone] == [4, 4, 4, 4, 4, 4, 1]
    assert all(part.images.dtype == torch.uint8 and part.images.shape[1:] == (3, 24, 24) for part in alone)
    assert sum(len(part.broken) for part in alone) == 2
    two_workers = loader(tar, workers=2)
    other_epoch, one_epoch = (
        {image.numpy().tobytes() for part in parts for image in part.images}
        for parts in (two_workers.parts(0, 0), alone)
    )
    assert one_epoch.isdisjoint(other_epoch)  # its changes are others
    assert same(alone, list(two_workers.parts(1, 0)))  # whatever the epoch before has drawn
    assert same(alone[4:], list(two_workers.parts(1, 2)))
    shares = [list(loader(tar, 1, rank, 2).parts(1, 0)) for rank in (0, 1)]
    assert same(alone[:6], taken_in_turns(*shares))  # the last picture has no partner


def test_a_stream_goes_on_the_same_and_is_shared_by_shards(tmp_path):
    shards = f"wds/{write_shards(tmp_path / 'shards')}"
    two_workers = loader(shards, workers=2)
    first, whole = list(two_workers.parts(2, 0)), list(two_workers.parts(3, 0))
    assert [len(part.labels) for part in whole] == [4] * 6
    assert torch.cat([part.labels for part in first]).tolist() != torch.cat([part.labels for part in whole]).tolist()
    assert same(whole[4:], list(loader(shards, workers=2).parts(3, 2)))
    shares = [list(loader(shards, 1, rank, 2).parts(3, 0)) for rank in (0, 1)]
    assert [[len(part.labels) for part in mine] for mine in shares] == [[4] * 3] * 2
    assert not same(*shares)
    with pytest.raises(TrainingError, match="parts of one size: 8 pictures do not divide"):
        loader(shards, size=3)


def test_synsets_become_readable_labels():
    assert batches.readable(("n01440764", "n02123045")) == ("tench", "tabby")
    assert batches.readable(("n01440764", "mine")) == ("n01440764", "mine")
