"""What a run says: the CSV, the console on a terminal and through a pipe, TensorBoard's files, public names."""

import contextlib
import csv
import fcntl
import io
import math
import pty
import re
import struct
import sys
import termios
from typing import TextIO

import pytest

from train.errors import TrainingError
from train.report import console as module
from train.report.console import COLUMNS, Console, best_row, duration, write_metrics
from train.report.paths import public_command, public_name
from train.report.trackers import open_tracker

ROW = dict(zip(COLUMNS, (1, 0.05, 1.25, 61.5, 1.5, 58.25, 95.0, 152.4, 250.0, 0), strict=True))
UNKNOWN = dict.fromkeys(("train_top1", "held_out_loss", "held_out_top1", "held_out_top5"), math.nan)


def test_the_csv_has_a_row_an_epoch_and_empty_cells_for_what_was_not_measured(tmp_path):
    path = tmp_path / "metrics.csv"
    write_metrics(path, [ROW] * 7)
    write_metrics(path, [ROW, ROW | UNKNOWN | {"epoch": 2, "lr": 1e-6}, {"epoch": 3}])
    first, second, third = csv.DictReader(io.StringIO(path.read_text()))
    assert {name: float(value) for name, value in first.items()} == ROW and tuple(first) == COLUMNS
    assert {name for name, value in second.items() if not value} == set(UNKNOWN) and float(second["lr"]) == 1e-6
    assert [name for name, value in third.items() if value] == ["epoch"]


def test_the_best_row_and_durations():
    history = [ROW | {"epoch": i, "held_out_top1": top1} for i, top1 in enumerate((3.0, 7.0, math.nan, 7.0, 5.0))]
    assert best_row(history)["epoch"] == 3  # the last of equals, as best.safetensors
    assert best_row([ROW | UNKNOWN]) is None
    said = {0: "0s", 0.4: "<1s", 59.7: "1m 00s", 3599.6: "1h 00m", 359_990: "99h 59m", 442_800: "5d 03h", None: "-"}
    assert {seconds: duration(seconds) for seconds in said} == said


def test_rows_stay_in_their_columns_whatever_the_numbers_are():
    stream = io.StringIO()
    console = Console(300, stream, io.StringIO())
    console.header()
    for loss, lr, rate in ((0.0004, 0.000625, 9.99), (123456.7, 1.23e-6, 30000.0), (math.inf, 0, 0.3)):
        row = {"epoch": 300, "train_loss": loss, "held_out_loss": loss, "lr": lr, "images_per_s": rate}
        console.row(ROW | row | {"train_top1": 100.0}, 359_990)
    console.row(ROW, 4985)
    console.row(ROW | UNKNOWN, math.nan)
    groups, titles, *rows = stream.getvalue().splitlines()
    ends = [match.end() for match in re.finditer(r"(epoch|loss|top-1 %|lr|images/s|time|left)", titles)]
    assert len(ends) == 9 and len(groups) < len(titles) <= 79
    for row in rows:  # each column is right-aligned to its title, and something precedes the gap after it
        assert len(row) == len(titles), row
        assert all(row[end - 1] != " " and row[end : end + 2].strip() == "" for end in ends), row
    assert rows[-2].split() == ["1/300", "1.250", "61.50", "1.500", "58.25", "0.05", "152", "4m", "10s", "1h", "23m"]
    assert rows[-1].split() == ["1/300", "1.250", "-", "-", "-", "0.05", "152", "4m", "10s", "-"]


def terminal(columns: int, encoding: str = "utf-8") -> tuple[int, TextIO]:
    """The two sides of a pseudo-terminal: the one to read from, and the one that a console writes to."""
    reader, writer = pty.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    return reader, open(writer, "w", encoding=encoding)


def sent(reader: int, writer: TextIO) -> str:
    """What was written, a few kilobytes at most."""
    writer.close()
    received = b""
    with contextlib.suppress(OSError), open(reader, "rb", 0) as file:  # Linux says so when the other side is closed
        while part := file.read(4096):
            received += part
    return received.decode().replace("\r\n", "\n")


def screen(text: str) -> list[str]:
    """The lines that a terminal shows after ``text``: a carriage return starts the line again from its left."""
    lines = []
    for line in text.split("\n"):
        shown = ""
        for part in line.split("\r"):
            shown = part + shown[len(part) :]
        lines.append(shown.rstrip())
    return lines


def test_the_bar_moves_on_a_terminal_and_leaves_nothing_behind(monkeypatch):
    monkeypatch.setattr(module, "BAR_SECONDS", 0)
    reader, writer = terminal(columns=80)
    console = Console(25, writer, writer)
    for step in (1, 30, 60):
        console.step(3, step, 60, 1.0 + step, 152.0)
        if step == 30:
            console.note("left out: broken.jpg")
    console.row(ROW | {"epoch": 3}, 4985)
    monkeypatch.setattr(module, "BAR_SECONDS", 600)
    console.step(4, 1, 60, math.nan, 0.5)
    console.step(4, 30, 60, None, 0.5)  # too soon: the loss is not read, which on a GPU means waiting
    console.clear()
    text = sent(reader, writer)
    note, row, rest = screen(text)
    assert (note, row.split()[:2], rest) == ("left out: broken.jpg", ["3/25", "1.250"], "")
    drawn = [part for part in re.split(r"[\r\n]+", text) if "/60" in part]
    assert [re.search(r"(\d+)/60", part)[1] for part in drawn] == ["1", "30", "30", "60", "1"]
    length = len(re.search("[━─]+", drawn[0])[0])
    assert [part.count("━") for part in drawn] == [length * step // 60 for step in (1, 30, 30, 60, 1)] and length >= 10
    assert "loss 31.000" in drawn[1] and "152 images/s" in drawn[1] and re.search(r"\ds left", drawn[1])
    assert "loss      -" in drawn[4] and "0.5 images/s" in drawn[4]


@pytest.mark.parametrize(("columns", "encoding"), [(20, "utf-8"), (100, "ascii")])
def test_the_bar_stays_on_one_line_of_any_terminal(columns, encoding):
    reader, writer = terminal(columns, encoding)
    console = Console(300, writer, writer)
    console.step(299, 2502, 2502, 6.25, 30000.0)
    console.step(300, 7, 7, 6.25, 30000.0)  # a shorter line over a longer one
    text = sent(reader, writer)
    *_, last = parts = text.split("\r")
    assert "300/300" in last and all(len(part) < columns for part in parts) and screen(text) == [last.rstrip()]


def test_off_a_terminal_a_long_epoch_has_a_whole_line_every_minute(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), "ascii")
    console = Console(3, stream, io.StringIO())
    for step, wait in ((1, 60), (2, 60), (20, 0)):
        monkeypatch.setattr(module, "LINE_SECONDS", wait)
        console.step(1, step, 60, 1.5, 10.0)
    console.note("left out: \udc80猫.jpg")  # what the terminal cannot show does not stop the run
    line, note = stream.buffer.getvalue().decode().splitlines()
    assert re.match(r"+1/3  20/60  loss  1.500     10 images/s .* left$".replace("+", " +"), line)
    assert note == "left out: \\udc80\\u732b.jpg"


def test_tensorboard_shows_each_epoch_once_also_after_a_resumed_run(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for epochs in ((1, 2, 3), (3, 4)):  # the run was killed before its third epoch was in a checkpoint
        tracker = open_tracker("tensorboard", tmp_path, {})
        for epoch in epochs:
            tracker.row(ROW | UNKNOWN | {"epoch": epoch, "train_loss": 10.0 * len(epochs) + epoch})
        tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {"train/loss", "lr", "images_per_s", "seconds", "skipped"}
    losses = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert losses == [(1, 31.0), (2, 32.0), (3, 23.0), (4, 24.0)]


@pytest.mark.parametrize("package", ["tensorboard", "wandb", "trackio"])
def test_a_tracker_says_what_to_install_where_it_is_missing(tmp_path, monkeypatch, package):
    for name in [name for name in sys.modules if name.startswith(("tensorboard", "torch.utils.tensorboard"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)  # what the import system takes for "not there"
    with pytest.raises(TrainingError, match=f"pip install {package}$"):
        open_tracker(package, tmp_path, {})


def test_names_and_commands_of_a_card_say_nothing_of_the_machines_folders():
    public = {"../pets/": "pets", "wds//mnt/shards": "wds/shards", "~/x/model.safetensors": "model.safetensors", "": ""}
    public |= {"hfds//mnt/set": "hfds/set"} | {name: name for name in ("hfds/user/flowers", "hf:user/model", "auto")}
    assert {name: public_name(name) for name in public} == public
    typed = "--recipe finetune --data /a/b --out=/c/d --weights ~/e/f.pth --resume --class_names /g/h.txt --lr 0.1"
    expected = "--recipe finetune --data b --out=d --weights f.pth --class_names h.txt --lr 0.1"
    assert public_command(typed.split()) == f"python train/run.py {expected}"
