"""The pictures of a run: its curves, and which classes it takes for which.

matplotlib is imported where something is drawn, and used without pyplot: no display, no state shared with anyone else.
"""

import math
import os
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from convmixer.weights import write_atomically
from train.report.console import best_row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

INK, GREY, PALE, FAINT = "#20242c", "#6e747e", "#d3d6da", "#e4e6e9"
TRAIN, HELD_OUT = "#2f6fb0", "#e15f23"  # blue and orange: told apart by every kind of colour vision, and in print
DPI = 120
LABELLED = 20  # up to so many classes every one is named and every cell has its number
NAMED = 60  # up to so many classes every row is named
LABEL_LENGTH = 40  # characters of a label that are shown
SHOWN = 300  # points of the matrix along each side that the eye can still tell apart
LISTED, LISTED_LENGTH = 12, 27  # lines in each list beside a larger matrix, and characters of a label in them


def frequent_confusions(confusion: np.ndarray, count: int) -> list[tuple[int, int, int]]:
    """The ``count`` most frequent mistakes as (true class, answer, pictures), the most frequent one first.

    confusion: int64 (C, C), rows true class, columns answer. Fewer come back where there are fewer kinds of mistakes;
    among equally frequent ones the lower class comes first.
    """
    mistakes = confusion - np.diag(np.diag(confusion))
    order = np.argsort(-mistakes, axis=None, kind="stable")[:count]
    pairs = (np.unravel_index(i, mistakes.shape) for i in order)
    return [(int(true), int(answer), int(mistakes[true, answer])) for true, answer in pairs if mistakes[true, answer]]


def class_accuracy(confusion: np.ndarray) -> np.ndarray:
    """The share of each class's pictures that got the right answer, (C,), 0 to 1; NaN for a class without pictures."""
    totals = confusion.sum(1)
    return np.divide(np.diag(confusion), totals, out=np.full(len(totals), np.nan), where=totals > 0)


def shorten(label: str, length: int = LABEL_LENGTH) -> str:
    """A label on one line, cut to ``length`` characters."""
    label = " ".join(label.split())
    return label if len(label) <= length else label[: length - 1].rstrip() + "…"


def draw_curves(path: str | os.PathLike, history: list[dict], title: str) -> None:
    """Writes a PNG with loss, top-1 accuracy and learning rate over the epochs of ``history`` (see `console`).

    What was measured in some epochs only has a marker for each of them; what was never measured is left out.
    """
    figure = _new_figure((13, 4.4), title)
    loss, top1, lr = figure.subplots(1, 3, width_ratios=(5, 5, 3))
    for axes, name in ((loss, "loss"), (top1, "top1")):
        _draw_series(axes, history, f"train_{name}", "train", TRAIN)
        _draw_series(axes, history, f"held_out_{name}", "held-out", HELD_OUT)
    _draw_series(lr, history, "lr", "", GREY)
    _finish_axes(loss, history, "loss", span=0.5)
    _finish_axes(top1, history, "top-1 accuracy (%)", span=10)
    _finish_axes(lr, history, "learning rate", span=0)
    lr.set_ylim(bottom=0)
    _mark_best(top1, history)
    _save(path, figure)


def _draw_series(axes: "Axes", history: list[dict], name: str, label: str, colour: str) -> None:
    points = [(row["epoch"], row[name]) for row in history if math.isfinite(row.get(name, math.nan))]
    if points:
        epochs, values = zip(*points, strict=True)
        # A line through every epoch needs no markers; one with gaps does, to show what was measured.
        marker = "o" if len(points) < len(history) or len(points) == 1 else None
        axes.plot(epochs, values, color=colour, label=label, linewidth=1.8, marker=marker, markersize=4)


def _finish_axes(axes: "Axes", history: list[dict], title: str, span: float) -> None:
    """Title, grid and limits of one of the curves; the y axis covers at least ``span``, so that noise looks small."""
    from matplotlib.ticker import MaxNLocator

    axes.set_title(title, loc="left", color=INK, fontsize=11)
    axes.set_xlabel("epoch", color=GREY)
    epochs = [row["epoch"] for row in history] or [1]
    margin = max(0.5, 0.02 * (max(epochs) - min(epochs)))
    axes.set_xlim(min(epochs) - margin, max(epochs) + margin)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, min_n_ticks=1))
    axes.grid(axis="y", color=FAINT)
    _tidy(axes)
    if not axes.lines:
        axes.set_yticks([])
        axes.text(0.5, 0.5, "not measured", color=GREY, ha="center", transform=axes.transAxes)
        return
    low, high = axes.get_ylim()
    missing = max(0.0, span - (high - low)) / 2
    axes.set_ylim(low - missing, high + missing)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, labelcolor=INK)


def _tidy(axes: "Axes") -> None:
    axes.set_axisbelow(True)
    axes.tick_params(colors=GREY, length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(PALE)


def _mark_best(axes: "Axes", history: list[dict]) -> None:
    """Marks the best epoch on the held-out pictures, and says so above."""
    if best := best_row(history):
        axes.plot(best["epoch"], best["held_out_top1"], "o", color=HELD_OUT, markersize=7, markerfacecolor="white")
        text = f"held-out, best: {best['held_out_top1']:.2f} % after epoch {best['epoch']}"
        axes.set_title(text, loc="right", color=HELD_OUT, fontsize=10)


def draw_confusion(path: str | os.PathLike, confusion: np.ndarray, labels: Sequence[str], title: str) -> None:
    """Writes a PNG of the confusion matrix: each row shows how the pictures of one class were answered.

    confusion: int64 (C, C), rows true class, columns answer. labels: C texts. Up to 20 classes are named, with the
    percentage in every cell; of more, the most frequent mistakes and the classes least often right are listed. A class
    without pictures has a grey row. Raises OSError.
    """
    few = len(labels) <= LABELLED
    if few:
        longest = max(len(shorten(label)) for label in labels)
        cells = 0.48 * len(labels)  # inches
        side = cells + 0.085 * longest + 0.6  # with the labels and the axis title
        figure = _new_figure((max(6.0, side + 2.4, 0.11 * len(title)), side + 0.8), title)
        matrix, bars = figure.subplots(1, 2, width_ratios=(max(2.0, cells), 2.1), sharey=True)
        image = _draw_matrix(matrix, confusion)
        _write_cells(matrix, image, confusion, labels)
    else:
        figure = _new_figure((16.6, 9.4), title)
        matrix, bars, lists = figure.subplots(1, 3, width_ratios=(8, 1.2, 6.2))
        bars.sharey(matrix)
        block = -(-len(labels) // SHOWN)
        image = _draw_matrix(matrix, confusion, block)
        _explain_points(matrix, image, labels, block)
        _write_lists(lists, confusion, labels)
    _draw_accuracy(bars, confusion, few)
    _save(path, figure)


def _draw_matrix(axes: "Axes", confusion: np.ndarray, block: int = 1) -> "AxesImage":
    """The matrix as an image whose values are shares of the row, 0 to 1, NaN for a class without pictures.

    Each of its points is the largest of ``block`` x ``block`` cells; single cells of 1,000 classes cannot be seen.
    """
    from matplotlib.colors import LinearSegmentedColormap, PowerNorm

    totals = confusion.sum(1, keepdims=True)
    shares = np.divide(confusion, totals, out=np.full(confusion.shape, np.nan), where=totals > 0)
    colours = LinearSegmentedColormap.from_list("blues", ("#ffffff", "#a9c8e6", TRAIN, "#123a66")).with_extremes(
        bad=PALE
    )
    # The square root of the share: mistakes are a few percent each, and are what one looks for.
    image = axes.imshow(_largest(shares, block), cmap=colours, norm=PowerNorm(0.5, 0, 1), aspect="auto")
    points, classes = len(image.get_array()), len(confusion)
    image.set_extent((-0.5, points * block - 0.5, points * block - 0.5, -0.5))
    axes.set(xlim=(-0.5, classes - 0.5), ylim=(classes - 0.5, -0.5))
    total, right = int(totals.sum()), int(np.trace(confusion))
    share = f" ({100 * right / total:.2f} %)" if total else ""
    axes.set_title(f"{right:,} of {total:,} pictures right{share}", loc="left", color=INK, fontsize=11)
    axes.set_xlabel("answer", color=GREY)
    axes.set_ylabel("true class", color=GREY)
    axes.tick_params(colors=INK, length=0)
    for spine in axes.spines.values():
        spine.set_color(PALE)
    return image


def _largest(values: np.ndarray, block: int) -> np.ndarray:
    """The largest value in each ``block`` x ``block`` part of ``values``; NaN only where there is nothing else."""
    padding = -len(values) % block
    padded = np.pad(values, ((0, padding), (0, padding)), constant_values=np.nan)
    points = len(padded) // block
    return np.fmax.reduce(np.fmax.reduce(padded.reshape(points, block, points, block), axis=3), axis=1)


def _write_cells(axes: "Axes", image: "AxesImage", confusion: np.ndarray, labels: Sequence[str]) -> None:
    """Names the rows and columns, and writes the percentage into every cell that is not empty."""
    names = [shorten(label) for label in labels]
    slanted = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(range(len(names)), names, **(slanted if max(map(len, names)) <= 12 else {"rotation": 90}))
    axes.set_yticks(range(len(names)), names)
    for (row, column), share in np.ndenumerate(image.get_array().filled(0)):
        if confusion[row, column]:
            text = "<0.1" if share < 0.0005 else f"{100 * share:.1f}" if share < 0.0995 else f"{100 * share:.0f}"
            colour = "white" if image.norm(share) > 0.6 else INK
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)


def _explain_points(axes: "Axes", image: "AxesImage", labels: Sequence[str], block: int) -> None:
    """What stands in for names and numbers where there are too many classes: indices, and a scale of the colours."""
    from matplotlib.ticker import MaxNLocator

    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=10, integer=True))
    if len(labels) <= NAMED:  # the number behind the name is what stands on the other axis
        names = [f"{shorten(label, LISTED_LENGTH)} {index}" for index, label in enumerate(labels)]
        axes.set_yticks(range(len(labels)), names, fontsize=7)
    ticks = (0, 0.01, 0.1, 0.5, 1)
    scale = axes.figure.colorbar(image, ax=axes, location="bottom", shrink=0.5, aspect=40, pad=0.02, ticks=ticks)
    scale.ax.set_xticklabels([f"{100 * tick:.0f}" for tick in ticks])
    scale.ax.tick_params(colors=GREY, length=0)
    scale.outline.set_visible(False)
    largest = f", the largest of {block} × {block} cells" if block > 1 else ""
    scale.set_label(f"% of the true class{largest}", color=GREY)


def _draw_accuracy(axes: "Axes", confusion: np.ndarray, written: bool) -> None:
    """A bar a class beside its row of the matrix: how much of it was answered right, also in words if ``written``."""
    accuracy, totals = 100 * class_accuracy(confusion), confusion.sum(1)
    rows, height = range(len(totals)), 0.5 if written else 1.0
    axes.barh(rows, np.where(totals > 0, 100, 0), height, color=FAINT)
    axes.barh(rows, np.nan_to_num(accuracy), height, color=TRAIN)
    axes.set_title("right", loc="left", color=INK, fontsize=11)
    _tidy(axes)
    axes.tick_params(labelleft=False)
    axes.spines["bottom"].set_visible(False)
    axes.set_xlim(0, 300 if written else 100)  # room for the words
    axes.set_xticks([] if written else [0, 100], None if written else ["0", "100 %"])
    for row, (percent, total) in enumerate(zip(accuracy, totals, strict=True) if written else ()):
        text = f"{percent:.1f} % of {total:,}" if total else "no pictures"
        axes.text(108 if total else 0, row, text, va="center", color=INK, fontsize=9)


def _write_lists(axes: "Axes", confusion: np.ndarray, labels: Sequence[str]) -> None:
    """The most frequent mistakes and the classes least often right, as lines of text that fill ``axes``."""
    accuracy, totals = class_accuracy(confusion), confusion.sum(1)
    name = [shorten(label, LISTED_LENGTH) for label in labels]
    worst = [i for i in np.argsort(accuracy, kind="stable")[:LISTED] if totals[i]]  # argsort puts NaN last
    lines = [("", "most frequent mistakes: true class → answer")]
    for true, answer, count in frequent_confusions(confusion, LISTED):
        lines.append((f"{count:,} of {totals[true]:,}", f"{name[true]} → {name[answer]}"))
    lines += [("", ""), ("", "classes least often right")]
    lines += [(f"{100 * accuracy[i]:.1f} % of {totals[i]:,}", name[i]) for i in worst]
    axes.set_axis_off()
    for position, (figures, words) in enumerate(lines):
        y = 1 - (position + 0.5) / (2 * LISTED + 4)
        place = {"transform": axes.transAxes, "fontsize": 10 if figures else 11, "color": INK}
        axes.text(0.02, y, figures or words, **place)
        axes.text(0.24, y, words if figures else "", **place)


def _new_figure(size: tuple[float, float], title: str) -> "Figure":
    """An empty figure of (width, height) inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    figure.suptitle(title, x=0.01, ha="left", color=INK, fontsize=13)
    return figure


def _save(path: str | os.PathLike, figure: "Figure") -> None:
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)  # a label with two dollar signs is a label and not a formula
    with warnings.catch_warnings():
        # The font lacks some scripts. Such a label is drawn as boxes, and a warning an epoch would not change that.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        write_atomically(path, lambda file: figure.savefig(file, format="png"))
