"""What a run tells while it goes on: rows and a progress bar on the console, and a CSV.

Both are given history rows: dicts with the keys COLUMNS. ``epoch`` counts from 1, ``lr`` is that of the epoch's
last step, top-1 and top-5 are percentages, ``seconds`` is the time for the epoch and ``skipped`` the number of broken
pictures that were left out. NaN stands for what was not measured: training accuracy under mixup, epochs without an
evaluation. Rows of older runs may lack ``held_out_top5`` and ``skipped``.
"""

import csv
import math
import os
import sys
import time
from collections.abc import Callable
from typing import SupportsFloat, TextIO

from convmixer.weights import write_atomically

COLUMNS = (
    "epoch",
    "lr",
    "train_loss",
    "train_top1",
    "held_out_loss",
    "held_out_top1",
    "held_out_top5",
    "images_per_s",
    "seconds",
    "skipped",
)


def is_known(value: float | None) -> bool:
    """Whether something was measured; what was not is None or NaN."""
    return value is not None and not math.isnan(value)


def best_row(history: list[dict]) -> dict | None:
    """The row of the highest top-1 on held-out pictures, the last of equals, as best.safetensors; None for none."""
    measured = [row for row in history if is_known(row.get("held_out_top1"))]
    return max(reversed(measured), key=lambda row: row["held_out_top1"], default=None)


def write_metrics(path: str | os.PathLike, history: list[dict]) -> None:
    """The run's CSV: a header and a row an epoch, an empty cell for what was not measured.

    It is rewritten whole, so that a resumed run never repeats a row. Raises OSError.
    """
    cells = [[f"{row[name]:.6g}" if is_known(row.get(name)) else "" for name in COLUMNS] for row in history]
    text = "".join(",".join(line) + "\n" for line in [COLUMNS, *cells])
    write_atomically(path, lambda file: file.write(text.encode()))


def read_metrics(path: str | os.PathLike) -> list[dict]:
    """The history that `write_metrics` wrote, without what was not measured. Raises OSError and ValueError."""
    with open(path, newline="") as file:
        rows = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
    return [row | {"epoch": int(row["epoch"])} for row in rows]


def duration(seconds: float | None) -> str:
    """A time as people say it, at most seven characters: 12s, 4m 10s, 1h 23m, 5d 03h; "-" if it is not known."""
    if not is_known(seconds):
        return "-"
    if 0 < seconds < 1:
        return "<1s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 100:
        return f"{hours // 24}d {hours % 24:02}h"
    if hours:
        return f"{hours}h {minutes:02}m"
    return f"{minutes}m {rest:02}s" if minutes else f"{rest}s"


def rate(images_per_s: float) -> str:
    """Images a second, with a decimal where it matters."""
    return f"{images_per_s:.1f}" if images_per_s < 10 else f"{images_per_s:.0f}"


def write_number(value: float | None, width: int, write: Callable[[float], str]) -> str:
    """``write(value)``, right-aligned; "-" for what is not known, an order of magnitude for what is too long."""
    text = write(value) if is_known(value) else "-"
    return (text if len(text) <= width else f"{value:.0e}").rjust(width)


LOSS_WIDTH, RATE_WIDTH, TIME_WIDTH = 6, 8, 7
write_loss = "{:.3f}".format
write_percent = "{:.2f}".format
# The columns between the epoch and the time left: (key of the row, title, width, how the number is written). With the
# other two they fill 79 characters at most, so that no row wraps on a terminal of 80.
CELLS = (
    ("train_loss", "loss", LOSS_WIDTH, write_loss),
    ("train_top1", "top-1 %", 7, write_percent),
    ("held_out_loss", "loss", LOSS_WIDTH, write_loss),
    ("held_out_top1", "top-1 %", 7, write_percent),
    ("lr", "lr", 8, "{:.3g}".format),
    ("images_per_s", "images/s", RATE_WIDTH, rate),
    ("seconds", "time", TIME_WIDTH, duration),
)
GAP = "  "
BAR_SECONDS = 0.1  # between two drawings of the bar: smooth for the eye, nothing for the processor
LINE_SECONDS = 60  # between two lines of a step where there is no terminal
BAR_LENGTH = 30  # characters at most
COLUMNS_UNKNOWN = 80  # width taken for a terminal that does not tell its own


class Console:
    """One calm row an epoch on ``stream``; where ``bar`` is a terminal also a progress bar of the epoch under way.

    epochs: of the whole run. stream, bar: standard output and standard error by default.
    """

    def __init__(self, epochs: int, stream: TextIO | None = None, bar: TextIO | None = None):
        self.epochs = epochs
        self.epoch_width = max(len("epoch"), len(f"{epochs}/{epochs}"))
        # The defaults are looked up now, because whoever redirects sys.stdout does so after this file was imported.
        self.stream, self.bar = stream or sys.stdout, bar or sys.stderr
        self.terminal = self.bar.isatty()
        self.shown = ""  # what the bar's line holds at the moment
        self.drawn_at = -math.inf
        self.epoch, self.first_step, self.started = None, 0, 0.0

    def header(self) -> None:
        """Prints the two lines above the rows."""
        pair = sum(width for _, _, width, _ in CELLS[:2]) + len(GAP)
        groups = [" " * self.epoch_width, *(f" {name} ".center(pair, "-") for name in ("train", "held-out"))]
        titles = [f"{'epoch':>{self.epoch_width}}", *(f"{title:>{width}}" for _, title, width, _ in CELLS)]
        self._print(GAP.join(groups), GAP.join([*titles, f"{'left':>{TIME_WIDTH}}"]))

    def row(self, row: dict, seconds_left: float | None) -> None:
        """Prints the row of a finished epoch; ``seconds_left`` is the time left for the run, NaN or None if unknown."""
        cells = [f"{row['epoch']}/{self.epochs}".rjust(self.epoch_width)]
        cells += [write_number(row.get(key), width, write) for key, _, width, write in CELLS]
        self._print(GAP.join([*cells, duration(seconds_left).rjust(TIME_WIDTH)]))

    def note(self, text: str) -> None:
        """Prints a line of its own; a bar that was there is drawn again below it."""
        bar = self.shown
        self._print(text)
        self._draw(bar)

    def step(self, epoch: int, step: int, steps: int, loss: SupportsFloat, images_per_s: float) -> None:
        """Moves the bar to ``step`` of ``steps`` (1 to steps) of ``epoch`` (from 1); not each call draws it.

        Where there is no terminal, a line is printed each minute that the epoch takes.

        loss: a number, or a tensor that holds one; it is read only when drawn, because reading waits for the GPU.
        """
        now = time.monotonic()
        if epoch != self.epoch:
            self.epoch, self.first_step, self.started = epoch, step, now
            self.drawn_at = -math.inf if self.terminal else now
        if now - self.drawn_at < (BAR_SECONDS if self.terminal else LINE_SECONDS) and (
            step < steps or not self.terminal
        ):
            return
        self.drawn_at = now
        done = step - self.first_step
        seconds_left = (now - self.started) / done * (steps - step) if done else math.nan
        left = f"{epoch}/{self.epochs}".rjust(self.epoch_width)
        right = GAP.join(
            [
                f"{step:>{len(str(steps))}}/{steps}",
                f"loss {write_number(float(loss), LOSS_WIDTH, write_loss)}",
                f"{write_number(images_per_s, 5, rate)} images/s",
                f"{duration(seconds_left):>{TIME_WIDTH}} left",
            ]
        )
        if not self.terminal:
            self._print(GAP.join([left, right]))
            return
        columns = self._columns() - 1  # a character in the last column makes some terminals wrap
        length = max(0, min(BAR_LENGTH, columns - len(left) - len(right) - 2 * len(GAP)))
        full, empty = self._characters()
        filled = length * step // steps
        bar = full * filled + empty * (length - filled)
        self._draw(GAP.join(part for part in (left, bar, right) if part)[:columns])

    def clear(self) -> None:
        """Takes the bar away, as every printed line does by itself; for a run that ends in the middle of an epoch."""
        if self.shown:
            # Blanks and not an escape sequence, so that it works on whatever calls itself a terminal.
            self.bar.write("\r" + " " * len(self.shown) + "\r")
            self.bar.flush()
            self.shown = ""

    def _draw(self, text: str) -> None:
        if text:
            self.bar.write("\r" + text.ljust(len(self.shown)))
            self.bar.flush()
            self.shown = text

    def _print(self, *lines: str) -> None:
        self.clear()
        text, encoding = "".join(line + "\n" for line in lines), self.stream.encoding or "utf-8"
        # The name of a broken picture may hold what the terminal cannot show: no reason to stop training.
        self.stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        self.stream.flush()

    def _columns(self) -> int:
        try:
            return os.get_terminal_size(self.bar.fileno()).columns or COLUMNS_UNKNOWN
        except OSError:
            return COLUMNS_UNKNOWN

    def _characters(self) -> tuple[str, str]:
        """What the bar is drawn with, full and empty."""
        try:
            "━─".encode(self.bar.encoding)
        except UnicodeEncodeError:
            return "#", "."
        return "━", "─"
