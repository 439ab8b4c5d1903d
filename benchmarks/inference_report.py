"""What benchmarks/inference.py prints and draws. Its results are the JSON values that race gives."""

import importlib.metadata
import os
import platform
from collections.abc import Iterator
from pathlib import Path

from benchmarks.inference_contestants import MEASURE, OURS, PRODUCTS

PACKAGES = ("torch", "timm", "onnxruntime", "openvino")
FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_bf16", "amx_int8")  # as Linux calls them
SMALL = 9  # points, the size of the plot's figures
BEHIND = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0}  # a figure over a line stays readable


def machine() -> dict:
    """What the figures depend on: processor, cores, and versions; None for what is not known or not installed."""

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = fields.get("flags", "").split()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processor": fields.get("model name") or platform.processor() or platform.machine(),
        "features": [feature for feature in FEATURES if feature in flags],
        "cores": cores,
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES},
    }


def label(name: str, about: dict) -> str:
    """The contestant's name, with its precision where that is not float32 and the name does not say it."""
    return name if about["precision"] in (*name.split(), "float32") else f"{name} ({about['precision']})"


def amount(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} %"


def megabytes(value: float | None) -> str:
    return "?" if value is None else f"{value:,.0f}"


def difference(value: float | None) -> str:
    return "" if value is None else "0" if value == 0 else f"{value:.1e}"


def cell_lines(cell: dict) -> Iterator[str]:
    """Everything about one model and batch size, a line a contestant."""
    yield (
        f"\n{cell['model']}, batch {cell['batch']}, {cell['rounds']} rounds; ms a batch; "
        f"the largest logit is {cell['largest_logit']:.3g}"
    )
    heads = ("median", "fastest", "slowest", "first", "images/s", "x eager", "ceiling", "MB", "difference")
    yield f"{'':<32} {' '.join(f'{head:>10}' for head in heads)}"
    for name, about in cell["contestants"].items():
        times = (about["median_s"], min(about["times_s"]), max(about["times_s"]), about["first_call_s"])
        cells = ["" if seconds is None else f"{1000 * seconds:,.2f}" for seconds in times]
        cells += [amount(about["images_per_s"]), f"{about['against_timm_eager']:.2f}"]
        cells += [percent(about["share_of_ceiling"]), megabytes(about["megabytes"])]
        cells += [difference(about["largest_difference"])]
        yield f"{label(name, about):<32} {' '.join(f'{text:>10}' for text in cells)}"


def markdown(result: dict) -> str:
    """The tables of the README: a line about the machine, a table a model, and what comes out of them."""
    return "\n".join([*heading(result), *tables(result["cells"]), *summary(result["cells"])])


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def heading(result: dict) -> Iterator[str]:
    about, rounds = result["machine"], [cell["rounds"] for cell in result["cells"]]
    versions = ", ".join(f"{package} {version}" for package, version in about["versions"].items() if version)
    threads = "" if result["threads"] is None else f", threads: {result['threads']}"
    features = f" ({', '.join(about['features'])})" if about["features"] else ""
    yield f"{about['processor']}{features}, {about['cores']} cores{threads}; Python {about['python']}, {versions};"
    how_many = f"{min(rounds)}" if min(rounds) == max(rounds) else f"{min(rounds)} to {max(rounds)}"
    yield f"medians of {how_many} rounds, {result['total_s'] / 60:.0f} minutes in all."
    yield "Images a second, and in brackets the share of the float32 ceiling. Memory in MB, smallest and largest batch."


def models(cells: list[dict]) -> dict[str, list[dict]]:
    """The cells of each model, in order."""
    by_model: dict[str, list[dict]] = {}
    for cell in cells:
        by_model.setdefault(cell["model"], []).append(cell)
    return by_model


def tables(cells: list[dict]) -> Iterator[str]:
    for model, own in models(cells).items():
        yield ""
        yield row(f"`{model}`", *(f"batch {cell['batch']}" for cell in own), "memory", "largest difference")
        yield "|" + "---|" * (len(own) + 3)
        names = dict.fromkeys(name for cell in own for name in cell["contestants"])
        for name in sorted(names, key=lambda name: name in PRODUCTS):
            yield table_row(name, [cell["contestants"].get(name) for cell in own])


def table_row(name: str, abouts: list[dict | None]) -> str:
    """One contestant at each batch size; None where it did not take part."""
    here = [about for about in abouts if about]
    text = label(name, here[0])
    speeds = [f"{amount(a['images_per_s'])} ({percent(a['share_of_ceiling'])})" if a else "" for a in abouts]
    speeds = [speed.replace(" ()", "") for speed in speeds]
    if name in PRODUCTS:
        return row(f"the 1x1 convolutions alone: {text}", *speeds, "", "")
    memory = [megabytes(about["megabytes"]) for about in (here[0], here[-1])]
    worst = max(about["largest_difference"] for about in here)
    if name in OURS:
        text, speeds = f"**{text}**", [f"**{speed}**" for speed in speeds]
    return row(text, *speeds, " / ".join(dict.fromkeys(memory)), difference(worst))


def summary(cells: list[dict]) -> Iterator[str]:
    """Ours against the measure, the best peer of the same precision, and the ceiling."""
    rows = [row(*summary_row(cell, name)) for name in OURS for cell in cells if name in cell["contestants"]]
    if rows:
        yield ""
        yield row("", "model", "batch", "against timm eager", "against the best peer", "of the ceiling")
        yield "|---|---|---|---|---|---|"
        yield from rows


def summary_row(cell: dict, name: str) -> list[str]:
    own, all_ = cell["contestants"][name], cell["contestants"]
    peers = {
        peer: own["images_per_s"] / about["images_per_s"]
        for peer, about in all_.items()
        if peer not in (*OURS, *PRODUCTS) and about["precision"] == own["precision"]
    }
    best = min(peers, key=peers.get, default=None)
    against = "" if best is None else f"{peers[best]:.2f} ({best})"
    relative = f"{own['against_timm_eager']:.2f}"
    return [name, f"`{cell['model']}`", str(cell["batch"]), relative, against, percent(own["share_of_ceiling"])]


def plot(path: str | os.PathLike, result: dict) -> None:
    """Writes a PNG: a row a model, a column a batch size, and in each a bar a contestant against timm eager.

    matplotlib is imported here, without pyplot: no display is needed.
    """
    from matplotlib.figure import Figure

    from convmixer.weights import write_atomically
    from train.report.pictures import DPI, GREY, INK

    by_model = models(result["cells"])
    batches = sorted({cell["batch"] for cell in result["cells"]})
    abouts = [pair for cell in result["cells"] for pair in cell["contestants"].items() if pair[0] not in PRODUCTS]
    labels = {name: label(name, about) for name, about in abouts}
    height = 1.1 + len(by_model) * (0.7 + 0.24 * len(labels))
    figure = Figure(figsize=(max(8.5, 2.6 + 3.2 * len(batches)), height), dpi=DPI, layout="constrained")
    about = result["machine"]
    title = f"Images a second, as a multiple of timm eager: {about['processor']}, {about['cores']} cores"
    figure.suptitle(title, x=0.01, ha="left", color=INK, fontsize=13)
    grid = figure.subplots(len(by_model), len(batches), squeeze=False, sharey=True)
    for (model, cells), line in zip(by_model.items(), grid, strict=True):
        by_batch = {cell["batch"]: cell for cell in cells}
        for batch, axes in zip(batches, line, strict=True):
            draw_cell(axes, by_batch.get(batch), labels)
            axes.set_title(f"{model}, batch {batch}", loc="left", color=INK, fontsize=10)
    note = (
        "orange: this project; pale: bfloat16 and 8 bits; dashed: the ceiling, float32 products of the 1x1 convolutions"
    )
    figure.supxlabel(note, x=0.01, ha="left", color=GREY, fontsize=SMALL)
    write_atomically(path, lambda file: figure.savefig(file, format="png"))


def draw_cell(axes, cell: dict | None, labels: dict[str, str]) -> None:
    """The bars of one model and batch size; none where it was not measured. labels: of each contestant, in order."""
    from train.report.pictures import FAINT, GREY, HELD_OUT, INK, PALE, TRAIN

    abouts = {} if cell is None else cell["contestants"]
    axes.set_yticks(range(len(labels)), labels.values(), fontsize=SMALL)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.axvline(1, color=PALE, linewidth=1, zorder=0)
    furthest = 1.0
    for place, name in enumerate(labels):
        if about := abouts.get(name):
            value = about["against_timm_eager"]
            colour = HELD_OUT if name in OURS else TRAIN
            axes.barh(place, value, 0.7, color=colour, alpha=1 if about["precision"] == "float32" else 0.45)
            axes.text(value, place, f" {value:.2f}", va="center", color=INK, fontsize=SMALL, bbox=BEHIND)
            furthest = max(furthest, value)
    if cell and cell["floor_s"]:
        ceiling = abouts[MEASURE]["median_s"] / cell["floor_s"]
        axes.axvline(ceiling, color=GREY, linewidth=1, linestyle="--")
        furthest = max(furthest, ceiling)
    axes.set_xlim(0, 1.2 * furthest)
    if not abouts:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color=GREY, fontsize=SMALL)
        axes.set_xticks([])
    axes.tick_params(colors=INK, length=0, labelsize=SMALL)
    axes.grid(axis="x", color=FAINT, zorder=-1)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(PALE)
