"""`train.report.console`: the CSV, the console on a terminal and through a pipe, TensorBoard's files read back."""

import csv
import fcntl
import importlib.util
import io
import math
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
import time

import pytest
from conftest import ROOT

from train.errors import TrainingError
from train.report.console import COLUMNS, Console, best_row, duration, write_metrics
from train.report.trackers import TensorBoard, open_tracker

ROW = {
    "epoch": 1,
    "lr": 0.05,
    "train_loss": 1.25,
    "train_top1": 61.5,
    "held_out_loss": 1.5,
    "held_out_top1": 58.25,
    "held_out_top5": 95.0,
    "images_per_s": 152.4,
    "seconds": 250.0,
    "skipped": 0,
}
UNKNOWN = dict.fromkeys(("train_top1", "held_out_loss", "held_out_top1", "held_out_top5"), math.nan)


def test_the_csv_has_a_row_an_epoch_and_empty_cells_for_what_was_not_measured(tmp_path):
    path = tmp_path / "metrics.csv"
    older = {name: value for name, value in ROW.items() if name not in ("held_out_top5", "skipped")}
    write_metrics(path, [ROW] * 7)
    write_metrics(path, [ROW, ROW | UNKNOWN | {"epoch": 2, "lr": 1e-6}, older | {"epoch": 3}])
    first, second, third = csv.DictReader(io.StringIO(path.read_text()))
    assert tuple(first) == COLUMNS
    assert {name: float(value) for name, value in first.items()} == ROW
    assert {name for name, value in second.items() if not value} == set(UNKNOWN)
    assert float(second["lr"]) == 1e-6
    assert {name for name, value in third.items() if not value} == {"held_out_top5", "skipped"}
    assert os.listdir(tmp_path) == ["metrics.csv"]


def test_the_best_row_is_the_last_of_equals_among_those_that_were_measured():
    history = [ROW | {"epoch": i + 1, "held_out_top1": top1} for i, top1 in enumerate((3.0, 7.0, math.nan, 7.0, 5.0))]
    assert best_row(history)["epoch"] == 4
    assert best_row([ROW | UNKNOWN]) is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (0.4, "<1s"),
        (12.4, "12s"),
        (59.7, "1m 00s"),
        (250, "4m 10s"),
        (3599.6, "1h 00m"),
        (4985, "1h 23m"),
        (359_990, "99h 59m"),
        (5 * 86400 + 3 * 3600, "5d 03h"),
        (math.nan, "-"),
        (None, "-"),
    ],
)
def test_durations_are_written_as_people_say_them(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize("epochs", [1, 25, 300])
def test_rows_stay_in_their_columns_whatever_the_numbers_are(epochs):
    stream = io.StringIO()
    console = Console(epochs, stream, io.StringIO())
    console.header()
    for loss in (0.0004, 99.0, 123456.7, math.inf):
        for lr in (0.05, 0.000625, 1.23e-6, 0):
            for rate in (0.3, 9.99, 30000.0):
                row = {"epoch": epochs, "train_loss": loss, "held_out_loss": loss, "lr": lr, "images_per_s": rate}
                console.row(ROW | row | {"train_top1": 100.0}, 359_990)
    console.row(ROW | UNKNOWN, None)
    groups, titles, *rows = stream.getvalue().splitlines()
    ends = {match.end() for match in re.finditer(r"(epoch|loss|top-1 %|lr|images/s|time|left)", titles)}
    assert len(ends) == 9
    assert len(groups) < len(titles) <= 79
    for row in rows:
        assert len(row) == len(titles), row
        for end in ends:  # each column is right-aligned to its title, and something precedes the gap after it
            assert row[end - 1] != " " and row[end : end + 2].strip() == "", row


def test_a_row_says_what_was_measured_and_a_dash_for_what_was_not():
    stream = io.StringIO()
    console = Console(25, stream, io.StringIO())
    console.row(ROW, 4985)
    console.row(ROW | UNKNOWN | {"epoch": 2}, math.nan)
    known, unknown = stream.getvalue().splitlines()
    assert known.split() == ["1/25", "1.250", "61.50", "1.500", "58.25", "0.05", "152", "4m", "10s", "1h", "23m"]
    assert unknown.split() == ["2/25", "1.250", "-", "-", "-", "0.05", "152", "4m", "10s", "-"]


def test_a_name_that_the_terminal_cannot_show_does_not_stop_the_run():
    stream = io.TextIOWrapper(io.BytesIO(), "ascii")
    Console(1, stream, io.StringIO()).note("left out: \udc80猫.jpg")
    assert stream.buffer.getvalue() == b"left out: \\udc80\\u732b.jpg\n"


def test_nothing_but_whole_lines_goes_into_a_pipe():
    reader, writer = os.pipe()
    with open(writer, "w") as pipe:
        console = Console(2, pipe, pipe)
        console.header()
        for step in range(1, 51):
            console.step(1, step, 50, 1.0, 100.0)
        console.note("left out: broken.jpg")
        console.row(ROW, 250)
    with open(reader) as pipe:
        text = pipe.read()
    assert "\r" not in text
    assert len(text.splitlines()) == 4


class Terminal:
    """A pseudo-terminal, and the screen that somebody in front of it would see."""

    def __init__(self, columns: int, encoding: str = "utf-8"):
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.stream = open(slave, "w", encoding=encoding)  # noqa: SIM115 (closed in close)
        self.received = b""
        self.reader = threading.Thread(target=self._read, daemon=True)  # a failed test must not hang
        self.reader.start()

    def _read(self) -> None:
        try:
            while part := os.read(self.master, 4096):
                self.received += part
        except OSError:  # Linux says so when the other side is closed
            pass

    def close(self) -> str:
        self.stream.close()
        self.reader.join()
        os.close(self.master)
        return self.received.decode()


def screen(text: str) -> list[str]:
    """The lines that a terminal shows after ``text``: a carriage return starts the line again from its left."""
    lines = []
    for line in text.replace("\r\n", "\n").split("\n"):
        shown = ""
        for part in line.split("\r"):
            shown = part + shown[len(part) :]
        lines.append(shown.rstrip())
    return lines


def test_the_bar_moves_on_a_terminal_and_leaves_nothing_behind():
    terminal = Terminal(columns=80)
    console = Console(25, terminal.stream, terminal.stream)
    console.header()
    for step in (1, 30, 60):
        console.step(3, step, 60, 1.0 + step, 152.0)
        if step == 30:
            console.note("left out: broken.jpg")
        time.sleep(0.11)
    console.row(ROW | {"epoch": 3}, 4985)
    console.step(4, 1, 60, math.nan, 152.0)
    time.sleep(0.11)
    console.step(4, 30, 60, math.nan, 0.5)
    console.clear()
    text = terminal.close()

    _, titles, note, row, rest = screen(text)
    assert titles.split()[0] == "epoch"
    assert note == "left out: broken.jpg"
    assert row.split()[:2] == ["3/25", "1.250"]
    assert rest == ""
    drawn = [part for part in re.split(r"[\r\n]+", text) if "images/s" in part and "/60" in part]
    assert [re.search(r"(\d+)/60", part)[1] for part in drawn] == ["1", "30", "30", "60", "1", "30"]
    filled, empty = (part.count("━") for part in drawn), [part.count("─") for part in drawn]
    length = drawn[0].count("━") + empty[0]
    assert list(filled) == [length * step // 60 for step in (1, 30, 30, 60, 1, 30)]
    assert length >= 10
    assert "loss 31.000" in drawn[1] and "152 images/s" in drawn[1] and re.search(r"\ds left", drawn[1])
    assert "loss      -" in drawn[4] and "0.5 images/s" in drawn[5]


@pytest.mark.parametrize(("columns", "encoding"), [(20, "utf-8"), (50, "utf-8"), (100, "ascii"), (300, "utf-8")])
def test_the_bar_stays_on_one_line_of_any_terminal(columns, encoding):
    terminal = Terminal(columns, encoding)
    console = Console(300, terminal.stream, terminal.stream)
    console.step(299, 2502, 2502, 6.25, 30000.0)
    console.step(300, 7, 7, 6.25, 30000.0)  # a shorter line over a longer one
    *_, last = parts = terminal.close().split("\r")
    assert "299/300" in parts[1] and "300/300" in last
    assert all(len(part) < columns for part in parts)
    assert screen("\r".join(parts)) == [last.rstrip()]


class CountingLoss:
    """A loss that counts how often it is read, which on a GPU means waiting."""

    read = 0

    def __float__(self) -> float:
        self.read += 1
        return 1.0


def test_many_steps_draw_the_bar_ten_times_a_second_at_most():
    terminal = Terminal(columns=80)
    console = Console(1, terminal.stream, terminal.stream)
    loss, start = CountingLoss(), time.monotonic()
    for step in range(1, 2001):
        console.step(1, step, 2000, loss, 100.0)
    elapsed = time.monotonic() - start
    text = terminal.close()
    assert 2 <= text.count("/2000") <= 2 + elapsed / 0.1
    assert "2000/2000" in text
    assert loss.read == text.count("/2000")


def test_the_bar_is_on_the_terminal_while_the_rows_go_to_a_file(tmp_path):
    terminal = Terminal(columns=80)
    with open(tmp_path / "log", "w") as log:
        console = Console(1, log, terminal.stream)
        console.step(1, 5, 10, 1.0, 100.0)
        console.row(ROW, 0)
    assert (tmp_path / "log").read_text().split()[0] == "1/1"
    text = terminal.close()
    assert "5/10" in text
    assert screen(text) == [""]


def read_scalars(folder) -> dict:
    """{tag: [(step, value), ...]}, as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_shows_each_epoch_once_also_after_a_resumed_run(tmp_path):
    first = TensorBoard(tmp_path)
    for epoch in (1, 2, 3):
        first.row(ROW | {"epoch": epoch, "train_loss": float(epoch)})
    first.close()
    again = TensorBoard(tmp_path)  # the run was killed before its third epoch was in a checkpoint
    again.row(ROW | UNKNOWN | {"epoch": 3, "train_loss": 30.0})
    again.row(ROW | {"epoch": 4, "train_loss": 4.0})
    again.close()
    scalars = read_scalars(tmp_path)
    assert scalars["train/loss"] == [(1, 1.0), (2, 2.0), (3, 30.0), (4, 4.0)]
    assert scalars["held_out/top1"] == [(1, 58.25), (2, 58.25), (4, 58.25)]
    measured = {"train/loss", "train/top1", "held_out/loss", "held_out/top1", "held_out/top5"}
    assert set(scalars) == measured | {"lr", "images_per_s", "seconds", "skipped"}


@pytest.mark.parametrize("package", ["wandb", "trackio"])
def test_a_tracker_takes_the_rows_also_of_a_resumed_run(tmp_path, monkeypatch, package):
    """The real package, without a network."""
    if not importlib.util.find_spec(package):
        pytest.skip(f"{package} is not installed")
    places = {"WANDB_MODE": "offline", "TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HOME": str(tmp_path)}
    script = (
        "from pathlib import Path; from train.report.trackers import open_tracker\n"
        "for epochs in ((1, 2), (3,)):\n"
        f"    tracker = open_tracker({package!r}, Path({str(tmp_path / 'run')!r}), {{'epochs': 3}})\n"
        f"    for epoch in epochs: tracker.row({{**{ROW!r}, 'epoch': epoch}})\n"
        "    tracker.close()\n"
    )
    (tmp_path / "run").mkdir()
    command = [sys.executable, "-c", script]  # the packages read their variables when they are imported
    done = subprocess.run(command, cwd=ROOT, env=os.environ | places, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kept = [*tmp_path.rglob("*.wandb"), *tmp_path.rglob("*.db")]
    assert kept and all(path.stat().st_size for path in kept)


@pytest.mark.parametrize("package", ["wandb", "trackio"])
def test_a_tracker_says_what_to_install_where_it_is_missing(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(TrainingError, match=f"pip install {package}"):
        open_tracker(package, tmp_path, {})


def test_off_a_terminal_an_epoch_has_a_line_every_minute(monkeypatch):
    monkeypatch.setattr("train.report.console.LINE_SECONDS", 0.05)
    stream = io.StringIO()
    console = Console(3, stream, io.StringIO())
    console.step(1, 1, 60, 1.5, 10.0)
    assert stream.getvalue() == ""
    time.sleep(0.06)
    console.step(1, 20, 60, 1.5, 10.0)
    console.step(1, 60, 60, 1.5, 10.0)  # the row comes now
    first, *rest = stream.getvalue().splitlines()
    assert first.split()[:3] == ["1/3", "20/60", "loss"]
    assert first.endswith("left") and "10 images/s" in first
    assert len(rest) <= 1  # a busy machine may need that long for a step


def test_tensorboard_says_what_to_install_where_it_is_missing(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.startswith(("tensorboard", "torch.utils.tensorboard"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # what the import system takes for "not there"
    with pytest.raises(TrainingError, match="pip install tensorboard") as error:
        TensorBoard(tmp_path)
    assert "\n" not in str(error.value)
