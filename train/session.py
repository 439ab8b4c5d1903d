"""One run from its data to its model card: what is read, in which order it happens, and what is written when."""

import dataclasses
import fcntl
import json
import math
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

from convmixer.model import to_arrays
from convmixer.weights import Checkpoint, save_checkpoint, write_atomically
from train.data.batches import Data, open_data
from train.distributed import World
from train.errors import TrainingError
from train.freeze import Untouched, check_frozen, freeze
from train.loop import TOP5_ABOVE, Finish, choose_amp, evaluate, train_epoch
from train.plan import check_batch_norm
from train.recipe import Recipe
from train.report.card import model_card
from train.report.console import Console, write_metrics
from train.report.paths import public_name
from train.report.pictures import draw_confusion, draw_curves
from train.report.summary import summary
from train.report.trackers import open_tracker
from train.schedule import rate_at_step
from train.speed.layout import FORMATS, agree_on_layout, wrap
from train.start import load_start
from train.state import (
    LAST,
    NOTHING_YET,
    check_data,
    check_recipe,
    new_state,
    read_newest,
    save_last,
    settle,
)
from train.watch import Watch

MODEL, BEST = "model.safetensors", "best.safetensors"  # after the last epoch, and after the best one


@contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Makes the run folder and keeps other runs out of it. The lock ends with the process, however it ends.

    Raises TrainingError while another process trains there, and where nothing can be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")  # noqa: SIM115  closed below
    except OSError as error:
        raise TrainingError(f"the run folder cannot be written: {error}; give another --out") from error
    with lock as file:
        try:
            # A lock of the process alone: one by flock would live on in its loader's workers for some seconds.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise TrainingError(f"another process trains in {folder}; wait for it, or give another --out") from error
        except OSError:
            pass  # a file system without locks
        for left_over in folder.glob(".*.tmp"):  # of a process that was killed while it wrote
            left_over.unlink(missing_ok=True)
        yield


def git_commit() -> str:
    """The commit of this code, with "-dirty" behind it where tracked files were changed; "unknown" outside git."""
    root = Path(__file__).resolve().parents[1]
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def resolve(recipe: Recipe, amp: str, compiled: bool) -> dict:
    """The recipe as JSON values, with what "auto" stood for; a resumed run must have the same."""
    return json.loads(json.dumps(dataclasses.asdict(recipe))) | {"amp": amp, "compiled": compiled}


def train(run, world: World) -> int:
    """Runs the recipe to its end and gives the exit code: 0, or 128 and the number of the signal that stopped it.

    ``run`` is the command line (train/run.py). Raises TrainingError and DataError, each with one line for the user.
    """
    recipe = run.recipe
    if run.threads:
        torch.set_num_threads(run.threads)
    out = run.out or Path("runs") / recipe.name
    if not run.resume and any((out / name).exists() for name in (LAST, "next.pt", "previous.pt")):
        raise TrainingError(f"{out} already holds a run; add --resume to go on with it, or --out for another one")
    data = open_data(run, recipe, world)
    check_batch_norm(data.training.plan, recipe)
    if recipe.freeze:
        check_frozen(recipe, data, world)
    recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, num_classes=len(data.labels)))
    with claim(out) if world.main else nullcontext():
        session = Session(run, recipe, data, out, world)
        with session.watch.listening():
            return session.go()


class Session:
    """A run under way: the state, and where its results go."""

    def __init__(self, run, recipe: Recipe, data: Data, out: Path, world: World):
        self.run, self.recipe, self.data, self.out, self.world = run, recipe, data, out, world
        self.console = Console(recipe.epochs) if world.main else None
        self.watch, self.warning = Watch(run.save_every, self.note), None
        amp = choose_amp(recipe.amp, world.device)
        content, used, notes = read_newest(out)
        stored = content and content["recipe"]
        layout = agree_on_layout(recipe, run.compile, amp, world, stored)
        self.recipe = recipe = dataclasses.replace(recipe, memory_format=layout.memory_format)
        self.resolved, self.layout = resolve(recipe, amp, layout.compiled), layout
        self.state = new_state(recipe, world.device, amp, FORMATS[layout.memory_format])
        self.state.commit, self.state.data = git_commit(), data.facts()
        self.start = f"random weights, seed {recipe.seed}"
        if content is not None:
            check_data(out, content["data"], data.facts())
            check_recipe(out, stored, self.resolved)
            self.state.load(content)
            middle = f" and step {self.state.step}" if self.state.step else ""
            self.start = f"going on after epoch {self.state.epoch} of {recipe.epochs}{middle}"
        elif recipe.weights:
            self.start, self.warning = load_start(self.state, recipe, data)
        kind = Untouched if recipe.freeze else Finish
        self.forward = self.state.network if recipe.freeze else wrap(self.state, recipe, world, layout)
        self.finish = kind(recipe, FORMATS[layout.memory_format], world.device)
        self.bar_from = (0, 0.0)  # (step, time) from which the bar measures its speed; in each epoch anew
        self.board = open_tracker(run.log, out, self.resolved) if world.main else None
        for note in notes:
            self.note(f"{note}; going on from the one before it")
        if content is not None and world.main:  # the others have read it: DistributedDataParallel met them
            settle(out, used)

    def note(self, text: str) -> None:
        if self.console:
            self.console.note(text)

    def go(self) -> int:
        state, recipe, world = self.state, self.recipe, self.world
        if world.main:
            content = json.dumps(self.resolved, indent=2).encode() + b"\n"
            write_atomically(self.out / "recipe.json", lambda file: file.write(content))
            how = f"{self.resolved['amp']} on {world.device}, {self.layout}"
            if recipe.freeze:
                mirrored = " and mirrored" if recipe.augmentation.flip else ""
                how = f"the head alone, on features of the pictures as they are{mirrored}"
            head = f", of the head {recipe.lr * recipe.head_lr:g}," if recipe.head_lr != 1 else ""
            rate = f"peak learning rate {recipe.lr:g}{head} for the whole batch; {how}"
            epochs = f"{recipe.epochs:,} epoch{'s' * (recipe.epochs > 1)}, {self.data.training.plan.describe()}"
            self.note(summary(self.data, self.start, [epochs, rate]))
            if self.warning:
                self.note(self.warning)
        if recipe.freeze:
            data = freeze(state, recipe, self.data, world, self.watch)
            if data is None:
                return self.leave()
            self.data = data
        if world.main:
            if state.history:
                self.write_epoch()
            self.console.header()
        while state.epoch < recipe.epochs:
            finished = train_epoch(
                state,
                self.forward,
                self.data.training.parts,
                self.data.training.plan,
                self.finish,
                world,
                self.resolved["amp"],
                self.watch,
                self.save,
                self.show_step,
            )
            if not finished or not self.finish_epoch():
                return self.leave()
        if world.main:
            self.write_end()
        return 0

    def finish_epoch(self) -> bool:
        """Evaluates, adds the epoch's row and writes it down; False where a signal came before the evaluation ended."""
        state, plan, sums = self.state, self.data.training.plan, self.state.running
        held_out = self.watch.read(self.data.held_out_batches(min(self.recipe.batch_size, self.recipe.micro_batch)))
        start = time.perf_counter()
        classes, amp = self.recipe.model.num_classes, self.resolved["amp"]
        # Of what cuDNN computes slowly in one format, a GPU is given none; a CPU likes channels_last here.
        on_gpu = self.world.device.type != "cpu"
        layout = self.finish.memory_format if on_gpu else torch.channels_last
        counts = evaluate(state.exported, held_out, classes, amp, self.world, lambda: self.watch.stopping, layout)
        if self.world.largest(int(self.watch.stopping))[0]:
            self.save()
            return False
        seen, images = max(sums["seen"], 1), max(counts["images"], 1)
        row = {
            "epoch": state.epoch + 1,
            "lr": rate_at_step(self.recipe, state.epoch, plan.steps - 1, plan.steps),
            "train_loss": sums["loss"] / seen,
            "train_top1": math.nan if self.finish.mixup else 100 * sums["correct"] / seen,
            "held_out_loss": counts["loss"],
            "held_out_top1": 100 * counts["top1"] / images,
            "held_out_top5": 100 * counts["top5"] / images if classes > TOP5_ABOVE else math.nan,
            "images_per_s": seen / max(sums["seconds"], 1e-9),
            "seconds": sums["seconds"] + time.perf_counter() - start,
            "skipped": sums["skipped"],
        }
        state.history.append(row)
        state.confusion = counts["confusion"]
        state.epoch, state.step, state.running = state.epoch + 1, 0, NOTHING_YET.copy()
        self.save()  # comes first: whatever is lost after it is written again by the resumed run
        if self.world.main:
            self.write_epoch()
            recent = [row["seconds"] for row in state.history[-3:]]
            self.console.row(row, (self.recipe.epochs - state.epoch) * sum(recent) / len(recent))
        return True

    def save(self) -> None:
        state = self.state
        if not state.is_finite():  # of a step whose loss still was
            raise TrainingError(
                f"the weights are not finite after {state.epoch} epochs and {state.step} steps; the last good"
                " checkpoint is kept; try a lower --lr or --clip-grad 1"
            )
        if self.world.main:
            save_last(self.out, self.state.content(self.resolved))
        self.watch.saved()

    def leave(self) -> int:
        """After a signal: the state was saved."""
        state, received = self.state, self.watch.received
        name = received.name if received else "another process's signal"
        self.note(f"stopped by {name} in epoch {state.epoch + 1} after step {state.step}; --resume goes on from there")
        return 128 + (received or 15)

    def show_step(self, step: int, loss: torch.Tensor) -> None:
        if self.console:
            now, steps = time.perf_counter(), self.data.training.plan.steps
            if step < self.bar_from[0] or self.bar_from[0] == 0:
                self.bar_from = (step, now)
            done, seconds = step - self.bar_from[0], now - self.bar_from[1]
            rate = done * self.recipe.batch_size / seconds if done else math.nan
            self.console.step(self.state.epoch + 1, step, steps, loss, rate)

    def checkpoint(self, best: bool = False) -> Checkpoint:
        """The exported weights, how they were made, and what they measured; ``best``: they were the best so far."""
        recipe, config, state = self.recipe, self.recipe.model, self.state
        row = state.history[-1]
        return Checkpoint(
            name=f"convmixer_{config.dim}_{config.depth}_{self.data.short_name}",
            config=config,
            state_dict=to_arrays(state.exported),
            labels=self.data.labels,
            preprocessing=recipe.preprocessing,
            training={
                "recipe": self.resolved | {"weights": public_name(recipe.weights)},
                "data": self.data.training_name,
                "epochs": state.epoch,
                "finished": state.epoch == recipe.epochs,
                **({"best": True} if best else {}),
                "seed": recipe.seed,
                "commit": state.commit,
                "torch": torch.__version__,
                "device": device_name(self.world.device),
                "processes": self.world.size,
                "command": self.run.command,
                "seconds": round(sum(row["seconds"] for row in state.history), 1),
            },
            accuracy={
                "top1": row["held_out_top1"],
                **({"top5": row["held_out_top5"]} if len(self.data.labels) > TOP5_ABOVE else {}),
                "data": self.data.held_out_name,
                "images": int(state.confusion.sum()),
                "amp": self.resolved["amp"],  # the precision it was measured in
            },
        )

    def write_epoch(self) -> None:
        """What follows from the last finished epoch; writing it a second time changes nothing."""
        state = self.state
        if not state.step and state.history[-1]["held_out_top1"] >= max(r["held_out_top1"] for r in state.history):
            save_checkpoint(self.out / BEST, self.checkpoint(best=True))
        write_metrics(self.out / "metrics.csv", state.history)
        if not state.step:
            save_checkpoint(self.out / MODEL, self.checkpoint())
        if self.board:
            self.board.row(state.history[-1])

    def write_end(self) -> None:
        """The pictures and the model card of a finished run."""
        state, checkpoint = self.state, self.checkpoint()
        draw_curves(self.out / "curves.png", state.history, checkpoint.name)
        draw_confusion(self.out / "confusion.png", state.confusion.numpy(), self.data.labels, checkpoint.name)
        card = model_card(checkpoint, state.history, state.confusion.numpy())
        write_atomically(self.out / "README.md", lambda file: file.write(card.encode()))
        if self.board:
            self.board.close()
        self.note(f"{self.out / MODEL}: {state.history[-1]['held_out_top1']:.2f} % on {self.data.held_out_name}")


def device_name(device: torch.device) -> str:
    """The device as people know it: the GPU's name, or the CPU with its number of cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {os.cpu_count()} cores"
