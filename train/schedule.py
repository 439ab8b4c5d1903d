"""Learning-rate and picture-size schedules as pure functions of the training time."""

import math
from functools import cache

import numpy as np
import torch
from timm.scheduler import create_scheduler_v2

from train.recipe import Recipe


def rate_at_step(recipe: Recipe, epoch: int, step: int, steps_per_epoch: int) -> float:
    """The recipe's learning rate of optimizer step ``step`` (from 0) of ``epoch`` (from 0), set before it is taken.

    The authors evaluate their schedule at a step's end, so that the first rate is above 0 and the last one is 0. Some
    parameters get a multiple of it. Raises ValueError for a schedule that timm refuses.
    """
    if recipe.sched == "onecycle":
        return onecycle(epoch + (step + 1) / steps_per_epoch, recipe.epochs, recipe.lr)
    scheduler = timm_schedule(recipe.sched, recipe.lr, recipe.epochs, recipe.warmup_epochs, steps_per_epoch)
    scheduler.step_update(epoch * steps_per_epoch + step)
    return scheduler.optimizer.param_groups[0]["lr"]


@cache
def timm_schedule(name: str, lr: float, epochs: int, warmup_epochs: int, steps_per_epoch: int):
    """timm's schedule by steps, on an optimizer of its own: the rate then depends on nothing but the step."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        name,
        num_epochs=epochs,
        warmup_epochs=warmup_epochs,
        warmup_lr=0.0,
        decay_rate=1.0,  # poly's power
        step_on_epochs=False,
        updates_per_epoch=steps_per_epoch,
    )
    return scheduler


def onecycle(t: float, epochs: int, lr_max: float) -> float:
    """The learning rate at time ``t``, in epochs (2.5 is the middle of the third): the authors' three straight lines.

    From 0 up to ``lr_max`` at two fifths of the run, down to ``lr_max / 20`` at four fifths, down to 0 at the end. The
    corners lie on whole epochs, as in the authors' CIFAR-10 script (https://github.com/locuslab/convmixer-cifar10), but
    not below five epochs, where two of them could fall together.
    """
    corners = [0, epochs * 2 / 5, epochs * 4 / 5, epochs]
    if epochs >= 5:
        corners = [math.floor(corner) for corner in corners]
    return float(np.interp(t, corners, [0, lr_max, lr_max / 20, 0]))


def image_size_at(epoch: int, image_sizes: tuple[tuple[int, int], ...], full_size: int) -> int:
    """The side in pixels of the training pictures in ``epoch`` (from 0).

    ``image_sizes`` holds (first epoch, size) pairs in rising order; before the first of them it is ``full_size``.
    """
    size = full_size
    for first_epoch, smaller in image_sizes:
        if epoch >= first_epoch:
            size = smaller
    return size
