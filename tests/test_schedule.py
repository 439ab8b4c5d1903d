"""The schedules, as pure functions."""

from dataclasses import replace

import pytest

from train.recipes import RECIPES
from train.schedule import image_size_at, onecycle, onecycle_at_step, rate_at_step

# The rate that the authors' script printed after each epoch of its 25-epoch run, peak 0.05, 98 steps an epoch:
# https://github.com/locuslab/convmixer-cifar10
# fmt: off
PUBLISHED = (
    0.005, 0.01, 0.015, 0.02, 0.025, 0.03, 0.035, 0.04, 0.045, 0.05, 0.04525, 0.0405, 0.03575,
    0.031, 0.02625, 0.0215, 0.01675, 0.012, 0.00725, 0.0025, 0.002, 0.0015, 0.001, 0.0005, 0.0,
)
# fmt: on


def test_the_published_learning_rates_of_epochs_0_to_24():
    rates = [onecycle_at_step(epoch, 97, steps_per_epoch=98, epochs=25, lr_max=0.05) for epoch in range(25)]
    assert [round(rate, 6) for rate in rates] == list(PUBLISHED)


def test_the_rate_moves_at_every_step():
    rates = [onecycle_at_step(epoch, step, 4, epochs=5, lr_max=1.0) for epoch in range(5) for step in range(4)]
    assert rates[0] == pytest.approx(1 / 8)  # above 0: the first step counts
    assert rates.index(max(rates)) == 7
    assert max(rates) == 1.0
    assert rates[15] == pytest.approx(1 / 20)
    assert rates[-1] == 0.0
    assert len(set(rates)) == len(rates)


def test_the_corners_lie_on_whole_epochs():
    assert onecycle(2, epochs=7, lr_max=1.0) == 1.0  # 7 * 2 // 5
    assert onecycle(5, epochs=7, lr_max=1.0) == pytest.approx(1 / 20)


@pytest.mark.parametrize("epochs", range(1, 11))
def test_any_run_comes_near_its_peak(epochs):
    """``--epochs 1``, too, where whole epochs would leave no time for the way up."""
    rates = [onecycle_at_step(epoch, step, 20, epochs, lr_max=1.0) for epoch in range(epochs) for step in range(20)]
    assert max(rates) == 1.0
    assert 0 < rates[0] < 0.2
    assert rates[-1] == 0.0


def test_image_sizes():
    sizes = ((0, 16), (8, 24), (14, 32))
    assert [image_size_at(epoch, sizes, 32) for epoch in (0, 7, 8, 13, 14, 99)] == [16, 16, 24, 24, 32, 32]
    assert image_size_at(3, (), 32) == 32
    assert image_size_at(0, ((5, 16),), 32) == 32


@pytest.mark.parametrize(
    ("sched", "warmup", "rates"),
    [
        ("cosine", 0, {0: 1.0, 10: 0.5, 15: (1 - 2**-0.5) / 2}),
        ("poly", 0, {0: 1.0, 5: 0.75, 10: 0.5, 19: 0.05}),
        ("constant", 2, {0: 0.0, 1: 0.25, 2: 0.5, 4: 1.0, 19: 1.0}),
        ("wsd", 1, {0: 0.0, 1: 0.5, 2: 1.0, 15: 1.0, 18: 1 - 0.5**0.5}),
        ("onecycle", 0, {7: 1.0, 15: 0.05, 19: 0.0}),
    ],
)
def test_timms_schedules_depend_on_the_step_alone(sched, warmup, rates):
    """Ten epochs of two steps; asked for out of order, as a resumed run does."""
    recipe = replace(RECIPES["cifar10"], sched=sched, warmup_epochs=warmup, epochs=10, lr=1.0)
    for step, rate in reversed(rates.items()):
        assert rate_at_step(recipe, step // 2, step % 2, 2) == pytest.approx(rate), step
