"""Trains a ConvMixer from a recipe.

    python train/run.py --recipe cifar10 --data DIR [--any.field value] [--resume]

The run folder (``--out``, by default runs/RECIPE) holds recipe.json (the resolved recipe), metrics.csv (a row an
epoch), last.pt and best.pt (all that `--resume` needs, after the last epoch and after the best one on the held-out
pictures) and model.safetensors (the weights after the last finished epoch, which every door of this project opens).
"""

import sys
from pathlib import Path

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, so that `train` and `convmixer` are found
    from train.memory import keep_memory

    keep_memory()  # before torch allocates anything

import argparse
import dataclasses
import json
import os
import pickle
import subprocess
import time
from typing import Annotated

import torch
import tyro

from convmixer.classifier import choose_device
from convmixer.preprocessing import CIFAR10
from convmixer.weights import Checkpoint, save_checkpoint, write_atomically
from train import data as datasets
from train import loop
from train.data import LabelledImages
from train.recipes import RECIPES, Recipe

COLUMNS = ("epoch", "lr", "train_loss", "train_top1", "held_out_loss", "held_out_top1", "images_per_s", "seconds")


@dataclasses.dataclass(frozen=True)
class Run:
    """Trains a ConvMixer from a recipe; every field of the recipe can be overridden."""

    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    data: Path  # folder that holds cifar-10-batches-bin or cifar-10-batches-py
    out: Path | None = None  # run folder; runs/RECIPE by default
    resume: bool = False  # go on from the run folder's last checkpoint; starts afresh where there is none
    download: bool = False  # fetch the data with torchvision where the folder does not hold it
    device: str | None = None  # cpu, cuda, cuda:1, ...; the GPU where there is one
    workers: int = max(1, min(4, (os.cpu_count() or 1) // 2))  # processes that augment pictures; 0: in this one
    threads: int | None = None  # of the CPU's arithmetic; PyTorch's default otherwise


def parse(argv: list[str]) -> Run:
    """The command line; ``--recipe`` gives the other fields' defaults. Raises TrainingError for an unknown one."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe", default="cifar10")
    chosen, rest = first.parse_known_args(argv)
    if chosen.recipe not in RECIPES:
        raise loop.TrainingError(f"there is no recipe {chosen.recipe!r}; the recipes are {', '.join(RECIPES)}")
    prog = f"train/run.py --recipe {chosen.recipe}"
    return tyro.cli(Run, prog=prog, args=rest, default=Run(recipe=RECIPES[chosen.recipe], data=tyro.MISSING))


def resolve(recipe: Recipe, device: torch.device) -> dict:
    """The recipe as JSON values, with what "auto" stood for; a resumed run must have the same."""
    resolved = json.loads(json.dumps(dataclasses.asdict(recipe)))
    return resolved | {"amp": loop.choose_amp(recipe.amp, device)}


def git_commit() -> str:
    """The commit of this code, with "-dirty" behind it where tracked files were changed; "unknown" outside git."""
    root = Path(__file__).resolve().parents[1]
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def read_last(path: Path, resolved: dict) -> dict | None:
    """The content of the last checkpoint, none where there is none. Raises TrainingError when it is another run's."""
    if not path.exists():
        return None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        stored = content["recipe"]
    except (OSError, EOFError, RuntimeError, KeyError, ValueError, pickle.UnpicklingError) as error:
        raise loop.TrainingError(
            f"{path} is not a whole checkpoint of this command; delete it to start afresh"
        ) from error
    different = [
        f"{name} is {resolved.get(name)!r} and was {stored.get(name)!r}"
        for name in sorted(resolved.keys() | stored.keys())
        if resolved.get(name) != stored.get(name)
    ]
    if different:
        raise loop.TrainingError(f"cannot resume {path} with another recipe: {'; '.join(different)}")
    return content


def write_metrics(path: Path, history: list[dict]) -> None:
    """The run's CSV: a header and a row an epoch, rewritten whole so that a resumed run never repeats a row."""
    lines = [",".join(COLUMNS), *(",".join(f"{row[name]:.6g}" for name in COLUMNS) for row in history)]
    write_atomically(path, lambda file: file.write(("\n".join(lines) + "\n").encode()))


def export(path: Path, state: loop.TrainingState, run: Run, resolved: dict, trained_on: str, held_out: LabelledImages):
    """Writes model.safetensors: the weights, and how they were made and what they measured."""
    config, row = run.recipe.model, state.history[-1]
    finished = state.epoch == run.recipe.epochs
    checkpoint = Checkpoint(
        name=f"convmixer_{config.dim}_{config.depth}_cifar10",
        config=config,
        state_dict={name: tensor.detach().cpu().contiguous() for name, tensor in state.exported.state_dict().items()},
        labels=datasets.CIFAR10_CLASSES,
        preprocessing=CIFAR10,
        training={
            "recipe": resolved,
            "data": trained_on,
            "epochs": state.epoch,
            "finished": finished,
            "seed": run.recipe.seed,
            "commit": state.commit,
            "torch": torch.__version__,
            "seconds": round(sum(row["seconds"] for row in state.history), 1),
        },
        accuracy={
            "top1": row["held_out_top1"],
            "top5": row["held_out_top5"],
            "data": held_out.name,
            "images": len(held_out),
            "amp": resolved["amp"],  # the precision it was measured in
        },
    )
    save_checkpoint(path, checkpoint)


class Console:
    """A calm row an epoch; on a terminal also a line that counts the steps of the epoch under way."""

    def __init__(self):
        self.terminal = sys.stderr.isatty()
        print("epoch      lr   loss  train %  held-out %   images/s  time left", flush=True)

    def step(self, step: int, steps: int) -> None:
        if self.terminal:
            print(f"\r  step {step}/{steps}", end="\r" if step == steps else "", file=sys.stderr, flush=True)

    def row(self, row: dict, epochs: int) -> None:
        left = (epochs - row["epoch"]) * row["seconds"]
        print(
            f"{row['epoch']:>3}/{epochs:<3} {row['lr']:.5f} {row['train_loss']:6.3f} {row['train_top1']:8.2f}"
            f" {row['held_out_top1']:11.2f} {row['images_per_s']:10.0f}  {left / 60:5.0f} min",
            flush=True,
        )


def train(run: Run) -> None:
    """Runs the recipe to its end. Raises TrainingError and DataError, each with one line for the user."""
    recipe = run.recipe
    device = choose_device(run.device)
    if run.threads:
        torch.set_num_threads(run.threads)
    resolved = resolve(recipe, device)
    amp = resolved["amp"]
    out = run.out or Path("runs") / recipe.name
    last = out / "last.pt"
    if last.exists() and not run.resume:
        raise loop.TrainingError(f"{out} already holds a run; add --resume to go on with it, or --out for another one")
    training_set = datasets.load_cifar10(run.data, train=True, download=run.download)
    test_set = datasets.load_cifar10(run.data, train=False) if recipe.split == "full" else None
    training_set, held_out = datasets.split_cifar10(training_set, recipe.split, test_set)
    content = read_last(last, resolved)

    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "recipe.json", lambda file: file.write(json.dumps(resolved, indent=2).encode() + b"\n"))
    state = loop.new_state(recipe, device, amp)
    state.commit = git_commit()
    if content is not None:
        state.load(content)
        print(f"going on after epoch {state.epoch} of {recipe.epochs}", flush=True)
    batches, sampler = datasets.training_batches(training_set, recipe, run.workers)
    console = Console()
    for epoch in range(state.epoch, recipe.epochs):
        start = time.perf_counter()
        sampler.epoch = epoch
        trained = loop.train_epoch(state, batches, len(batches), recipe, CIFAR10, amp, console.step)
        uint8 = loop.uint8_batches(held_out, recipe.batch_size)
        normalised = ((datasets.normalise(images.to(device), CIFAR10), labels) for images, labels in uint8)
        measured = loop.evaluate(state.exported, normalised, recipe.model.num_classes, amp)
        state.epoch = epoch + 1
        state.history.append(
            {
                "epoch": state.epoch,
                "lr": trained["lr"],
                "train_loss": trained["loss"],
                "train_top1": trained["top1"],
                "held_out_loss": measured["loss"],
                "held_out_top1": 100 * measured["top1"] / measured["images"],
                "held_out_top5": 100 * measured["top5"] / measured["images"],
                "images_per_s": trained["images_per_s"],
                "seconds": time.perf_counter() - start,
            }
        )
        # last.pt comes first: whatever is lost after it is written again by the resumed run.
        state.save(last, resolved)
        row = state.history[-1]
        if row["held_out_top1"] >= max(row["held_out_top1"] for row in state.history):
            state.save(out / "best.pt", resolved)
        write_metrics(out / "metrics.csv", state.history)
        export(out / "model.safetensors", state, run, resolved, training_set.name, held_out)
        console.row(row, recipe.epochs)
    print(f"{out / 'model.safetensors'}: {state.history[-1]['held_out_top1']:.2f} % on {held_out.name}")


def main() -> int:
    try:
        train(parse(sys.argv[1:]))
    except (loop.TrainingError, datasets.DataError, ValueError) as error:
        print(f"train/run.py: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, a folder that may not be written
        print(f"train/run.py: {error}; the last checkpoint is whole, --resume goes on from it", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ntrain/run.py: stopped; --resume goes on from the last finished epoch", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
