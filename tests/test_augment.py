"""Random changes in batches: the same operations as torchvision's, picture by picture."""

import math

import numpy as np
import pytest
import torch
from torchvision import transforms
from torchvision.transforms import InterpolationMode, autoaugment
from torchvision.transforms import functional as F

from train.data import augment as module
from train.data.augment import OPERATIONS, augment, draw
from train.recipe import Augmentation

SIZE = 32


@pytest.fixture
def pictures(picture) -> torch.Tensor:
    """24 pictures, uint8 (24, 3, 32, 32): one flat, one of two colours."""
    drawn = np.stack([np.asarray(picture(SIZE, SIZE, seed)) for seed in range(24)])
    drawn[0], drawn[1] = 77, np.where(drawn[1] > 128, 200, 40)
    return torch.from_numpy(drawn).permute(0, 3, 1, 2).contiguous()


@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_equals_torchvisions(pictures, name):
    operation, value_at, signed = OPERATIONS[name]
    values, expected_sign = transforms.RandAugment()._augmentation_space(31, (SIZE, SIZE))[name]
    assert signed == expected_sign
    in_pixels = SIZE if name.startswith("Translate") else 1  # ours are shares of the side
    for magnitude, sign in [(0, 1), (12, 1), (30, -1 if signed else 1)]:
        theirs = sign * float(values[magnitude] if values.ndim else values)
        assert sign * value_at(magnitude) * in_pixels == pytest.approx(theirs, abs=1e-5)
        changed = operation(pictures, sign * value_at(magnitude))
        for picture, ours in zip(pictures, changed, strict=True):
            expected = autoaugment._apply_op(picture, name, theirs, InterpolationMode.NEAREST, None)
            assert (ours.int() - expected.int()).abs().max() <= 1, magnitude  # another order of additions


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


def test_crops_equal_torchvisions_and_follow_scale_and_ratio(pictures):
    settings = Augmentation(scale=0.4, ratio=(0.75, 4 / 3))
    boxes = module.crop_boxes(5000, SIZE, settings, np.random.default_rng(0))
    for picture, box, changed in zip(pictures, boxes.tolist(), module.resized_crop(pictures, boxes[:24]), strict=False):
        expected = F.resized_crop(picture, *box, [SIZE, SIZE], InterpolationMode.BILINEAR, antialias=False)
        assert (changed.int() - expected.int()).abs().max() <= 1
    top, left, height, width = boxes.T
    assert top.min() == left.min() == 0
    assert (top + height).max() == (left + width).max() == SIZE
    area, ratio = height * width / SIZE**2, width / height
    assert 0.36 < area.min() < 0.44 and area.max() > 0.98
    assert 0.7 < ratio.min() < 0.8 and 1.25 < ratio.max() < 1.42
    assert len(np.unique(left)) > 8


def test_jitter_equals_torchvisions_three_adjustments(pictures):
    factors, orders = module.draw_jitter(24, 0.2, np.random.default_rng(3))
    changed = module.color_jitter(pictures, factors, orders)
    adjust = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation)
    for i, picture in enumerate(pictures):
        for number in orders[i]:
            picture = adjust[number](picture, float(factors[i, number]))
        assert (changed[i].int() - picture.int()).abs().max() <= 1
    assert len({tuple(order) for order in orders}) > 4
    assert 0.8 <= factors.min() < 0.85 and 1.15 < factors.max() <= 1.2


def test_half_of_the_pictures_are_mirrored(pictures):
    def changed(settings: Augmentation) -> torch.Tensor:
        return augment(many, settings, draw(1000, SIZE, settings, np.random.default_rng(0)))

    many = pictures[5:6].expand(1000, -1, -1, -1)
    mirrored = (changed(Augmentation()) == pictures[5].flip(2)).flatten(1).all(1)
    as_it_was = (changed(Augmentation()) == pictures[5]).flatten(1).all(1)
    assert (mirrored ^ as_it_was).all() and 440 < mirrored.sum() < 560
    assert torch.equal(changed(Augmentation(flip=0.0)), many)
