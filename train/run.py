"""Trains a ConvMixer from a recipe.

    python train/run.py --recipe cifar10 --data DIR [--any.field value] [--resume]
    torchrun --nproc-per-node 8 train/run.py --recipe imagenet_1536_20 --data DIR

The run folder (``--out``, by default runs/RECIPE) holds recipe.json (the resolved recipe), metrics.csv (a row an
epoch), last.pt and the checkpoint before it, model.safetensors (the weights after the last finished epoch, which every
door of this project opens), best.safetensors (the same after the best epoch on the held-out pictures), and at the end
curves.png, confusion.png and README.md, a model card.
"""

import sys
from pathlib import Path

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, so that `train` and `convmixer` are found
    from train.speed.memory import keep_memory

    keep_memory()  # before torch allocates anything

import argparse
import dataclasses
import os
from typing import Annotated

import tyro

from convmixer.download import DownloadError
from train.data.cifar import find_layout
from train.distributed import join
from train.errors import HELP, TrainingError, end_with_reader
from train.freeze import frozen
from train.ranges import COUNT, NOT_NEGATIVE, Range, check_ranges, ranged
from train.recipe import Recipe
from train.recipes import RECIPES
from train.report.paths import public_command
from train.report.trackers import Log
from train.session import train
from train.speed.layout import Compile
from train.start import begun_with, start_from
from train.watch import Stuck


@dataclasses.dataclass(frozen=True)
class Run:
    """Trains a ConvMixer from a recipe; every field of the recipe can be overridden."""

    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    data: str  # folder of CIFAR, folder with a subfolder of pictures a class, .tar file, wds/FOLDER, or hfds/NAME
    out: Path | None = None  # run folder; runs/RECIPE by default
    resume: bool = False  # go on from the run folder's last checkpoint; starts afresh where there is none
    train_split: str = "train"  # of data that comes in splits
    val_split: str = "validation"  # the same, to measure on
    class_names: Path | None = None  # text file, a class a line in the order of the labels; for data without names
    samples: int | None = ranged(COUNT, None)  # training pictures of WebDataset shards without an _info.json
    download: bool = False  # fetch CIFAR-10 with torchvision where the folder does not hold it
    device: str | None = None  # cpu, cuda, cuda:1, ...; the GPU where there is one
    # that read pictures from disk, a GPU
    workers: int = ranged(Range(0, 1024), max(1, min(8, (os.cpu_count() or 1) - 1)))
    threads: int | None = ranged(Range(1, 4096), None)  # of the CPU's arithmetic; PyTorch's default otherwise
    compile: Compile = "auto"  # torch.compile the network; auto: on GPUs where that is faster, see docs/gpu.md
    ahead: int | None = ranged(COUNT, None)  # CIFAR's parts that are augmented together; the result is the same
    save_every: float = ranged(NOT_NEGATIVE, 10.0)  # minutes between checkpoints within an epoch
    log: Log = "none"  # where the rows also go, each through its own package; wandb sends them over the network
    command: Annotated[str, tyro.conf.Suppress] = ""  # as it was typed, without folders; for the model card

    def __post_init__(self):
        check_ranges(self)


def parse(argv: list[str]) -> Run:
    """The command line. ``--recipe`` and ``--weights`` give the other fields' defaults.

    Raises TrainingError for an unknown recipe, ModelError and CheckpointError for weights that cannot be read.
    """
    if HELP & set(argv):
        end_with_reader()
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe", default="cifar10")
    chosen, rest = first.parse_known_args(argv)
    if chosen.recipe not in RECIPES:
        raise TrainingError(f"there is no recipe {chosen.recipe!r}; the recipes are {', '.join(RECIPES)}")
    recipe = RECIPES[chosen.recipe]
    first.add_argument("--weights", default=recipe.weights)
    first.add_argument("--freeze", action="store_true")
    first.add_argument("--data", default="")
    first.add_argument("--out", default=f"runs/{recipe.name}")
    first.add_argument("--resume", action="store_true")
    given = first.parse_known_args(argv)[0]
    if given.resume and given.weights == "auto":
        given.weights = begun_with(given.out) or "auto"
    if given.weights and not HELP & set(argv):
        recipe = start_from(recipe, given.weights, find_layout(given.data) or "--download" in argv)
    if given.freeze:
        recipe = frozen(recipe)
    default = Run(recipe=recipe, data=tyro.MISSING, command=public_command(argv))
    return tyro.cli(Run, prog=f"train/run.py --recipe {chosen.recipe}", args=rest, default=default)


def main() -> int:
    rank = int(os.environ.get("RANK", 0))

    def fail(message: object, code: int) -> int:
        if rank == 0:  # the others would say the same
            print(f"train/run.py: {message}", file=sys.stderr, flush=True)
        return code

    try:
        run = parse(sys.argv[1:])
        if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):  # torchrun starts the processes again
            run = dataclasses.replace(run, resume=True)
        with join(run.device) as world:
            return train(run, world)
    except (TrainingError, DownloadError, ValueError) as error:
        return fail(error, 2)
    except OSError as error:  # a full disk, a folder that may not be written
        return fail(f"{error}; the last checkpoint is whole, --resume goes on from it", 1)
    except RuntimeError as error:
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            raise
        reason = str(error).strip().splitlines()[0]  # most often another process died, which torchrun then says
        print(f"train/run.py: process {rank} stops: {reason}", file=sys.stderr, flush=True)
        return 1
    except Stuck as error:
        print(f"train/run.py: {error} --resume goes on from the last checkpoint", file=sys.stderr, flush=True)
        return error.code
    except KeyboardInterrupt:
        return fail("stopped at once; --resume goes on from the last checkpoint", 130)


if __name__ == "__main__":
    sys.exit(main())
