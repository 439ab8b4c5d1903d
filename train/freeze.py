"""Training the head alone: the features of all pictures are computed once, by the engine that answers, and kept.

Nothing before the head changes, so a picture's features stay the same from epoch to epoch. Of the augmentation that
leaves the mirrored pictures, whose features are computed as well; crops, colours and mixtures would be new pictures.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from convmixer.engine import Engine, open_engine
from convmixer.model import to_arrays
from train.data.batches import Data, Part, part_rng
from train.distributed import World
from train.errors import DataError, TrainingError
from train.loop import Finish
from train.plan import Plan, epoch_order
from train.recipe import Augmentation, Recipe
from train.state import TrainingState
from train.watch import Watch

BATCH = 16  # pictures that the engine gets at once
TELL_EVERY = 60.0  # seconds between two lines about how far it is


def frozen(recipe: Recipe) -> Recipe:
    """The recipe's settings for a head alone, as defaults: its learning rate, mirrored pictures, float32."""
    return replace(
        recipe,
        freeze=True,
        lr=recipe.lr * recipe.head_lr,
        head_lr=1.0,
        augmentation=Augmentation(flip=recipe.augmentation.flip),
        image_sizes=(),
        amp="off",
        memory_format="contiguous",
    )


def check_frozen(recipe: Recipe, data: Data, world: World) -> None:
    """Raises TrainingError for what cannot be had with --freeze."""
    if not recipe.weights:
        raise TrainingError("--freeze trains the head of a trained network; add --weights auto, or a model's name")
    if recipe.augmentation != Augmentation(flip=recipe.augmentation.flip) or recipe.image_sizes:
        raise TrainingError(
            "--freeze computes each picture's features once, as it is and mirrored; of --augmentation leave all but"
            " --augmentation.flip, and --image-sizes, or train without --freeze"
        )
    if world.size > 1:
        raise TrainingError("--freeze trains a head in seconds, in one process; start it without torchrun")
    if data.plain is None:
        raise TrainingError("--freeze reads pictures by index; give a folder, a .tar file or hfds/NAME, or no --freeze")


def freeze(state: TrainingState, recipe: Recipe, data: Data, world: World, watch: Watch) -> Data | None:
    """The data as features, computed with the weights in ``state``, whose network then takes them for its input.

    None where ``watch`` asked to stop. Raises DataError where no training picture can be read.
    """
    engine = open_engine(state.network.config, to_arrays(state.network), str(world.device), precision="float32")
    flips = (False, True) if recipe.augmentation.flip else (False,)
    started = time.monotonic()
    training = features_of(data.plain, engine, flips, watch)
    held_out = training and features_of(data.held_out_batches, engine, (False,), watch)
    if held_out is None:
        return None
    if not len(training[1]):
        raise DataError(f"{data.training_name}: none of its pictures can be read")
    watch.note(
        f"features of {len(training[1]):,} training pictures{', mirrored too,' * (len(flips) > 1)} and"
        f" {len(held_out[1]):,} held-out ones computed once in {time.monotonic() - started:.0f} s"
    )
    for network in {state.network, state.exported}:
        network.forward = network.forward_head
    maps, labels = held_out[0][0].to(world.device), held_out[1].to(world.device)

    def held_out_batches(batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(maps.split(batch_size), labels.split(batch_size), strict=True)

    return replace(data, training=FeatureBatches(*training, recipe, world), held_out_batches=held_out_batches)


def features_of(
    batches: Callable[..., Iterator], engine: Engine, flips: tuple[bool, ...], watch: Watch
) -> tuple[Tensor, Tensor] | None:
    """Float32 features (flips, N, dim, 1, 1) and int64 labels (N,) of normalised pictures; None if asked to stop."""
    features, labels, told = [[] for _ in flips], [], time.monotonic()
    for images, classes in batches(BATCH, watch.skipped):
        if watch.stopping:
            return None
        for flip, rows in zip(flips, features, strict=True):
            pictures = images.flip(3) if flip else images
            maps = engine.run(np.ascontiguousarray(pictures.cpu().numpy()), stages=1)[1][0]
            rows.append(torch.from_numpy(maps).mean((2, 3), keepdim=True))
        labels.append(classes.cpu())
        if time.monotonic() - told > TELL_EVERY:
            told = time.monotonic()
            watch.note(f"features of {sum(map(len, labels)):,} pictures so far")
    if not labels:
        return torch.empty(len(flips), 0, 0, 1, 1), torch.empty(0, dtype=torch.int64)
    return torch.stack([torch.cat(rows) for rows in features]), torch.cat(labels)


class FeatureBatches:
    """Features in the place of pictures, in the order and with the flips that seed, epoch and step decide."""

    def __init__(self, features: Tensor, labels: Tensor, recipe: Recipe, world: World):
        self.recipe, self.features, self.labels = recipe, features.to(world.device), labels.to(world.device)
        self.plan = Plan(len(labels), recipe.batch_size, recipe.micro_batch, recipe.drop_last)

    def parts(self, epoch: int, first_step: int) -> Iterator[Part]:
        """The parts of the epoch in order, from ``first_step`` on."""
        order = torch.from_numpy(epoch_order(self.plan.images, self.recipe.seed, epoch))
        for step in range(first_step, self.plan.steps):
            for number, stretch in enumerate(self.plan.parts(step, 0)):
                chosen = order[stretch]
                flip = part_rng(self.recipe.seed, epoch, step, number).random(len(chosen))
                flipped = torch.from_numpy(flip < self.recipe.augmentation.flip).long()
                yield Part(self.features[flipped, chosen], self.labels[chosen])


class Untouched(Finish):
    """Features need no last steps."""

    def __call__(self, part: Part, epoch: int, step: int, number: int) -> tuple[Tensor, Tensor]:
        return part.images, part.labels
