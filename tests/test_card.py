"""What a finished run leaves to look at: the model card as its readers parse it; the pictures, content and pixels."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import yaml
from PIL import Image

from convmixer.__main__ import parse
from convmixer.config import ConvMixerConfig
from convmixer.preprocessing import CIFAR10
from convmixer.weights import Checkpoint
from train.report import pictures
from train.report.card import model_card
from train.report.pictures import draw_confusion, draw_curves, frequent_confusions

CONFUSION = np.array([[45, 5, 0], [1, 9, 0], [0, 0, 0]])
HISTORY = [
    {"epoch": i, "lr": 0.01 * i, "train_loss": 2 / i, "train_top1": 50.0 + i, "images_per_s": 100.0 * i, "skipped": 2}
    | ({"held_out_loss": 3 / i, "held_out_top1": 40.0 + 2 * i} if i % 2 else {"held_out_top1": math.nan})
    for i in range(1, 8)
]
AUGMENTATION = {"ra_n": 0, "ra_m": 12, "reprob": 0.25, "remode": "pixel", "cutmix": None}
CHECKPOINT = Checkpoint(
    name="convmixer_16_2_pets",
    config=ConvMixerConfig(16, 2, kernel_size=5, patch_size=2, num_classes=3),
    state_dict={},
    labels=("cat", "dog", "ship"),
    preprocessing=CIFAR10,
    training={
        "recipe": {"name": "pets", "epochs": 7, "augmentation": AUGMENTATION},
        "epochs": 7,
        "commit": "0123abc-dirty",
        "seconds": 4985.0,
        "command": "python train/run.py --recipe pets --data '/data/my  pets'",
    },
    accuracy={"top1": 90.0, "top5": 99.5, "data": "pets hold-out", "images": 60, "amp": "bf16"},
)


@pytest.fixture
def figures(monkeypatch) -> list:
    """The matplotlib figures that were written, in order."""
    written, save = [], pictures._save
    monkeypatch.setattr(pictures, "_save", lambda path, figure: (save(path, figure), written.append(figure)))
    return written


def texts(figure) -> list[str]:
    from matplotlib.text import Text

    return [text.get_text() for text in figure.findobj(Text) if text.get_visible() and text.get_text()]


def card_of(history=HISTORY, confusion=CONFUSION, **changes) -> str:
    return model_card(replace(CHECKPOINT, **changes), history, confusion)


def tables(card: str) -> list[list[list[str]]]:
    """The card's tables as rows of cells; an escaped bar does not end a cell."""
    found = re.findall(r"(?:^\|.*\|\n)+", card, flags=re.MULTILINE)
    return [[re.split(r"(?<!\\)\|", line)[1:-1] for line in table.splitlines()] for table in found]


def test_the_card_says_what_the_run_measured_and_how_it_was_made():
    from huggingface_hub import ModelCard

    card = card_of()
    data = ModelCard(card).data
    (result,) = data.eval_results
    assert (data.library_name, data.model_name) == ("convmixer", "convmixer_16_2_pets")
    assert (result.dataset_name, result.metric_type, result.metric_value) == ("pets hold-out", "accuracy", 90.0)
    rows = {row[0].strip(): [cell.strip() for cell in row[1:]] for table in tables(card) for row in table}
    assert rows["parameters"] == ["1,795"] and rows["precision"] == ["bfloat16 (autocast)"]
    assert rows["top-1"] == ["90.00 %"] and rows["top-5"] == ["99.50 %"] and rows["pictures"] == ["60"]
    assert rows["cat"] == ["90.00 %", "50"] and rows["ship"] == ["-", "0"]
    assert rows["epochs"] == ["7 of 7"] and rows["time"] == ["1h 23m"]
    assert rows["commit"] == ["`0123abc` with changes that were not committed"]
    assert rows["images a second"] == ["400 (median of the epochs)"]
    assert rows["broken pictures left out"] == ["up to 2 an epoch"]
    options = {name: value for name, (value, *_) in rows.items() if name.startswith("`--")}
    assert options == {"`--augmentation.reprob`": "`0.25`", "`--augmentation.remode`": "`pixel`"}
    confusions = re.findall(r"- (.+): (.+) taken for (.+)", card)
    assert confusions == [("5 of 50", "cat", "dog"), ("1 of 10", "dog", "cat")]
    assert "Best epoch of the run: 7, with 54.00 % top-1." in card and "evaluated 4 times" in card
    assert CHECKPOINT.training["command"] in card.splitlines() and "(curves.png)" in card and "(confusion.png)" in card


def test_what_the_run_does_not_know_is_left_out_and_what_limits_the_weights_is_said():
    unmeasured = CHECKPOINT.accuracy | {"top1": math.nan, "top5": math.nan}
    for card in (
        card_of([], None, training={}, accuracy={}),
        card_of([HISTORY[1]], np.zeros((3, 3), np.int64), accuracy=unmeasured),
    ):
        assert "model-index" not in card and "Nothing was measured." in card
        assert not re.search(r"\b(None|nan|unknown|top-1 \||Best epoch|confusion\.png)\b", card)
    for training, said in (
        ({"epochs": 2, "finished": False}, "**This run is not finished.** It stands after epoch 2 of 7."),
        ({"best": True, "epochs": 3}, "The weights after epoch 3 of 7, the best one on the held-out pictures."),
        ({"recipe": {"weights": "shipped_one"}}, r"started from the weights of shipped\_one"),
    ):
        assert said in card_of(training=CHECKPOINT.training | training)


def test_names_from_outside_cannot_break_the_card():
    name, labels = 'a "b": {c}\n---\n\x7f\udc80 é 猫', ("x|y\n*z* <b>`_$", "dog", "")
    accuracy = CHECKPOINT.accuracy | {"data": name + "| x"}
    card = card_of(name=name, labels=labels, accuracy=accuracy)
    card.encode()
    (result,) = yaml.safe_load(card.split("---\n")[1])["model-index"]
    assert result["name"] + "| x" == result["results"][0]["dataset"]["name"] == 'a "b": {c} --- é 猫| x'
    assert r"x\|y \*z\* \<b\>\`\_\$" in card
    assert all(len({len(row) for row in table}) == 1 for table in tables(card))


def test_many_classes_are_shortened_to_those_that_matter():
    labels, confusion = tuple(f"class-{i}" for i in range(100)), np.ones((100, 100), int) + np.diag(np.arange(100) + 10)
    config = replace(CHECKPOINT.config, num_classes=100)
    card = card_of(confusion=confusion, config=config, labels=labels)
    assert "class-19, and 80 more" in card and "class-20," not in card
    worst = next(table for table in tables(card) if "least often right" in table[0][0])
    assert [row[0].strip() for row in worst[2:]] == [f"class-{i}" for i in range(10)]


def test_the_commands_of_the_card_are_understood(random_checkpoint, picture, tmp_path, monkeypatch, capsys):
    card = card_of()
    classify, _, export = re.search(r"```sh\n(.+)\n(.+)\n(.+)\n```", card).groups()
    for command in (classify, export):
        assert "RUN/model.safetensors" in vars(parse(command.removeprefix("python -m convmixer ").split())).values()
    random_checkpoint().rename(tmp_path / "model.safetensors")
    picture().save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    code = re.search(r"```python\n(.+?)```", card, flags=re.DOTALL)[1]
    exec(code.replace("RUN/", "").replace("IMAGE", "picture.png"), {})
    assert "label" in capsys.readouterr().out


def test_curves_show_what_was_measured_and_only_that(tmp_path, figures):
    unknown = dict.fromkeys(("train_top1", "held_out_loss", "held_out_top1"), math.nan)
    for history, missing in ((HISTORY, 0), ([row | unknown for row in HISTORY], 1), ([], 3)):
        draw_curves(tmp_path / "curves.png", history, "$a$ run")
        assert texts(figures[-1]).count("not measured") == missing
    loss, top1, lr = figures[0].axes
    train, held_out = loss.lines
    assert train.get_xydata().tolist() == [[row["epoch"], row["train_loss"]] for row in HISTORY]
    assert held_out.get_xydata().tolist() == [[epoch, 3 / epoch] for epoch in (1, 3, 5, 7)]
    assert held_out.get_marker() == "o"  # it has gaps
    assert [line.get_label() for line in top1.lines[:2]] == ["train", "held-out"]
    assert lr.lines[0].get_ydata().tolist() == [row["lr"] for row in HISTORY]
    assert {"$a$ run", "held-out, best: 54.00 % after epoch 7"} <= set(texts(figures[0]))


def test_every_cell_of_few_classes_has_its_colour_and_its_number(tmp_path, figures):
    confusion = np.array([[997, 1, 2, 0], [6, 94, 0, 0], [0, 0, 0, 0], [0, 0, 9999, 1]])
    draw_confusion(tmp_path / "confusion.png", confusion, ("cat", "dog", "ship", "car"), "pets")
    matrix, bars = figures[0].axes
    shares = matrix.images[0].get_array()
    assert shares[1].tolist() == [0.06, 0.94, 0, 0] and np.flatnonzero(shares.mask.all(1)).tolist() == [2]
    written = {tuple(text.get_position()): text.get_text() for text in matrix.texts}
    numbers = {(0, 0): "100", (1, 0): "0.1", (2, 0): "0.2", (0, 1): "6.0", (1, 1): "94", (2, 3): "100", (3, 3): "<0.1"}
    assert written == numbers  # (column, row)
    right = ["99.7 % of 1,000", "94.0 % of 100", "no pictures", "0.0 % of 10,000"]
    assert [text.get_text() for text in bars.texts] == right
    assert "1,092 of 11,100 pictures right (9.84 %)" in texts(figures[0])
    assert frequent_confusions(confusion, 99) == [(3, 2, 9999), (1, 0, 6), (0, 2, 2), (0, 1, 1)]


@pytest.mark.parametrize("classes", [1, 20, 100])
def test_no_text_leaves_the_picture(tmp_path, classes):
    labels = tuple(f"$\\no{{$ {i:3} formula, forty characters ......" for i in range(classes))
    draw_confusion(tmp_path / "confusion.png", np.full((classes, classes), 500), labels, "a run " * 8)
    drawn = np.asarray(Image.open(tmp_path / "confusion.png").convert("RGB")) != 255
    assert drawn[3:-3, 3:-3].sum() == drawn.sum() > 0


def test_many_classes_get_lists_instead_of_numbers_in_cells(tmp_path, figures):
    confusion = np.diag(np.full(1000, 50))
    confusion[10, 900], confusion[10, 10], confusion[20:24] = 30, 20, 0
    draw_confusion(tmp_path / "confusion.png", confusion, [f"class-{i}" for i in range(1000)], "ImageNet")
    matrix, _, lists, scale = figures[0].axes
    assert not matrix.texts
    lines = [text.get_text() for text in lists.texts]
    assert lines[lines.index("30 of 50") + 1] == "class-10 → class-900"
    assert lines[lines.index("40.0 % of 50") + 1] == "class-10"
    shares = matrix.images[0].get_array()  # each the largest of 4 x 4 cells
    assert shares.shape == (250, 250) and (shares[2, 225], shares[2, 2]) == (0.6, 1)
    assert np.flatnonzero(shares.mask.all(1)).tolist() == [5]  # without pictures
    assert scale.get_xlabel() == "% of the true class, the largest of 4 × 4 cells"
