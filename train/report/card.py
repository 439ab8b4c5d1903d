"""The model card of a run: the README.md of its folder, which the Hugging Face Hub shows, too."""

import json
import math
import re
import statistics

import numpy as np

from convmixer.config import count_parameters
from convmixer.weights import Checkpoint
from train.report.console import best_row, duration, is_known, rate
from train.report.pictures import LABELLED, class_accuracy, frequent_confusions

WORST = 10  # classes in the table where there are too many for all
CONFUSIONS = 3
PRECISIONS = {"off": "float32", "bf16": "bfloat16 (autocast)", "fp16": "float16 (autocast)"}
# Parts of the recipe that other lines of the card say, or that the names of the data say better.
SAID_ELSEWHERE = {"name", "model", "preprocessing", "epochs", "seed", "split", "hold_out"}
# Fields that mean nothing while another one is off.
BELONGS_TO = {"augmentation.ra_m": "augmentation.ra_n", "augmentation.remode": "augmentation.reprob"}


def model_card(checkpoint: Checkpoint, history: list[dict], confusion: np.ndarray | None) -> str:
    """The card as Markdown with YAML front matter; it links to curves.png and confusion.png beside it.

    history: rows as in `console`. confusion: int64 (C, C) of the last evaluation, rows true class, columns
    answer; None if there was none. Whatever the run does not say, its line is left out.
    """
    front_matter = ["---", *_front_matter(checkpoint), "---"]
    sections = (
        _about(checkpoint),
        _use(),
        _training(checkpoint.training, history),
        _results(checkpoint, history, confusion),
        _limits(checkpoint, history),
    )
    return "\n".join([*front_matter, *(line for section in sections for line in ["", *section]), ""])


def _front_matter(checkpoint: Checkpoint) -> list[str]:
    """What the Hub reads: https://huggingface.co/docs/hub/model-cards, in block style; texts are quoted as in JSON."""
    lines = [
        "library_name: convmixer",
        "pipeline_tag: image-classification",
        "tags:",
        "- convmixer",
        "- image-classification",
    ]
    top1, data = checkpoint.accuracy.get("top1"), _plain(checkpoint.accuracy.get("data", ""))
    if is_known(top1) and data:
        # The type is no data set's id on the Hub: a hold-out must not rank beside what others measured on a test set.
        slug = "-".join(re.findall(r"\w+", data.lower()))
        lines += [
            "model-index:",
            f"- name: {_quoted(checkpoint.name)}",
            "  results:",
            "  - task:",
            "      type: image-classification",
            "    dataset:",
            f"      name: {_quoted(data)}",
            f"      type: {_quoted(slug or 'pictures')}",
            "    metrics:",
            "    - type: accuracy",
            "      name: top-1 (%)",
            f"      value: {round(top1, 4)}",
        ]
    return lines


def _about(checkpoint: Checkpoint) -> list[str]:
    config, preprocessing, labels = checkpoint.config, checkpoint.preprocessing, checkpoint.labels
    named = ", ".join(_text(label) for label in labels[:LABELLED])
    more = f", and {len(labels) - LABELLED:,} more" if len(labels) > LABELLED else ""
    size = preprocessing.size
    lines = [f"# {_text(checkpoint.name)}", ""]
    epochs = _epochs(checkpoint.training)
    if checkpoint.training.get("best"):
        lines += [f"The weights after epoch {epochs}, the best one on the held-out pictures.", ""]
    elif checkpoint.training.get("finished") is False:
        lines += ["**This run is not finished.**" + (f" It stands after epoch {epochs}." if epochs else ""), ""]
    return [
        *lines,
        f"An image classifier: ConvMixer-{config.dim}/{config.depth}, the network of"
        ' ["Patches Are All You Need?"](https://arxiv.org/abs/2201.09792).',
        "",
        *_table(
            ("network", ""),
            ("parameters", f"{count_parameters(config):,}"),
            ("kernel, patch", f"{config.kernel_size}, {config.patch_size}"),
            ("activation", {"gelu": "GELU", "relu": "ReLU"}[config.activation]),
            ("input", f"{size} × {size} pixels, {config.in_chans} channels"),
            ("preprocessing", f"short side to {preprocessing.resize} ({preprocessing.interpolation}), centre crop"),
            ("classes", f"{len(labels):,}: {named}{more}"),
        ),
    ]


def _use() -> list[str]:
    return [
        "## How to use it",
        "",
        "From a checkout of the project that made it; `RUN` stands for this folder.",
        "",
        "```sh",
        "python -m convmixer classify IMAGE --model RUN/model.safetensors",
        "COG_WEIGHTS=RUN/model.safetensors make serve    # Cog's HTTP server",
        "python -m convmixer export RUN/model.safetensors --to model.onnx",
        "```",
        "",
        "```python",
        "from convmixer import Classifier",
        "",
        'for prediction in Classifier("RUN/model.safetensors").classify("IMAGE"):',
        "    print(prediction.label, prediction.score)",
        "```",
    ]


def _training(training: dict, history: list[dict]) -> list[str]:
    recipe = training.get("recipe", {})
    speeds = [row["images_per_s"] for row in history if is_known(row.get("images_per_s"))]
    broken = max((row["skipped"] for row in history if is_known(row.get("skipped"))), default=0)
    lines = [
        "## How it was trained",
        "",
        *_table(
            ("run", ""),
            ("data", _text(training.get("data", ""))),
            ("recipe", _text(recipe.get("name", ""))),
            ("epochs", _epochs(training)),
            ("seed", training.get("seed")),
            ("commit", _commit(training.get("commit"))),
            ("PyTorch", _text(training.get("torch", ""))),
            ("device", _text(training.get("device", ""))),
            ("processes", training.get("processes")),
            ("time", duration(training["seconds"]) if is_known(training.get("seconds")) else None),
            ("images a second", f"{rate(statistics.median(speeds))} (median of the epochs)" if speeds else None),
            ("broken pictures left out", f"up to {broken:,} an epoch" if broken else None),
        ),
    ]
    if training.get("command"):
        lines += ["", "```sh", _printable(training["command"]), "```"]
    fields = [(_code("--" + name.replace("_", "-")), _code(value)) for name, value in _fields_that_matter(recipe)]
    if fields:
        lines += ["", "The recipe, as options of the command line; what is off is left out.", ""]
        lines += _table(("option", "value"), *fields)
    return [*lines, "", "![Loss, top-1 accuracy and learning rate over the epochs](curves.png)"] if history else lines


def _results(checkpoint: Checkpoint, history: list[dict], confusion: np.ndarray | None) -> list[str]:
    accuracy = checkpoint.accuracy
    lines = ["## What it measured", ""]
    measured = is_known(accuracy.get("top1")) and _table(
        ("measured", ""),
        ("data", _text(accuracy.get("data", ""))),
        ("top-1", _percent(accuracy.get("top1"))),
        ("top-5", _percent(accuracy.get("top5"))),
        ("pictures", f"{accuracy['images']:,}" if is_known(accuracy.get("images")) else None),
        ("precision", PRECISIONS.get(accuracy.get("amp"))),
    )
    lines += measured or ["Nothing was measured."]
    if best := best_row(history):
        lines += ["", f"Best epoch of the run: {best['epoch']}, with {_percent(best['held_out_top1'])} top-1."]
    if confusion is None or not confusion.any():
        return lines
    names, totals, right = [_text(label) for label in checkpoint.labels], confusion.sum(1), class_accuracy(confusion)
    order = range(len(names)) if len(names) <= LABELLED else np.argsort(right, kind="stable")[:WORST]
    title = "class" if len(names) <= LABELLED else f"the {WORST} classes least often right"
    classes = [(names[i], _percent(100 * right[i]) or "-", f"{totals[i]:,}") for i in order]
    lines += ["", *_table((title, "top-1", "pictures"), *classes)]
    mistakes = frequent_confusions(confusion, CONFUSIONS)
    if mistakes:
        lines += ["", "The most frequent confusions:", ""]
        lines += [f"- {count:,} of {totals[a]:,}: {names[a]} taken for {names[b]}" for a, b, count in mistakes]
    return [*lines, "", "![Confusion matrix](confusion.png)"]


def _limits(checkpoint: Checkpoint, history: list[dict]) -> list[str]:
    classes, size = len(checkpoint.labels), checkpoint.preprocessing.size
    lines = [
        "## Limits",
        "",
        f"- It answers every picture with one of its {classes:,} classes, whatever the picture shows. The score"
        " compares these classes with each other; it does not say that the picture shows any of them.",
        f"- It sees {size} × {size} pixels of a picture; finer detail and what the centre crop cuts off are lost.",
    ]
    if times := sum(is_known(row.get("held_out_top1")) for row in history):
        often = "once" if times == 1 else f"{times:,} times, after one epoch each"
        if checkpoint.training.get("best"):
            chose = "the epoch of these weights, so that the accuracy above is higher than on new pictures."
        else:
            chose = (
                "which epoch `best.safetensors` keeps; `model.safetensors` is the last finished epoch. If they chose"
                " between runs or settings, too, the accuracy above is higher than on new pictures."
            )
        lines.append(f"- The held-out pictures were evaluated {often}. They chose {chose}")
    if weights := checkpoint.training.get("recipe", {}).get("weights"):
        lines.append(
            f"- Training started from the weights of {_text(weights)}. If those had seen the held-out pictures, the"
            " accuracy above is higher than on new pictures."
        )
    return lines


def _epochs(training: dict) -> str:
    """Finished and planned epochs, such as "3 of 25"; what is not known is left out."""
    known = (training.get("epochs"), training.get("recipe", {}).get("epochs"))
    return " of ".join(f"{epochs:,}" for epochs in known if epochs is not None)


def _fields_that_matter(recipe: dict, prefix: str = "") -> list[tuple[str, object]]:
    """The recipe as (dotted name, value), without what is off: false, nothing, 0."""
    fields = []
    for name, value in recipe.items():
        if not prefix and name in SAID_ELSEWHERE:
            continue
        if isinstance(value, dict):
            fields += _fields_that_matter(value, f"{prefix}{name}.")
        elif value:
            fields.append((prefix + name, value))
    shown = dict(fields)
    return [(name, value) for name, value in fields if BELONGS_TO.get(name, name) in shown]


def _table(heading: tuple[str, ...], *rows: tuple) -> list[str]:
    """A Markdown table without the rows whose last cell is empty; no table where that leaves none."""
    kept = [row for row in rows if row[-1] not in (None, "")]
    lines = [heading, ["---"] * len(heading), *kept] if kept else []
    return ["| " + " | ".join(map(str, line)) + " |" for line in lines]


def _percent(value: float | None) -> str | None:
    return f"{value:.2f} %" if is_known(value) and math.isfinite(value) else None


def _code(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return f"`{_plain(text)}`".replace("|", "\\|")  # the one character that a table needs escaped in code


def _commit(commit: str | None) -> str | None:
    if not commit or commit == "unknown":
        return None
    changed = " with changes that were not committed" if commit.endswith("-dirty") else ""
    return f"`{_printable(commit).removesuffix('-dirty')}`{changed}"


def _printable(text: str) -> str:
    """Without line breaks, control characters and halves of surrogate pairs, which neither YAML nor UTF-8 takes."""
    return "".join(character if character.isprintable() else " " for character in text)


def _plain(text: str) -> str:
    return " ".join(_printable(text).split())


def _quoted(text: str) -> str:
    return json.dumps(_plain(text), ensure_ascii=False)


def _text(text: str) -> str:
    """A label or a name as it must stand in Markdown to be shown as it is."""
    return re.sub(r"([\\`*_\[\]<>|$~#&])", r"\\\1", _plain(text))
