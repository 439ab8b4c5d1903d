"""Which pictures each optimizer step sees, on which process and in which part: pure arithmetic."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from train.errors import TrainingError
from train.recipe import Recipe


@dataclass(frozen=True)
class Plan:
    """An epoch's steps. The pictures of a step do not depend on the number of processes, only their distribution does.

    A step takes ``batch_size`` positions of the epoch's order; each process gets an equal stretch of them, and puts it
    through the network in parts of at most ``micro_batch``, whose gradients add up. Raises TrainingError when the batch
    has fewer pictures than there are processes.
    """

    images: int  # in an epoch
    batch_size: int
    micro_batch: int
    drop_last: bool
    processes: int = 1

    def __post_init__(self):
        if self.batch_size < self.processes:
            raise TrainingError(
                f"a batch of {self.batch_size} cannot be shared by {self.processes} processes; raise --batch-size or"
                " start fewer"
            )
        if not self.steps:
            raise TrainingError(
                f"{self.images} training pictures do not fill one batch of {self.batch_size}, and drop_last leaves out"
                " what is less; lower --batch-size or add --no-drop-last"
            )

    @property
    def steps(self) -> int:
        whole, rest = divmod(self.images, self.batch_size)
        return whole + (not self.drop_last and rest >= self.processes)  # every process must have a picture

    def parts(self, step: int, rank: int) -> list[slice]:
        """The stretches of the epoch's order that process ``rank`` puts through the network in ``step``."""
        start = step * self.batch_size
        size = min(self.batch_size, self.images - start)
        smallest, largest = size // self.processes, -(-size // self.processes)
        count = min(-(-largest // self.micro_batch), smallest)  # the same for all, at least a picture each
        first, last = (start + size * r // self.processes for r in (rank, rank + 1))
        edges = [first + (last - first) * i // count for i in range(count + 1)]
        return [slice(a, b) for a, b in pairwise(edges)]

    def size(self, step: int) -> int:
        """The number of pictures in ``step``, over all processes."""
        return min(self.batch_size, self.images - step * self.batch_size)

    def describe(self) -> str:
        """One line for the log: how the batch comes about."""
        parts = self.parts(0, 0)
        largest = max(part.stop - part.start for part in parts)
        return (
            f"{self.images:,} training pictures, {self.steps:,} steps an epoch of {self.size(0)} ="
            f" {self.processes} process{'es' * (self.processes > 1)} x {len(parts)} part{'s' * (len(parts) > 1)}"
            f" of {largest}"
        )


def check_batch_norm(plan: Plan, recipe: Recipe) -> None:
    """Raises TrainingError where batch norm would get one value a channel: a lone picture of one position."""
    sides = [recipe.preprocessing.size, *(side for _, side in recipe.image_sizes)]
    steps, ranks = {0, plan.steps - 1}, range(plan.processes)
    parts = [part for step in steps for rank in ranks for part in plan.parts(step, rank)]
    if min(sides) // recipe.model.patch_size == 1 and min(part.stop - part.start for part in parts) == 1:
        raise TrainingError(
            f"a part of one picture, whose map has one position, is too little for batch norm: of {plan.images:,}"
            f" pictures in batches of {plan.batch_size} one is left; add --drop-last, or change --batch-size"
        )


def epoch_order(images: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch's pictures: a permutation that (seed, epoch) alone decides."""
    return np.random.default_rng((seed, epoch)).permutation(images)
