"""Where else a run's rows go, by ``--log``: TensorBoard's event files, Weights & Biases, or trackio.

Each is given the rows of train/report/console.py, and needs a package of its own.
"""

import importlib
import os
from pathlib import Path
from typing import Literal

from train.errors import TrainingError
from train.report.console import COLUMNS, is_known

Log = Literal["none", "tensorboard", "wandb", "trackio"]


def open_tracker(log: Log, folder: Path, config: dict):
    """The tracker of that name for the run in ``folder``; None for "none". Raises TrainingError without its package."""
    if log == "none":
        return None
    return TensorBoard(folder / "tensorboard") if log == "tensorboard" else Tracker(log, folder, config)


def tag_of(name: str) -> str:
    """train/loss, train/top1, held_out/loss, ..., lr, images_per_s, seconds and skipped."""
    return name.replace("train_", "train/").replace("held_out_", "held_out/")


class Tracker:
    """wandb, or trackio, which has the same functions: a run of the project "convmixer", named after its folder.

    A run that goes on is taken up under its name. What wandb has to know (WANDB_MODE, WANDB_API_KEY, ...) is in its own
    variables.
    """

    def __init__(self, package: str, folder: Path, config: dict):
        try:
            self._package = importlib.import_module(package)
        except ImportError as error:
            raise TrainingError(f"--log {package} needs a package of its own: pip install {package}") from error
        options = {"id": folder.name, "dir": str(folder)} if package == "wandb" else {}
        self._package.init(project="convmixer", name=folder.name, config=config, resume="allow", **options)

    def row(self, row: dict) -> None:
        values = {tag_of(name): row[name] for name in COLUMNS[1:] if is_known(row.get(name))}
        self._package.log(values, step=row["epoch"])

    def close(self) -> None:
        self._package.finish()


class TensorBoard:
    """TensorBoard's event files in ``folder``: one scalar a measured value, with the epoch as its step.

    Raises TrainingError where the package tensorboard is not installed.
    """

    def __init__(self, folder: str | os.PathLike):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise TrainingError("--log tensorboard needs a package of its own: pip install tensorboard") from error
        self._open, self._folder, self._writer = SummaryWriter, Path(folder), None

    def row(self, row: dict) -> None:
        """Writes a row under train/loss, train/top1, held_out/loss, ..., lr, images_per_s, seconds and skipped."""
        if self._writer is None:
            # A run that was killed after its last checkpoint does some epochs again: what the earlier event files say
            # about them is void from here on.
            self._writer = self._open(str(self._folder), purge_step=row["epoch"])
        for name in COLUMNS[1:]:
            if is_known(row.get(name)):
                self._writer.add_scalar(tag_of(name), row[name], row["epoch"])
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
