"""Random changes in batches: the same operations as torchvision's, picture by picture."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import InterpolationMode, autoaugment
from torchvision.transforms import functional as F

from train.data import augment as module
from train.data.augment import OPERATIONS, augment, draw
from train.recipe import Augmentation

SIZE = 32


@pytest.fixture
def pictures() -> torch.Tensor:
    """24 smooth pictures with noise, uint8 (24, 3, 32, 32): one flat, one of two colours."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (24, 5, 5, 3), dtype=np.uint8)
    smooth = [np.asarray(Image.fromarray(c).resize((SIZE, SIZE), Image.Resampling.BICUBIC), np.int16) for c in coarse]
    noisy = np.stack(smooth) + rng.integers(-12, 13, (24, SIZE, SIZE, 3))
    noisy[0], noisy[1] = 77, np.where(noisy[1] > 128, 200, 40)
    return torch.from_numpy(noisy.clip(0, 255).astype(np.uint8)).permute(0, 3, 1, 2).contiguous()


def space() -> dict:
    return transforms.RandAugment()._augmentation_space(31, (SIZE, SIZE))


def changed_by(pictures: torch.Tensor, settings: Augmentation, seed: int = 0) -> torch.Tensor:
    return augment(pictures, settings, draw(len(pictures), SIZE, settings, np.random.default_rng(seed)))


@pytest.mark.parametrize("magnitude", [0, 12, 30])
@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_equals_torchvisions(pictures, name, magnitude):
    operation, value_at, signed = OPERATIONS[name]
    values, expected_sign = space()[name]
    assert signed == expected_sign
    theirs = float(values[magnitude]) if values.ndim else float(values)
    in_pixels = SIZE if name.startswith("Translate") else 1  # ours are shares of the side
    assert value_at(magnitude) * in_pixels == pytest.approx(theirs, abs=1e-5)
    for sign in (1, -1) if signed else (1,):
        batch = operation(pictures, sign * value_at(magnitude))
        for picture, changed in zip(pictures, batch, strict=True):
            expected = autoaugment._apply_op(picture, name, sign * theirs, InterpolationMode.NEAREST, None)
            assert (changed.int() - expected.int()).abs().max() <= 1, (name, sign)  # another order of additions


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_authors_pillow_operations_differ_by_rounding_alone(pictures, name):
    """Their script changes Pillow's images; nearest-neighbour ties may fall on the neighbouring pixel."""
    operation, value_at, _ = OPERATIONS[name]
    theirs = value_at(12) * (SIZE if name.startswith("Translate") else 1)
    batch = operation(pictures, value_at(12)).permute(0, 2, 3, 1).numpy()
    far = []
    for picture, changed in zip(pictures.permute(0, 2, 3, 1).numpy(), batch, strict=True):
        expected = autoaugment._apply_op(Image.fromarray(picture), name, theirs, InterpolationMode.NEAREST, None)
        far.append(np.abs(np.asarray(expected, np.int16) - changed).max(-1) > 1)
    assert np.mean(far) < 0.02


def test_randaugment_gives_each_picture_one_operation_evenly(pictures):
    one = pictures[5:6]
    outcomes = {}
    for name, (operation, value_at, signed) in OPERATIONS.items():
        for sign in (1, -1) if signed else (1,):
            outcomes.setdefault(operation(one, sign * value_at(12)).numpy().tobytes(), []).append((name, sign))
    drawn = module.draw_operations(2800, np.random.default_rng(0))
    many = module.randaugment(one.expand(2800, -1, -1, -1), 12, *drawn)
    counts = dict.fromkeys(outcomes, 0)
    for changed in many.numpy():
        counts[changed.tobytes()] += 1  # KeyError: not the outcome of any one operation
    for outcome, names in outcomes.items():
        share = sum(0.5 if OPERATIONS[name][2] else 1.0 for name, _ in names) / len(OPERATIONS)
        assert counts[outcome] == pytest.approx(2800 * share, abs=5 * math.sqrt(2800 * share)), names


def test_a_crop_equals_torchvisions_of_the_same_box(pictures):
    boxes = np.stack([np.array([i % 9, (3 * i) % 11, 32 - i % 9 - i % 5, 20]) for i in range(24)])
    ours = module.resized_crop(pictures, boxes)
    for picture, box, changed in zip(pictures, boxes.tolist(), ours, strict=True):
        expected = F.resized_crop(picture, *box, [SIZE, SIZE], InterpolationMode.BILINEAR, antialias=False)
        assert (changed.int() - expected.int()).abs().max() <= 1


def test_crop_boxes_lie_inside_and_follow_scale_and_ratio():
    settings = Augmentation(scale=0.4, ratio=(0.75, 4 / 3))
    top, left, height, width = module.crop_boxes(5000, SIZE, settings, np.random.default_rng(0)).T
    assert top.min() == left.min() == 0
    assert (top + height).max() == (left + width).max() == SIZE
    area, ratio = height * width / SIZE**2, width / height
    assert 0.36 < area.min() < 0.44
    assert area.max() > 0.98
    assert 0.7 < ratio.min() < 0.8
    assert 1.25 < ratio.max() < 1.42
    assert len(np.unique(left)) > 8
    whole = module.crop_boxes(100, SIZE, Augmentation(scale=1.0), np.random.default_rng(0))
    assert (whole == [0, 0, SIZE, SIZE]).all()


def test_half_of_the_pictures_are_mirrored(pictures):
    many = pictures[5:6].expand(1000, -1, -1, -1)
    changed = changed_by(many, Augmentation())
    mirrored = (changed == pictures[5].flip(2)).flatten(1).all(1)
    as_it_was = (changed == pictures[5]).flatten(1).all(1)
    assert (mirrored ^ as_it_was).all()
    assert 440 < mirrored.sum() < 560
    assert torch.equal(changed_by(pictures, Augmentation(flip=0.0)), pictures)


def test_jitter_equals_torchvisions_three_adjustments(pictures):
    """With the drawn factors and orders, torchvision's own functions give the same pictures."""
    changed = module.color_jitter(pictures, *module.draw_jitter(24, 0.2, np.random.default_rng(3)))
    rng = np.random.default_rng(3)
    factors = rng.uniform(0.8, 1.2, (3, 24)).astype(np.float32)
    orders = rng.permuted(np.tile(np.arange(3), (24, 1)), axis=1)
    adjust = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation)
    for i, picture in enumerate(pictures):
        for number in orders[i]:
            picture = adjust[number](picture, float(factors[number, i]))
        assert (changed[i].int() - picture.int()).abs().max() <= 1
    assert len({tuple(order) for order in orders}) > 4


def test_the_same_numbers_give_the_same_pictures(pictures):
    settings = Augmentation(scale=0.6, ra_n=2, ra_m=12, jitter=0.2)
    first, again, other = (changed_by(pictures, settings, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert (first.dtype, first.shape) == (torch.uint8, pictures.shape)
