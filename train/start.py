"""Where a run's weights come from: the model that it starts from, and what that asks of the recipe."""

import json
from dataclasses import replace
from pathlib import Path

from convmixer import zoo
from convmixer.model import to_tensors
from convmixer.weights import Checkpoint
from train.data.batches import Data, MemoryBatches
from train.errors import TrainingError
from train.recipe import Recipe
from train.state import TrainingState

SMALLEST = 64  # pixels of a photograph's side: docs/training.md compares


def start_from(recipe: Recipe, weights: str, in_memory: bool) -> Recipe:
    """The recipe with the weights' own name, network and preprocessing.

    A network of smaller pictures gets SMALLEST pixels, but for CIFAR's pictures (``in_memory``), which have no more.
    Raises ModelError and CheckpointError for weights that cannot be read.
    """
    if weights == "auto":
        name, path = zoo.resolve(weights)
        weights = name if name in zoo.MODELS else str(path)
    start = zoo.load(weights)
    preprocessing = start.preprocessing
    if not in_memory and preprocessing.size < SMALLEST:
        preprocessing = replace(preprocessing, size=SMALLEST)
    return replace(recipe, weights=weights, model=start.config, preprocessing=preprocessing)


def begun_with(folder: str) -> str | None:
    """What "auto" was when the run in ``folder`` began: a better model may have come since. None where no file says."""
    try:
        return json.loads((Path(folder) / "recipe.json").read_bytes()).get("weights")
    except (OSError, ValueError, AttributeError):
        return None


def load_start(state: TrainingState, recipe: Recipe, data: Data) -> tuple[str, str | None]:
    """Takes over the weights that the recipe starts from; a head for other labels stays as it was initialised.

    Gives what to say about it, and a warning where they promise little. Raises TrainingError for another network's.
    """
    start = zoo.load(recipe.weights)
    if replace(start.config, num_classes=recipe.model.num_classes) != recipe.model:
        raise TrainingError(f"{recipe.weights} is a {start.config}; leave the fields of --model as they are")
    kept = [name for name in start.state_dict if start.labels == data.labels or not name.startswith("head.")]
    state.network.load_state_dict(to_tensors({name: start.state_dict[name] for name in kept}), strict=False)
    if state.ema is not None:
        state.ema.module.load_state_dict(state.network.state_dict())
    head = "" if start.labels == data.labels else f", with a new head for {len(data.labels):,} classes"
    warning = None if isinstance(data.training, MemoryBatches) else expectation(start)
    return f"the weights of {recipe.weights}{head}", warning


def expectation(start: Checkpoint) -> str | None:
    """What to expect of a network that learnt from tiny pictures, on photographs; None for the others."""
    if start.preprocessing.size >= SMALLEST:
        return None
    return (
        f"warning: {start.name} knows pictures of {start.preprocessing.size} pixels: on photographs it gives a first"
        " guess, no more (docs/training.md); after `python -m convmixer download convmixer_768_32` finetune starts from"
        " ImageNet's weights"
    )
