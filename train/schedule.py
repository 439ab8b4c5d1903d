"""Learning-rate and picture-size schedules as pure functions of the training time."""

import numpy as np


def onecycle(t: float, epochs: int, lr_max: float) -> float:
    """The learning rate at time ``t``, in epochs (2.5 is the middle of the third): the authors' three straight lines.

    From 0 up to ``lr_max`` at two fifths of the run, down to ``lr_max / 20`` at four fifths, down to 0 at the end. The
    corners lie on whole epochs, as in the authors' CIFAR-10 script (https://github.com/locuslab/convmixer-cifar10).
    """
    corners = [0, epochs * 2 // 5, epochs * 4 // 5, epochs]
    return float(np.interp(t, corners, [0, lr_max, lr_max / 20, 0]))


def onecycle_at_step(epoch: int, step: int, steps_per_epoch: int, epochs: int, lr_max: float) -> float:
    """The learning rate of optimizer step ``step`` (from 0) of ``epoch`` (from 0), set before the step is taken.

    The authors evaluate the schedule at the end of each step, so the first rate is above 0 and the very last one is 0.
    """
    return onecycle(epoch + (step + 1) / steps_per_epoch, epochs, lr_max)


def image_size_at(epoch: int, image_sizes: tuple[tuple[int, int], ...], full_size: int) -> int:
    """The side in pixels of the training pictures in ``epoch`` (from 0).

    ``image_sizes`` holds (first epoch, size) pairs in rising order; before the first of them it is ``full_size``.
    """
    size = full_size
    for first_epoch, smaller in image_sizes:
        if epoch >= first_epoch:
            size = smaller
    return size
