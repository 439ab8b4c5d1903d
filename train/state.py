"""Everything that changes during a run, and its checkpoints, which survive a kill at any moment."""

import pickle
import struct
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import torch
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import Tensor

from convmixer.model import ConvMixer, build
from convmixer.weights import write_atomically
from train.errors import TrainingError
from train.recipe import Recipe
from train.speed.channel_major import use_channel_major
from train.speed.depthwise import use_fast_depthwise
from train.speed.gradients import keep_gradients_channels_last

NEXT, LAST, PREVIOUS = "next.pt", "last.pt", "previous.pt"  # next.pt: only in the midst of a save
NOTHING_YET = {"loss": 0.0, "correct": 0, "seen": 0, "skipped": 0, "seconds": 0.0}


@dataclass
class TrainingState:
    """All that changes during a run; random numbers are not among it, since each step makes its own from the seed.

    The same on all processes. ``running`` holds the sums over the pictures of the epoch under way.
    """

    network: ConvMixer
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: ModelEmaV3 | None
    epoch: int = 0  # finished epochs
    step: int = 0  # finished optimizer steps of the epoch under way
    running: dict = field(default_factory=NOTHING_YET.copy)
    history: list[dict] = field(default_factory=list)  # one row an epoch, as in metrics.csv
    confusion: Tensor | None = None  # of the last evaluation: int64, rows the true class, columns the answer
    commit: str = "unknown"  # of the code that started the run
    data: dict = field(default_factory=dict)  # labels and counts, as `Data.facts` gives them

    @property
    def exported(self) -> ConvMixer:
        """The network that is evaluated and exported: the moving average where the recipe has one."""
        return self.network if self.ema is None else self.ema.module

    def is_finite(self) -> bool:
        """Whether all weights, their moving average and the optimizer's moments are finite."""
        tensors = [*self.network.state_dict().values()]
        if self.ema is not None:
            tensors += self.ema.module.state_dict().values()
        for moments in self.optimizer.state.values():
            tensors += [value for value in moments.values() if isinstance(value, Tensor)]
        return bool(torch.stack([tensor.isfinite().all().cpu() for tensor in tensors]).all())

    def content(self, resolved: dict) -> dict:
        """What a checkpoint holds: tensors and JSON values."""
        return {
            "recipe": resolved,
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": self.ema and self.ema.module.state_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "running": self.running,
            "history": self.history,
            "confusion": self.confusion,
            "commit": self.commit,
            "data": self.data,
        }

    def load(self, content: dict) -> None:
        """Takes over what `content` gave."""
        self.network.load_state_dict(content["network"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.scaler.load_state_dict(content["scaler"])
        if self.ema is not None:
            self.ema.module.load_state_dict(content["ema"])
        for name in ("epoch", "step", "running", "history", "confusion", "commit"):
            setattr(self, name, content[name])


def parameter_groups(network: ConvMixer, recipe: Recipe) -> list[dict]:
    """The optimizer's groups: by weight decay, and by ``lr_scale``, the multiple of the schedule's learning rate.

    The CIFAR-10 script decays every parameter; timm, which trained the ImageNet models, leaves out biases and norms.
    """
    groups: dict[tuple, list] = {}
    for name, parameter in network.named_parameters():
        options = {
            "weight_decay": recipe.weight_decay if recipe.decay_all or parameter.ndim > 1 else 0.0,
            "lr_scale": recipe.head_lr if name.startswith("head.") else 1.0,
        }
        if "muon" in recipe.opt:  # made for matrices between hidden layers; AdamW takes what is marked here
            options["use_fallback"] = not (name.startswith("blocks.") and parameter.shape[1:2] == (recipe.model.dim,))
        groups.setdefault(tuple(options.items()), []).append(parameter)
    return [{"params": parameters, **dict(options)} for options, parameters in groups.items()]


def new_optimizer(network: ConvMixer, recipe: Recipe) -> torch.optim.Optimizer:
    """timm's optimizer of the recipe's name; "adamw" is PyTorch's. Raises TrainingError where it cannot be had."""
    groups = parameter_groups(network, recipe)
    try:
        return create_optimizer_v2(groups, recipe.opt, recipe.lr, recipe.weight_decay, eps=recipe.eps)
    except Exception as error:  # whatever the optimizer's own checks raise, or the import of its package
        reason = " ".join(str(error).split()) or type(error).__name__
        raise TrainingError(f"timm's optimizer {recipe.opt} cannot be used: {reason:.200}; try --opt adamw") from error


def new_state(
    recipe: Recipe, device: torch.device, amp: str, memory_format: torch.memory_format = torch.channels_last
) -> TrainingState:
    """The state before the first epoch: weights initialised from the recipe's seed.

    memory_format: of weights and pictures; the recipe's own is channel-major or does not matter here.
    """
    torch.manual_seed(recipe.seed)
    network = build(recipe.model).to(device, memory_format=memory_format)
    use_fast_depthwise(network)
    if device.type == "cpu" and memory_format == torch.channels_last:
        keep_gradients_channels_last(network)
    if recipe.memory_format.startswith("channel_major"):
        use_channel_major(network, fused=recipe.memory_format == "channel_major_fused")
    optimizer = new_optimizer(network, recipe)
    ema = None if recipe.ema is None else ModelEmaV3(network, decay=recipe.ema, use_warmup=True)
    return TrainingState(network, optimizer, torch.amp.GradScaler(device.type, enabled=amp == "fp16"), ema)


def save_content(path: Path, content: dict) -> None:
    """Writes a checkpoint as a whole or not at all. Raises OSError when it cannot be written."""

    def save(file: BinaryIO) -> None:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # what torch.save says about its own half file hides what happened to it
            cause = error.__context__
            if isinstance(cause, OSError):
                raise cause from error
            raise

    write_atomically(path, save)


def save_last(folder: Path, content: dict) -> None:
    """Writes the last checkpoint; the one before becomes previous.pt. A kill or a full disk at any moment leaves one.

    Raises OSError when it cannot be written; both older files are then as they were.
    """
    save_content(folder / NEXT, content)
    shift(folder)


def shift(folder: Path) -> None:
    """The second half of a save: next.pt becomes last.pt, which becomes previous.pt."""
    if (folder / LAST).exists():
        (folder / LAST).replace(folder / PREVIOUS)
    (folder / NEXT).replace(folder / LAST)


def settle(folder: Path, used: Path) -> None:
    """Finishes a save that was cut off, after `read_newest` gave the checkpoint ``used``, to all processes.

    Damaged ones that are newer go: the next save would put them in the place of the whole one.
    """
    for name in (NEXT, LAST, PREVIOUS):
        if name == used.name:
            break
        (folder / name).unlink(missing_ok=True)
    if used.name == NEXT:
        shift(folder)


def find_damage(path: Path) -> str:
    """What is wrong with a checkpoint file; "" where nothing is. Reads it all: a lost block keeps a file's length."""
    try:
        with zipfile.ZipFile(path) as file:
            broken = file.testzip()
        return "" if broken is None else f"its part {broken} is damaged"
    except (OSError, zipfile.BadZipFile, EOFError, ValueError, RuntimeError, struct.error, zlib.error) as error:
        return str(error) or type(error).__name__


def read_newest(folder: Path) -> tuple[dict | None, Path, list[str]]:
    """The newest whole checkpoint of a run folder and its file, and what to tell the user; None where there is none.

    Raises TrainingError when there are checkpoints but none is whole.
    """
    notes = []
    for path in (folder / NEXT, folder / LAST, folder / PREVIOUS):
        if not path.exists():
            if path.name == LAST and (folder / PREVIOUS).exists() and not (folder / NEXT).exists():
                notes.append(f"{path} is missing")
            continue
        problem = find_damage(path)
        if not problem:
            try:
                content = torch.load(path, map_location="cpu", weights_only=True)
                if content.keys() >= {"recipe", "network", "running", "data"}:
                    return content, path, notes
                problem = "another program's"
            except (OSError, RuntimeError, ValueError, TypeError, AttributeError, pickle.UnpicklingError) as error:
                problem = type(error).__name__
        notes.append(f"{path} is not a whole checkpoint of this command ({problem})")
    if notes:
        raise TrainingError(f"{notes[0]}; delete it to start afresh")
    return None, folder / LAST, notes


def check_data(folder: Path, stored: dict, now: dict) -> None:
    """Raises TrainingError when a checkpoint was made on other classes or other numbers of pictures.

    Both as `Data.facts` gives them.
    """
    if stored == now:
        return
    was, labels = stored["labels"], now["labels"]
    if len(was) != len(labels):
        problem = f"it has {len(labels):,} classes and had {len(was):,}"
    elif was != labels:
        i = next(i for i, label in enumerate(labels) if label != was[i])
        problem = f"class {i} is {labels[i]!r} and was {was[i]!r}"
    else:
        part = "training" if stored["training"] != now["training"] else "held_out"
        counts, before = (facts[part] or [None] * len(labels) for facts in (now, stored))
        i = next(i for i, count in enumerate(counts) if count != before[i])
        problem = f"{counts[i]} {part.replace('_', '-')} pictures are {labels[i]!r} and {before[i]} were"
    raise TrainingError(
        f"cannot resume {folder} on other data: {problem}; give the data that it began with, or --out for a new run"
    )


def check_recipe(folder: Path, stored: dict, resolved: dict) -> None:
    """Raises TrainingError when a checkpoint was made with another recipe."""
    now, was = _flat(resolved), _flat(stored)
    different = [name for name in sorted(now.keys() | was.keys()) if now.get(name) != was.get(name)]
    if not different:
        return
    said = "; ".join(f"{name} is {now.get(name)!r} and was {was.get(name)!r}" for name in different)
    if "epochs" in different:  # the learning rate's course depends on them
        said += (
            f"; leave out --epochs to finish the {was['epochs']}, or train on from its weights as a new run:"
            f" --weights {folder}/model.safetensors --epochs {now['epochs']} --out ANOTHER"
        )
    raise TrainingError(f"cannot resume {folder} with another recipe: {said}")


def _flat(recipe: dict, prefix: str = "") -> dict:
    """The fields of a recipe by their dotted names."""
    flat = {}
    for name, value in recipe.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
