"""The pictures of a run, in memory and through worker processes, and the plan that deals them out."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from convmixer.config import ConvMixerConfig
from convmixer.preprocessing import CIFAR10, Preprocessing
from train.data import batches
from train.data.batches import MemoryBatches, SourceBatches, memory_batches, normalise
from train.data.cifar import LabelledImages
from train.data.sources import open_source
from train.distributed import World
from train.errors import DataError, TrainingError
from train.plan import Plan, epoch_order
from train.recipe import Augmentation, Recipe
from train.recipes import RECIPES

CPU = torch.device("cpu")
RECIPE = Recipe("x", ConvMixerConfig(16, 1, 5, 2, 10), CIFAR10, epochs=1, batch_size=16)


def images_of(n: int, seed: int = 0) -> LabelledImages:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
    return LabelledImages("made", images, rng.integers(0, 10, n), tuple("abcdefghij"))


# The plan


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
@pytest.mark.parametrize("micro_batch", [1, 5, 16, 100])
@pytest.mark.parametrize(("images", "batch_size"), [(50, 16), (64, 16), (7, 16), (33, 16)])
def test_every_position_is_dealt_once(images, batch_size, micro_batch, processes):
    plan = Plan(images, batch_size, micro_batch, False, processes)
    seen = []
    for step in range(plan.steps):
        parts = [plan.parts(step, rank) for rank in range(processes)]
        assert len({len(mine) for mine in parts}) == 1  # all processes meet at each part
        positions = [p for mine in parts for part in mine for p in range(part.start, part.stop)]
        assert positions == list(range(step * batch_size, step * batch_size + plan.size(step)))
        sizes = [part.stop - part.start for mine in parts for part in mine]
        assert min(sizes) >= 1
        assert max(sizes) <= max(micro_batch, -(-plan.size(step) // processes) if micro_batch == 1 else 0)
        seen += positions
    left_out = images - len(seen)
    assert left_out < processes  # only where a last batch has fewer pictures than there are processes
    assert left_out == 0 or processes > 1


def test_the_published_batch_stays_640_on_any_number_of_gpus():
    for processes, parts, size in ((10, 1, 64), (1, 10, 64), (5, 2, 64), (8, 2, 40), (2, 5, 64)):
        plan = Plan(1_281_167, 640, 64, True, processes)
        assert plan.steps == 2001
        assert plan.size(0) == 640
        assert [part.stop - part.start for part in plan.parts(2000, processes - 1)] == [size] * parts
    assert (
        "1,281,167 training pictures, 2,001 steps an epoch of 640 = 8 processes x 2 parts of 40"
        in Plan(1_281_167, 640, 64, True, 8).describe()
    )


def test_plans_that_cannot_be_are_one_line():
    with pytest.raises(TrainingError, match="a batch of 4 cannot be shared by 8 processes"):
        Plan(100, 4, 4, False, 8)
    with pytest.raises(TrainingError, match="7 training pictures do not fill one batch of 16"):
        Plan(7, 16, 16, True)


def test_the_order_is_a_permutation_by_seed_and_epoch():
    assert sorted(epoch_order(50, 0, 1)) == list(range(50))
    assert np.array_equal(epoch_order(50, 0, 1), epoch_order(50, 0, 1))
    assert not np.array_equal(epoch_order(50, 0, 1), epoch_order(50, 0, 2))
    assert not np.array_equal(epoch_order(50, 0, 1), epoch_order(50, 1, 1))


# In memory


def parts_of(recipe: Recipe, rank: int = 0, size: int = 1, epoch: int = 1, first_step: int = 0, n: int = 50) -> list:
    return list(MemoryBatches(images_of(n), recipe, World(CPU, rank, size)).parts(epoch, first_step))


def test_an_epoch_holds_every_picture_once_and_the_last_batch_is_kept():
    plain = dataclasses.replace(RECIPE, augmentation=Augmentation(flip=0.0))
    parts = parts_of(plain)
    assert [len(part.labels) for part in parts] == [16, 16, 16, 2]
    made = images_of(50)
    order = epoch_order(50, 0, 1)
    images = torch.cat([part.images for part in parts]).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(images, made.images[order])
    assert torch.cat([part.labels for part in parts]).tolist() == made.labels[order].tolist()


def test_processes_get_what_one_process_gets_in_parts():
    augmented = dataclasses.replace(RECIPE, micro_batch=8, augmentation=Augmentation(scale=0.5, ra_n=2, jitter=0.2))
    alone = parts_of(augmented, n=64)
    first, second = (parts_of(augmented, rank, 2, n=64) for rank in (0, 1))
    together = [part for pair in zip(first, second, strict=True) for part in pair]
    assert len(alone) == len(together) == 8
    for a, b in zip(alone, together, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)


def test_an_epoch_that_is_taken_up_in_the_middle_goes_on_the_same():
    augmented = dataclasses.replace(RECIPE, augmentation=Augmentation(scale=0.5, ra_n=2))
    whole, rest = parts_of(augmented), parts_of(augmented, first_step=2)
    assert len(rest) == 2
    assert all(torch.equal(a.images, b.images) for a, b in zip(whole[2:], rest, strict=True))
    other = parts_of(augmented, epoch=2)
    assert not torch.equal(whole[0].images, other[0].images)


def test_a_gpu_augments_many_parts_together_unless_told_otherwise():
    recipe = RECIPES["cifar10"]
    for device, ahead, chosen in (("cpu", None, 1), ("meta", None, 22), ("meta", 3, 3), ("cpu", 8, 8)):
        assert MemoryBatches(images_of(4), recipe, World(torch.device(device)), ahead).ahead == chosen
    large = dataclasses.replace(recipe, batch_size=50_000, micro_batch=50_000)
    assert MemoryBatches(images_of(4), large, World(torch.device("meta"))).ahead == 1


@pytest.mark.parametrize("ahead", [2, 3, 8])
def test_parts_that_are_augmented_together_come_out_the_same(ahead):
    """Bit for bit, so that a run may be taken up with another number."""
    settings = Augmentation(scale=0.5, ratio=(0.75, 1.33), ra_n=2, jitter=0.2)
    augmented, world = dataclasses.replace(RECIPE, augmentation=settings), World(CPU)
    for first_step in (0, 1):
        alone = MemoryBatches(images_of(50), augmented, world).parts(1, first_step)
        together = MemoryBatches(images_of(50), augmented, world, ahead).parts(1, first_step)
        for a, b in zip(alone, together, strict=True):
            assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)


def test_held_out_pictures_come_once_over_all_processes():
    made = images_of(23)
    for size in (1, 2, 5):
        labels = [
            label.item()
            for rank in range(size)
            for _, part in memory_batches(made, CIFAR10, World(CPU, rank, size), 4)
            for label in part
        ]
        assert sorted(labels) == sorted(made.labels.tolist())


def test_normalise_equals_torchvisions():
    made = images_of(5)
    expected = transforms.Compose([transforms.ToTensor(), transforms.Normalize(CIFAR10.mean, CIFAR10.std)])
    uint8 = torch.from_numpy(made.images).permute(0, 3, 1, 2)
    normalised = normalise(uint8, CIFAR10)
    assert torch.equal(normalised, torch.stack([expected(Image.fromarray(image)) for image in made.images]))
    assert normalised.is_contiguous(memory_format=torch.channels_last)


# Read from disk


@pytest.fixture
def folder(tmp_path, picture):
    """30 pictures in three classes, one of them broken."""
    for i in range(30):
        path = tmp_path / "pets" / ("cat", "dog", "newt")[i % 3] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(40 + i, 50, seed=i).save(path)
    (tmp_path / "pets" / "dog" / "04.png").write_bytes(b"broken")
    return tmp_path / "pets"


FOLDER_RECIPE = dataclasses.replace(
    RECIPE,
    preprocessing=Preprocessing(24),
    batch_size=8,
    micro_batch=4,
    augmentation=Augmentation(scale=0.3, ratio=(0.75, 1.33), aa="rand-m9-mstd0.5-inc1", interpolation="random"),
)


def source_parts(folder, workers: int, epoch: int = 1, first_step: int = 0, rank: int = 0, size: int = 1) -> list:
    source = open_source(str(folder), "train", training=True)
    loader = SourceBatches(source, FOLDER_RECIPE, World(CPU, rank, size), workers)
    return list(loader.parts(epoch, first_step))


def test_pictures_from_a_folder_do_not_depend_on_workers_processes_or_resumption(folder):
    alone = source_parts(folder, workers=0)
    assert [len(part.labels) for part in alone] == [4, 4, 4, 4, 4, 4, 3, 3]
    assert all(part.images.dtype == torch.uint8 and part.images.shape[1:] == (3, 24, 24) for part in alone)
    assert sum(len(part.broken) for part in alone) == 1
    with_workers = source_parts(folder, workers=2)
    pairs = zip(source_parts(folder, 1, rank=0, size=2), source_parts(folder, 1, rank=1, size=2), strict=True)
    shared = [part for pair in pairs for part in pair]
    rest = source_parts(folder, workers=2, first_step=2)
    for expected, others in ((alone, with_workers), (alone, shared), (alone[4:], rest)):
        assert len(expected) == len(others)
        assert all(torch.equal(a.images, b.images) for a, b in zip(expected, others, strict=True))
        assert all(torch.equal(a.labels, b.labels) for a, b in zip(expected, others, strict=True))


def test_a_loader_serves_one_epoch_after_the_other(folder):
    loader = SourceBatches(open_source(str(folder), "train", training=True), FOLDER_RECIPE, World(CPU), 2)
    first, second = list(loader.parts(0, 0)), list(loader.parts(1, 0))
    again = source_parts(folder, workers=0, epoch=1)
    assert not torch.equal(first[0].images, second[0].images)
    assert all(torch.equal(a.images, b.images) for a, b in zip(second, again, strict=True))


def test_only_broken_pictures_are_one_line(folder):
    for path in folder.rglob("*.png"):
        path.write_bytes(b"broken")
    with pytest.raises(DataError, match="10 pictures in a row are broken") as raised:
        source_parts(folder, workers=1)
    assert "\n" not in str(raised.value)


def test_synsets_become_readable_labels():
    assert batches.readable(("n01440764", "n02123045")) == ("tench", "tabby")
    assert batches.readable(("n01440764", "mine")) == ("n01440764", "mine")
